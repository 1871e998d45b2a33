"""Prefixes in models. What is particular to a library is in hf/ and timm/."""

from prefixattn.attach.api import attach, load
from prefixattn.attach.find import attached, make_adapter

__all__ = ["attach", "attached", "load", "make_adapter"]
