"""Frozen weights that were quantised by bitsandbytes, on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_FLAG = "support_avx512bf16_for_cpu"


def keep_differentiable(model: nn.Module) -> list[nn.Module]:
    """Stops 4-bit layers from repacking their weights, which they do where no gradient is wanted at the moment.

    Repacked layers have no backward, without an error: a prefix would train with wrong gradients after the first
    generation. Returns the layers changed.
    """
    found: list[Any] = [module for module in model.modules() if module.__dict__.get(_FLAG)]
    for module in found:
        module.__dict__[_FLAG] = False
        module.state_dict()  # unpacks what was repacked before
    return found


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, no pass repacks weights: what is unpacked and repacked computes something else (bitsandbytes 0.50.2)."""
    kept = keep_differentiable(model)
    try:
        yield
    finally:
        restore(kept)


def restore(modules: list[nn.Module]) -> None:
    for module in modules:
        module.__dict__[_FLAG] = True
