"""`attach` and `load`: a prefix into a model. What is particular to a model class is in the modules beside this one."""

import inspect
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from prefixattn.attach.adapter import Adapter, making
from prefixattn.attach.attached import Attached
from prefixattn.attach.bank import PrefixBank
from prefixattn.attach.init import initialise
from prefixattn.attach.plus import PrefixPlus
from prefixattn.attach.prefix import Prefix
from prefixattn.config import INITS, PrefixConfig
from prefixattn.plus import Memories, PrefixPlusConfig
from prefixattn.prefix import PrefixRows, make_encoder

# Library of the model's class -> module and class that know it. Imported when met: both libraries are optional.
ADAPTERS = {"transformers": ("huggingface", "HuggingFaceAdapter"), "timm": ("timm", "TimmAdapter")}


def _library(model: nn.Module) -> str | None:
    """The library of ADAPTERS whose model it is; what wraps one, as PEFT's classes do, is none."""
    for cls in type(model).__mro__:
        library = cls.__module__.split(".")[0]
        if library == "timm" or (library == "transformers" and cls.__name__ == "PreTrainedModel"):
            return library
    return None


def _inner(model: nn.Module) -> nn.Module:
    """The model of a known library in a wrapper of PEFT, of torch.compile or for several processes."""
    if isinstance(model, nn.Module) and _library(model) is None:
        for name in ("_orig_mod", "module", "base_model", "model"):
            inner = model._modules.get(name)
            if inner is not None and (name in ("_orig_mod", "module") or type(model).__module__.startswith("peft.")):
                return _inner(inner)
    return model


def _base(model: nn.Module) -> nn.Module:
    """The part that runs the layers."""
    found = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    if found is model or _library(found) is None:
        return model
    taken = inspect.signature(type(found).forward).parameters
    name = getattr(model, "main_input_name", "")
    # a part that takes hidden states has what makes them before it
    return found if name in taken or any(p.kind is p.VAR_POSITIONAL for p in taken.values()) else model


def _adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter of a model that has prefixes; of a copied or unpickled one too."""
    for hook in _base(_inner(model))._forward_pre_hooks.values():
        adapter = getattr(hook, "__self__", None)
        if isinstance(adapter, Adapter):
            return adapter
    return None


def attached(model: nn.Module) -> Attached | None:
    """The active prefix on `model`, or None; for a copied or unpickled model, whose prefix nobody has in hand."""
    adapter = _adapter_of(model)
    return None if adapter is None else adapter.prefix


def make_adapter(model: nn.Module) -> Adapter:
    """The adapter for `model`, which is the one it has already if there are prefixes on it."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected a torch module")
    model = _inner(model)
    library = _library(model)
    if library is None:
        raise NotImplementedError(
            f"attach does not know the class {type(model).__name__}; it knows models of Hugging Face's transformers "
            "and of timm (of a class that holds one, give that model)"
        )
    adapter = _adapter_of(model)
    if adapter is not None:
        return adapter
    module, cls = ADAPTERS[library]
    made: Adapter = getattr(import_module(f".{module}", __name__), cls)(model, _base(model))
    return made


@overload
def attach(model: nn.Module, config: PrefixConfig, tokenizer: Any = None) -> Prefix: ...


@overload
def attach(model: nn.Module, config: PrefixPlusConfig, tokenizer: Any = None) -> PrefixPlus: ...


@making()
def attach(model: nn.Module, config: PrefixConfig | PrefixPlusConfig, tokenizer: Any = None) -> Prefix | PrefixPlus:
    """Puts a trainable prefix into `model` and freezes the model.

    One token or image is run to see that the prefix reaches the output; otherwise the model is left as it was and
    NotImplementedError says why.

    Args:
        model: A model of transformers whose layers call its attention interface (GPT-2, BART, T5, LLaMA, Mistral,
            Qwen, Gemma, BERT, ViT and others), with or without a head, or a vision transformer of timm. It stays in the
            mode, training or evaluation, it is in. One that has prefixes gets another, which becomes the active one.
        config: The prefix, see `PrefixConfig`; or Prefix-Tuning+, see `PrefixPlusConfig`.
        tokenizer: Turns `config.init` into token ids, if that is a text.

    Returns:
        The prefix; with `config.count` a `PrefixBank`. Its `parameters()` are what an optimizer takes; its `config`
        says also what was left to the model, and its `config.length` is the number of tokens of `config.init`, if that
        is a text or token ids.
    """
    if not isinstance(config, (PrefixConfig, PrefixPlusConfig)):
        raise ValueError(f"config is a {type(config).__name__}, expected a PrefixConfig or a PrefixPlusConfig")
    adapter = make_adapter(model)
    if isinstance(config, PrefixPlusConfig):
        config = adapter.resolve(config)
        plus = PrefixPlus(config, adapter, Memories(config, adapter.geometry)).to(adapter.device)
        adapter.install(plus)
        return plus
    config = adapter.resolve(config)
    activations = None
    if config.init not in INITS:
        ids = _token_ids(config.init, tokenizer)
        config = replace(config, length=len(ids), init=tuple(ids))
        activations = adapter.activations(ids)[list(config.slots(adapter.geometry.kinds))].contiguous()
    encoder = make_encoder(config, adapter.geometry).to(adapter.device)
    initialise(encoder, config, adapter.defaults.bound, activations)
    prefix = Prefix(config, adapter, encoder) if config.count is None else PrefixBank(config, adapter, encoder)
    prefix.to(adapter.device)
    adapter.install(prefix)
    return prefix


@making()
def load(model: nn.Module, folder: str | Path) -> Any:
    """Attaches what is saved in `folder` to `model`: a prefix or bank of `save_pretrained`'s, or a PEFT adapter.

    An unfolded prefix can be trained further, and so can a PEFT adapter (PREFIX_TUNING, CARTRIDGE), whose network PEFT
    does not save: it becomes share="none", and rows that a CARTRIDGE freezes are trained like the others. In layers
    with a sliding window all of the prefix stays in sight, where PEFT's slides out. The model is left as it is if
    anything is wrong with the files or they do not fit it; nothing is ever unpickled.
    """
    adapter = make_adapter(model)
    prefix = read(adapter, folder)
    adapter.install(prefix.to(adapter.device))
    return prefix


def read(adapter: Adapter, folder: str | Path) -> Prefix | PrefixPlus:
    """What is saved in `folder`, for the adapter's model, to which it is not attached yet."""
    from prefixattn import checkpoint, saving  # here, for the sake of installations without safetensors

    folder = Path(folder)
    return saving.whole(folder, checkpoint.STATE, lambda: _read(adapter, folder))


def _read(adapter: Adapter, folder: Path) -> Prefix | PrefixPlus:
    from prefixattn import checkpoint
    from prefixattn.attach import bank_file

    file = folder / bank_file.NAME
    if file.is_file():
        config, rows, lengths = bank_file.read(file, adapter.geometry, mapped=False)
        return PrefixBank(config, adapter, PrefixRows(rows, lengths))
    saved, encoder, gate = checkpoint.read(folder, adapter.geometry, adapter.defaults)
    if isinstance(saved, PrefixPlusConfig):
        assert isinstance(encoder, Memories)
        return PrefixPlus(saved, adapter, encoder)
    prefix = Prefix(saved, adapter, encoder)
    if gate is not None and prefix.gate is not None:
        prefix.gate.data = gate
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
