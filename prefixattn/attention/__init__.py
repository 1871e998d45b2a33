"""Attention with a prefix: the op, from what a call means down to its backends."""
