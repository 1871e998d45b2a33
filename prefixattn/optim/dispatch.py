"""What steps a parameter: which backend has the fused step of a large matrix, and whether torch's takes another."""

from types import ModuleType

import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.reparam import fused_step as reference
from prefixattn.reparam.call import Form
from prefixattn.reparam.moments8 import Moment8

_FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16


def choose(
    backend: str, w: Tensor, first: object, second: object, h: Tensor, dy: Tensor, form: Form | None = None
) -> ModuleType:
    """The module whose fused step takes these: the first of the table without an objection, or the one named.

    `first` and `second` are moments of AdamW; of SGD the buffer and None. NotImplementedError has every objection.
    """
    moments = [m.code if isinstance(m, Moment8) else m for m in (first, second)]
    row = backends.pick(backends.REPARAM, backend, _objections, _words, w, *moments, h, dy, form)
    return _module(row)


def _module(row: backends.Row) -> ModuleType:
    return reference if row.name == "reference" else backends.module(row.name, row.op)


def _objections(row: backends.Row, *args: object) -> list[str]:
    try:
        module = _module(row)
    except NotImplementedError as error:
        return [str(error)]
    if not hasattr(module, "fused_step_unsupported"):
        return ["it has no fused step"]
    reasons: list[str] = module.fused_step_unsupported(*args)
    return reasons


def _words(w: Tensor, *_: object) -> str:
    return backends.sizes_of("w", w)


def fusible(p: Tensor, *others: Tensor) -> bool:
    """True if a fused kernel may step p; others are its gradient and state. It makes no tensor of their size."""
    kinds = all(type(t) in (Tensor, torch.nn.Parameter) for t in (p, *others))
    same = all(t.dtype == p.dtype and t.device == p.device and t.stride() == p.stride() for t in others)
    return kinds and same and p.dtype in _FLOATS and p.device.type in ("cpu", "cuda") and p.is_contiguous()
