"""How tensors lie in memory: which axis is outermost, where a packed projection has its queries, keys and values."""

import torch
from torch import Tensor


def empty_like_order(t: Tensor, width: int | None = None) -> Tensor:  # t [B, H, L, D]
    """An empty dense tensor of `t`'s shape, its axes in `t`'s memory order: [B, H, L, D] or [B, L, H, D].

    With a `width` that is its last axis.

    A model that views its packed projection as `x.view(B, L, H, D).transpose(1, 2)` undoes the transpose on the
    output; keeping the order makes that free.
    """
    B, H, L, D = t.shape
    if width is not None:
        D = width
    if t.stride(1) < t.stride(2):
        return torch.empty((B, L, H, D), dtype=t.dtype, device=t.device).transpose(1, 2)
    return torch.empty((B, H, L, D), dtype=t.dtype, device=t.device)


def unit_stride(t: Tensor) -> Tensor:
    """`t` with stride one in its last axis; copies only when it has another."""
    return t if t.stride(-1) == 1 else t.contiguous()


def lse_type(q: Tensor) -> torch.dtype:
    """In which the op keeps lse: what it is rounded by, all weights of its query err by in the backward."""
    return torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32


def unpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # qkv [B, N, 3, H, D]
    """The views q, k, v [B, H, N, D] of a packed projection, or of its gradient."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v
