"""Mistakes made on purpose, each of which a test must see."""
