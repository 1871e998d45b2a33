"""Copies of a prefix, and how to tell one that an average of its model left behind.

A copy of a model has a copy of its prefix. What averages models (timm's ModelEmaV3, torch's AveragedModel) copies one
and then writes to the copy's parameters and buffers, among which no prefix is.
"""

import copy
import warnings
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)  # an Attached
SAMPLE = 1024  # numbers of a parameter that are looked at, for some writers leave no trace in its version

ADVICE = (
    "what averages a model's parameters does not see the prefix's. Average the prefix, for example with "
    "ModelEmaV3(prefix) or AveragedModel(prefix), and call activate() on the averaged copy, which attends in the same "
    "model, or give its state_dict() to attached(copy).load_state_dict(); if the copy's prefix is meant to stay as it "
    "is, call attached(copy).activate()"
)


class Origin:
    """Of a prefix that was copied with its model: the original, and what both were like then."""

    def __init__(self, original: nn.Module, copied: nn.Module) -> None:
        self.original = weakref.ref(original)
        self.then = _traces(original)
        self.copied = _traces(copied)
        self.warned = False

    def check(self, copied: nn.Module, model: nn.Module) -> bool:
        """Refuses a forward pass of a copy that was left behind, or warns. False: there is nothing more to check."""
        if _changed(self.copied, copied):
            return False  # it has a life of its own
        original = self.original()
        trained, written = original is not None and _changed(self.then, original), _written(model)
        kind = type(copied).__name__
        if trained and written:
            raise ValueError(
                f"the weights of this copy of a model were averaged or loaded, and its {kind} still is what it was "
                f"when the model was copied, while the original was trained on: {ADVICE}"
            )
        # a copy may be meant to stay as it is, as a teacher or the best so far
        if (trained or (original is None and written)) and not self.warned:
            warnings.warn(f"the {kind} of this copy of a model still is what it was then: {ADVICE}", stacklevel=2)
            self.warned = True
        return original is not None


def copied(prefix: Module, memo: dict[int, Any]) -> Module:
    """A deep copy: of a prefix alone it is on the same model, without being among those that `detach` waits for."""
    adapter: Any = prefix._adapter
    alone = adapter is not None and id(adapter) not in memo and id(adapter.model) not in memo
    made: Any = type(prefix).__new__(type(prefix))
    memo[id(prefix)] = made
    if alone:
        memo[id(adapter)] = adapter
    try:
        made.__setstate__(copy.deepcopy(prefix.__getstate__(), memo))
    finally:
        if alone:
            del memo[id(adapter)]  # the model itself may follow
    if adapter is not None and not alone:
        made._origin = Origin(prefix, made)
    result: Module = made
    return result


def _traces(prefix: nn.Module) -> list[tuple[int, Tensor]]:
    return [(-1 if t.is_inference() else t._version, _sample(t).clone()) for t in prefix.parameters()]


def _sample(t: Tensor) -> Tensor:
    return t.detach().reshape(-1)[:SAMPLE]


def _changed(then: list[tuple[int, Tensor]], prefix: nn.Module) -> bool:
    now = list(prefix.parameters())
    if len(now) != len(then):
        return True
    for t, (version, sample) in zip(now, then, strict=True):
        if not t.is_inference() and t._version != version:
            return True
        if t.device.type != "meta" and not torch.equal(_sample(t).to(sample.device), sample):
            return True
    return False


def _written(model: nn.Module) -> bool:
    """True if frozen weights of a copy, which begins at version 0, were written to."""
    return any(p._version > 0 for p in model.parameters() if not p.requires_grad and not p.is_inference())
