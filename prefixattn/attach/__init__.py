"""`attach` and `load`: a prefix into a model. What is particular to a model class is in the modules beside this one."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefixattn.attach.prefix import Prefix
from prefixattn.config import PrefixConfig
from prefixattn.prefix import FreePrefix, make_encoder

# Class of the part that runs the layers -> module and class that know it. Imported when met: transformers is optional.
ADAPTERS = {"GPT2Model": ("gpt2", "GPT2Adapter")}


def attached(model: nn.Module) -> Prefix | None:
    """The prefix on `model`, or None; for a copied or unpickled model, whose prefix nobody has in hand."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    for hook in base._forward_pre_hooks.values():
        prefix = getattr(getattr(hook, "__self__", None), "prefix", None)
        if isinstance(prefix, Prefix):
            return prefix
    return None


def make_adapter(model: nn.Module) -> Any:
    """The adapter for `model`'s class; refuses classes without one and models that have a prefix already."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected a torch module")
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    known = [
        cls for cls in type(base).__mro__ if cls.__name__ in ADAPTERS and cls.__module__.startswith("transformers.")
    ]
    name = known[0].__name__ if known else None
    if name is None:
        raise NotImplementedError(
            f"attach does not know the class {type(model).__name__}; it knows Hugging Face models on "
            f"{', '.join(ADAPTERS)}"
        )
    if attached(model) is not None:
        raise ValueError("the model has a prefix already; call detach() on that one first")
    module, cls = ADAPTERS[name]
    return getattr(import_module(f".{module}", __name__), cls)(model, base)


def attach(model: nn.Module, config: PrefixConfig, tokenizer: Any = None) -> Prefix:
    """Puts a trainable prefix into `model` and freezes the model.

    Args:
        model: A Hugging Face GPT-2, with or without a head. It stays in the mode, training or evaluation, it is in.
        config: The prefix; see `PrefixConfig`.
        tokenizer: Turns `config.init` into token ids, if that is a text.

    Returns:
        The prefix. Its `parameters()` are what an optimizer takes; its `config.length` is the number of tokens of
        `config.init`, if that is a text or token ids.
    """
    if not isinstance(config, PrefixConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a PrefixConfig")
    adapter = make_adapter(model)
    layers = config.layer_indices(adapter.geometry.layers)
    if config.init == "random":
        encoder = make_encoder(config, adapter.geometry)
    else:
        ids = _token_ids(config.init, tokenizer)
        encoder = FreePrefix(adapter.activations(ids)[list(layers)].contiguous())
        config = PrefixConfig(**{**config.to_dict(), "length": len(ids), "init": tuple(ids)})
    prefix = Prefix(config, adapter, encoder.to(adapter.base.device))
    adapter.install(prefix)
    return prefix


def load(model: nn.Module, folder: str | Path) -> Prefix:
    """Attaches the prefix saved in `folder` to `model`: one of `save_pretrained`'s, or a PEFT prefix adapter.

    An unfolded prefix can be trained further, and so can a PEFT adapter, whose network PEFT does not save: it becomes
    share="none". The model is left as it is if anything is wrong with the files or they do not fit it.
    """
    from prefixattn import checkpoint  # here, for the sake of installations without safetensors

    adapter = make_adapter(model)
    config, encoder = checkpoint.read(Path(folder), adapter.geometry)
    prefix = Prefix(config, adapter, encoder.to(adapter.base.device))
    adapter.install(prefix)
    return prefix


def _token_ids(init: Any, tokenizer: Any) -> list[int]:
    if not isinstance(init, str):
        return list(init)
    if tokenizer is None:
        raise ValueError(
            f"init is the text {init!r}: attach needs the tokenizer too, or token ids in place of the text"
        )
    # A leading space, as for a word inside a sentence.
    ids = tokenizer(" " + init.strip(), add_special_tokens=False)["input_ids"]
    return [int(i) for i in (ids.tolist() if isinstance(ids, torch.Tensor) else ids)]
