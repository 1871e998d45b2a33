"""What prefix_attention asks of single arguments; each refusal says what came and what was expected."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
_LARGEST = torch.finfo(torch.float32).max
_LEAST_CAP, _LARGEST_CAP = 2.0**-126, 2.0**126  # float32 holds their inverses too

_TENSORS = "q", "k", "v", "prefix_k", "prefix_v", "attn_mask", "memory", "prefix_ids", "prefix_lengths", "sinks"
_NUMBERS = "dropout_p", "prefix_dropout_p", "scale", "softcap"
_FLAGS = "is_causal", "enable_gqa", "return_lse", "return_prefix_mass"


def check_types(tensors: tuple[object, ...], numbers: tuple[object, ...]) -> None:
    """Tensors: q, k, v, prefix_k, prefix_v, and attn_mask, memory, prefix_ids, prefix_lengths, sinks or None."""
    for i, (name, t) in enumerate(zip(_TENSORS, tensors, strict=True)):
        if t is None and i >= 5:
            continue
        check_tensor(name, t)
    for name, x in zip(_NUMBERS, numbers, strict=True):
        if x is not None or name not in ("scale", "softcap"):
            _check_number(name, x)


def check_flags(*flags: object) -> None:
    """is_causal, enable_gqa, return_lse, return_prefix_mass."""
    for name, flag in zip(_FLAGS, flags, strict=True):
        if not isinstance(flag, (bool, torch.SymBool)):
            raise ValueError(f"{name} is {flag!r:.40}, expected True or False")


def _check_number(name: str, x: object) -> None:
    # a tensor would lose its gradient on the way to a number
    if not isinstance(x, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise ValueError(f"{name} is {(x if isinstance(x, str) else type(x).__name__)!r}, expected a number")
    if isinstance(x, int):
        try:
            float(x)
        except OverflowError:
            raise ValueError(
                f"{name} is an integer of {x.bit_length()} bits, expected a number that a float holds"
            ) from None


def as_number(x: Any) -> Any:
    """A fraction, or another library's number, as a float."""
    return x if x is None or isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) else float(x)


def check_probability(name: str, p: float, *, one: bool) -> None:
    if not (0.0 <= p < 1.0 or (one and p == 1.0)):
        raise ValueError(f"{name} is {p}; expected a probability in [0, 1{']' if one else ')'}")


def check_scale(scale: float, dtype: torch.dtype) -> None:
    if not abs(scale) < math.inf:
        raise ValueError(f"scale is {scale}; expected a finite number")
    if dtype != torch.float64 and abs(scale) > _LARGEST:
        raise ValueError(f"scale is {scale}; expected a finite number in float32, as scores of {dtype} are")


def check_softcap(softcap: float | None, dtype: torch.dtype) -> None:
    if softcap is None:
        return
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected None or a positive number")
    if dtype != torch.float64 and not _LEAST_CAP <= softcap <= _LARGEST_CAP:
        raise ValueError(
            f"softcap is {softcap}; expected {_LEAST_CAP:.3g} to {_LARGEST_CAP:.3g}: scores of {dtype} are float32"
        )


def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} is a {type(t).__name__}, expected a tensor")
    if t.is_nested or t.layout != torch.strided:
        raise NotImplementedError(f"{name} is a nested or sparse tensor, expected a dense one")


def check_float(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} is {t.dtype}, expected float32, bfloat16, float16 or float64")


def require_shape(name: str, t: Tensor, **dims: int) -> None:
    if t.shape != tuple(dims.values()):
        spelled = ", ".join(f"{d}={n}" for d, n in dims.items())
        raise ValueError(f"{name} has shape {list(t.shape)}, expected [{spelled}]")


def check_indices(name: str, t: Tensor, sizes: tuple[int, ...], axes: str, q: Tensor) -> None:
    if t.dim() != 1 or all(t.shape[0] != n for n in sizes):
        wanted = " or ".join(f"[{n}]" for n in dict.fromkeys(sizes))
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {axes}, here {wanted}")
    if t.dtype != torch.int64:
        raise ValueError(f"{name} is {t.dtype}, expected torch.int64")
    if t.device != q.device:
        raise ValueError(f"{name} is on {t.device}, expected {q.device} as q")


def check_range(name: str, t: Tensor, last: int, letter: str, size: int) -> None:
    """0 <= t <= last. On a CPU the error names the value; a GPU and a compiled graph assert without waiting for it."""
    values_known = t.device.type == "cpu" and not torch.compiler.is_compiling() and detect_fake_mode(t) is None
    if values_known:
        bad = ((t < 0) | (t > last)).nonzero()
        if bad.numel():
            i = int(bad[0])
            raise ValueError(f"{name}[{i}] is {int(t[i])}, expected 0 to {last} ({letter}={size})")
    else:
        torch._assert_async(((t >= 0) & (t <= last)).all(), f"{name} has a value outside 0 to {last} ({letter}={size})")
