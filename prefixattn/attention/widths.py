"""Values of another width than keys, beside kernels of one width: the narrower are padded with zeros to the wider.

Zeros at the end of q and k add nothing to a score, whose scale is always given. Those at the end of v make columns of
out that are cut off. Prefix dropout numbers columns from the first, so that padding moves none of its draws.
"""

from functools import wraps

import torch
from torch import Tensor

from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants
from prefixattn.attention.layout import empty_like_order
from prefixattn.attention.sinks import Bwd, Fwd


def wider(call: Call) -> int:
    """The width of the kernels that run: of keys or of values."""
    D, Dv = call.q.shape[3], call.v.shape[3]
    return D if D == Dv else max(D, Dv)


def around_fwd(plain: Fwd) -> Fwd:
    """A backend's `fwd` for calls of two widths, of one that knows one."""

    @wraps(plain)
    def fwd(call: Call, wants: Wants) -> Results:
        if call.q.shape[3] == call.v.shape[3]:
            return plain(call, wants)
        found, like, Dv = plain(_of_one_width(call), wants), call.q, call.v.shape[3]
        attended = _cut(found.attended, like, Dv) if wants.attended else found.attended
        return found._replace(out=_cut(found.out, like, Dv), attended=attended)

    return fwd


def around_bwd(plain: Bwd) -> Bwd:
    """The same of its `bwd`."""

    @wraps(plain)
    def bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
        if call.q.shape[3] == call.v.shape[3]:
            return plain(call, given, needs, into)
        W = wider(call)
        out = _padded(given.out, W) if given.out.dim() == 4 else given.out  # empty where it is not read
        found = plain(_of_one_width(call), given._replace(dout=_padded(given.dout, W), out=out), needs)
        named: dict[str, Tensor] = {}
        for i, name in enumerate(("q", "k", "v", "prefix_k", "prefix_v")):
            t, grad = getattr(call, name), getattr(found, name)
            if not getattr(needs, name):
                continue
            if into is not None and i < len(into):
                named[name] = into[i].copy_(grad[..., : t.shape[3]])
            elif i < 3:
                named[name] = _cut(grad, t, t.shape[3])
            else:  # as dense as the op's fake says
                named[name] = grad[..., : t.shape[3]].contiguous()
        if needs.memory and call.memory is not None:
            D, Dv = call.memory.shape[2:]
            named["memory"] = found.memory[..., :D, :Dv].contiguous()
        return found._replace(**named)

    return bwd


def _of_one_width(call: Call) -> Call:
    W, memory = wider(call), call.memory
    if memory is not None:
        D, Dv = memory.shape[2:]
        memory = torch.nn.functional.pad(memory, (0, W - Dv, 0, W - D))
    q, k, v, prefix_k, prefix_v = (_padded(t, W) for t in call[:5])
    return call._replace(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, memory=memory)


def _padded(t: Tensor, width: int) -> Tensor:
    """With zeros behind its last axis, its axes in the same order in memory."""
    D = t.shape[3]
    if D == width:
        return t
    made = empty_like_order(t, width)
    made[..., :D] = t
    made[..., D:] = 0
    return made


def _cut(t: Tensor, like: Tensor, width: int) -> Tensor:
    """The first `width` columns, dense, in the order of `like` in memory."""
    return t if t.shape[3] == width else empty_like_order(like, width).copy_(t[..., :width])
