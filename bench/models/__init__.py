"""Training steps of whole models, ours beside PEFT's and the published ways."""
