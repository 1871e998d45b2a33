"""Prefixes in models of Hugging Face's transformers."""
