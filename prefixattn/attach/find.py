"""The adapter of a model: the one it has, or one made by what is known of its library."""

import inspect
from importlib import import_module

from torch import nn

from prefixattn.attach.adapter import Adapter
from prefixattn.attach.base import Attached

# Library of the model's class -> module and class that know it. Imported when met: both libraries are optional.
ADAPTERS = {"transformers": ("hf.adapter", "HuggingFaceAdapter"), "timm": ("timm.adapter", "TimmAdapter")}


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


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter of a model that has prefixes; of a copied or unpickled one too."""
    for hook in _base(_inner(model))._forward_pre_hooks.values():
        adapter = getattr(hook, "__self__", None)
        if isinstance(adapter, Adapter):
            return adapter
    return None


def attached(model: nn.Module) -> Attached | None:
    """The active prefix on `model`, or None; for a copied or unpickled model, whose prefix nobody has in hand."""
    adapter = adapter_of(model)
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
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter
    module, cls = ADAPTERS[library]
    made: Adapter = getattr(import_module(f"prefixattn.attach.{module}"), cls)(model, _base(model))
    return made
