"""Attention over a learned prefix and a sequence's own keys, without concatenating them."""

from importlib import import_module
from typing import Any

# At once and here, before anything imports the package `attach` and so puts it in the function's place.
from prefixattn.attach import attach, load
from prefixattn.attach.bank import PrefixBank
from prefixattn.attach.combine import combine
from prefixattn.attach.hf.labelled import labelled_loss
from prefixattn.attach.plus import PrefixPlus
from prefixattn.attach.prefix import Prefix
from prefixattn.attention.functional import (
    prefix_attention,
    prefix_attention_qkvpacked,
    prefix_attention_varlen,
)
from prefixattn.attention.invariance import use_batch_invariant_kernels
from prefixattn.optim import FactoredAdamW, FactoredSGD
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.factored import FactoredNetwork
from prefixattn.prefixes.plus import PrefixPlusConfig
from prefixattn.reparam.functional import reparameterize

__version__ = "0.1.0"
__all__ = [
    "FactoredAdamW",
    "FactoredNetwork",
    "FactoredSGD",
    "Prefix",
    "PrefixBank",
    "PrefixConfig",
    "PrefixPlus",
    "PrefixPlusConfig",
    "PrefixTrainer",
    "SharedPrompt",
    "__version__",
    "attach",
    "combine",
    "labelled_loss",
    "load",
    "prefix_attention",
    "prefix_attention_qkvpacked",
    "prefix_attention_varlen",
    "reparameterize",
    "timm_attention",
    "use_batch_invariant_kernels",
]


_LAZY = {  # names that need a library that is optional
    "PrefixTrainer": ("prefixattn.attach.hf.trainer", "PrefixTrainer"),
    "SharedPrompt": ("prefixattn.attach.hf.shared_prompt", "SharedPrompt"),
    "timm_attention": ("prefixattn.attach.timm.layers", "PrefixAttention"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
