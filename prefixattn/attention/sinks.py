"""Attention sinks: a column of the softmax with a constant score and no value, beside what kernels compute.

With lse over the keys alone, all keys together have the weight exp(lse - total) of a softmax whose sum, total, has the
sink too. A backward pass that is given out and total takes them for its own: it needs no sink to be right.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants, allocated
from prefixattn.attention.layout import empty_like_order
from prefixattn.attention.reference import of_memory

Fwd = Callable[[Call, Wants], Results]
Bwd = Callable[..., Grads]  # of call, given, needs, and into or not


def check(sinks: Tensor, q: Tensor) -> None:
    """ValueError for another shape, type or device."""
    H = q.shape[1]
    if sinks.shape != (H,):
        raise ValueError(f"sinks has shape {list(sinks.shape)}, expected [H={H}]")
    if sinks.dtype not in (torch.float32, q.dtype):
        allowed = "float32" if q.dtype == torch.float32 else f"float32 or {q.dtype} as q"
        raise ValueError(f"sinks is {sinks.dtype}, expected {allowed}")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}, expected {q.device} as q")


def around_fwd(plain: Fwd) -> Fwd:
    """A backend's `fwd` for calls with sinks, of one that knows none."""

    @wraps(plain)
    def fwd(call: Call, wants: Wants) -> Results:
        if call.sinks is None:
            return plain(call, wants)
        q, memory = call.q, call.memory
        # a memory is no part of the softmax, whose output alone the sinks make smaller
        found = plain(call._replace(sinks=None, memory=None), wants._replace(attended=False))
        # not logaddexp, whose bits on a CPU depend on how far a number is from the end of its tensor
        total = torch.stack(torch.broadcast_tensors(found.lse, _column(call.sinks, found.lse))).logsumexp(0)
        weight = (found.lse - total).exp()  # [B, H, L], of all keys
        out = found.out.mul_(weight.to(torch.promote_types(q.dtype, torch.float32))[..., None])
        attended = out if wants.attended else found.attended
        if memory is not None:
            wide = out.to(torch.promote_types(q.dtype, torch.float32))
            out = empty_like_order(q).copy_(wide + of_memory(call, wide.dtype))
        return Results(out, total, found.mass.mul_(weight) if wants.mass else found.mass, attended)

    return fwd


def around_bwd(plain: Bwd) -> Bwd:
    """The same of its `bwd`."""

    @wraps(plain)
    def bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
        if call.sinks is None:
            return plain(call, given, needs, into)
        keys, others = call._replace(sinks=None), needs._replace(sinks=False)
        grads = plain(keys, given, others, into) if any(others) else allocated(keys, others, into)
        if not needs.sinks:
            return grads
        lse = given.lse
        delta = (given.out.to(lse.dtype) * given.dout).sum(-1)
        if given.dlse is not None:
            delta = delta - given.dlse
        weight = (_column(call.sinks, lse) - lse).exp()  # [B, H, L], of the sink
        return grads._replace(sinks=-(weight * delta).sum((0, 2)).to(call.sinks.dtype))

    return bwd


def _column(sinks: Tensor, lse: Tensor) -> Tensor:
    """[H, 1], beside lse [B, H, L]."""
    return sinks.to(lse.dtype)[:, None]
