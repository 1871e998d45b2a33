"""Attention over a learned prefix and a sequence's own keys, without concatenating them."""

from typing import Any

# At once and here, before anything imports the package `attach` and so puts it in the function's place.
from prefixattn.attach import attach, load
from prefixattn.attach.prefix import Prefix
from prefixattn.config import PrefixConfig
from prefixattn.functional import prefix_attention, prefix_attention_qkvpacked
from prefixattn.optim import FactoredAdamW, FactoredSGD
from prefixattn.reparam.functional import reparameterize

__version__ = "0.1.0"
__all__ = [
    "FactoredAdamW",
    "FactoredSGD",
    "Prefix",
    "PrefixConfig",
    "__version__",
    "attach",
    "load",
    "prefix_attention",
    "prefix_attention_qkvpacked",
    "reparameterize",
    "timm_attention",
]


def __getattr__(name: str) -> Any:
    if name == "timm_attention":  # at its first use, for timm is optional
        from prefixattn.attach.timm_layers import PrefixAttention

        return PrefixAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
