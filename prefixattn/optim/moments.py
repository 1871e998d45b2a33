"""How moments are kept in an optimizer's state: `key` alone, or with 8 bits `key` as codes and `key + "_scale"`."""

from typing import Any

import torch
from torch import Tensor

from prefixattn.optim.source import W2, stacked
from prefixattn.reparam.moments8 import BLOCK, Moment8
from prefixattn.reparam.sweep import Moment, tiles

FORMATS = ("float32", "bfloat16", "8bit")


def moment(key: str, state: dict[str, Any]) -> Moment:
    """The moment as the sweeps take it, [G, O, M]; the tensors themselves, not copies."""
    value = stacked(state[key], W2) if state[key].dim() >= 2 else state[key]
    if value.dtype != torch.uint8:
        return value
    return Moment8(value, stacked(state[key + "_scale"], W2), key == "exp_avg")


def as_format(name: str, key: str, p: Tensor, state: dict[str, Any]) -> None:
    """Brings a moment into a format; "" and "float32" are the parameter's own type."""
    value = state[key]
    if name == "8bit":
        if value.dtype == torch.uint8:
            return
        shape = *p.shape[:-1], -(-p.shape[-1] // BLOCK)
        state[key] = torch.empty(p.shape, dtype=torch.uint8, device=p.device)
        state[key + "_scale"] = torch.empty(shape, dtype=torch.float32, device=p.device)
        made, old = moment(key, state), stacked(value, W2)
        assert isinstance(made, Moment8)
        for g, rows in tiles(old):
            made.encode(g, rows, old[g, rows], int(state["step"]))
        return
    dtype = torch.bfloat16 if name == "bfloat16" else p.dtype
    if value.dtype == torch.uint8:
        old8 = moment(key, state)
        assert isinstance(old8, Moment8)
        state[key] = torch.empty(p.shape, dtype=dtype, device=p.device)
        made = stacked(state[key], W2)
        for g, rows in tiles(made):
            made[g, rows] = old8.decode(g, rows).to(dtype)
        del state[key + "_scale"]
    elif value.dtype != dtype:
        state[key] = value.to(dtype)


def check_moment(name: str, key: str, p: Tensor, state: dict[str, Any]) -> None:
    """ValueError if a saved moment is no moment of this parameter."""
    value = state[key]
    if not isinstance(value, Tensor) or value.shape != p.shape:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key} of {name} has shape {found}, expected {list(p.shape)}")
    if value.dtype == torch.uint8:
        scale, expected = state.get(key + "_scale"), [*p.shape[:-1], -(-p.shape[-1] // BLOCK)]
        if not isinstance(scale, Tensor) or list(scale.shape) != expected:
            found = list(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(f"{key}_scale of {name} has shape {found}, expected {expected}")
        if scale.dtype != torch.float32:
            raise ValueError(f"{key}_scale of {name} is {scale.dtype}, expected torch.float32")
    elif not value.is_floating_point():
        raise ValueError(f"{key} of {name} is {value.dtype}, expected a floating-point type, or uint8 with a scale")
