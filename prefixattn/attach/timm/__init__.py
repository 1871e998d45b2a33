"""Prefixes in vision transformers of timm."""
