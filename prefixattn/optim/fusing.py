"""Which parameters torch's fused optimizers take."""

import torch
from torch import Tensor

_FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16


def fusible(p: Tensor, *others: Tensor) -> bool:
    """True if a fused kernel may step p; others are its gradient and state. It makes no tensor of their size."""
    kinds = all(type(t) in (Tensor, torch.nn.Parameter) for t in (p, *others))
    same = all(t.dtype == p.dtype and t.device == p.device and t.stride() == p.stride() for t in others)
    return kinds and same and p.dtype in _FLOATS and p.device.type in ("cpu", "cuda") and p.is_contiguous()
