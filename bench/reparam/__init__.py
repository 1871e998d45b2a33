"""A training step of the network that makes the prefixes."""
