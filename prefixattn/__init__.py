"""Attention over a learned prefix and a sequence's own keys, without concatenating them."""

# At once and here, before anything imports the package `attach` and so puts it in the function's place.
from prefixattn.attach import attach, load
from prefixattn.attach.bank import PrefixBank
from prefixattn.attach.combine import combine
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
    "PrefixBank",
    "PrefixConfig",
    "PrefixTrainer",
    "__version__",
    "attach",
    "combine",
    "load",
    "prefix_attention",
    "prefix_attention_qkvpacked",
    "reparameterize",
]


def __getattr__(name: str) -> object:
    # the one public name that needs transformers
    if name == "PrefixTrainer":
        from prefixattn.attach.trainer import PrefixTrainer

        return PrefixTrainer
    raise AttributeError(f"module 'prefixattn' has no attribute {name!r}")
