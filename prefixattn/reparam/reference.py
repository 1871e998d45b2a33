"""The definition of the reparameterization in plain PyTorch, forward and backward; a backend for every type and shape.

G networks, each of n layers; together they make kv, of N = G * n layers:

    z = x @ w1.mT + b1        # [G, P, M]
    y = act(z) @ w2.mT + b2   # [G, P, O], O = n * 2 * Hkv * D
    kv[g * n + i, j, head, p, d] = y.view(G, P, n, 2, Hkv, D)[g, p, i, j, head, d]        # blocked
    kv[g * n + i, j, head, p, d] = y.view(G, P, n, Hkv, D, 2)[g, p, i, head, d, j]        # interleaved

All tensors are contiguous, the parameters of one type.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixattn.reparam.call import Call, Form, Given, Grads, Needs, Results


def _one(z: Tensor) -> Tensor:
    return torch.ones_like(z)


def _tanh_slope(z: Tensor) -> Tensor:
    return 1 - z.tanh().square()


def _relu_slope(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


# the function and its derivative, both of z
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (torch.tanh, _tanh_slope),
    "relu": (torch.relu, _relu_slope),
    "gelu": (F.gelu, _gelu_slope),  # the erf form
    "none": (lambda z: z, _one),
}


def unsupported(call: Call, needs: Needs) -> list[str]:
    return []


def fwd(call: Call) -> Results:
    with torch.autocast(call.x.device.type, enabled=False):
        z = _linear(call.x, call.w1, call.b1)
        y = _linear(hidden(z, call.form), call.w2, call.b2)
        return Results(kv_of(y, call.form, call.dtype), z)


def bwd(call: Call, given: Given, needs: Needs) -> Grads:
    x, z, form = call.x, given.z, call.form
    dx, dw1, db1, dw2, db2 = (x.new_empty(0) for _ in needs)
    with torch.autocast(x.device.type, enabled=False):
        dy = rows_of(given.dkv, form, x.shape[0], z.dtype)
        if needs.w2:
            dw2 = (dy.mT @ hidden(z, form)).to(x.dtype)
        if needs.b2:
            db2 = dy.sum(1).to(x.dtype)
        if needs.hidden:
            dx, dw1, db1 = hidden_bwd(dy @ call.w2.to(z.dtype), x, call.w1, z, form, needs)
    return Grads(dx, dw1, db1, dw2, db2)


def hidden_bwd(
    dh: Tensor,  # [G, P, M], the type of z
    x: Tensor,  # [G, P, E]
    w1: Tensor,  # [G, M, E]
    z: Tensor,  # [G, P, M]
    form: Form,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """The small half of bwd: the gradients of x, w1 and b1 from that of the hidden rows."""
    dx, dw1, db1 = (x.new_empty(0) for _ in range(3))
    with torch.autocast(x.device.type, enabled=False):
        dz = dh * ACTIVATIONS[form.activation][1](z)  # [G, P, M]
        if needs.x:
            dx = (dz @ w1.to(z.dtype)).to(x.dtype)
        if needs.w1:
            dw1 = (dz.mT @ x.to(z.dtype)).to(x.dtype)
        if needs.b1:
            db1 = dz.sum(1).to(x.dtype)
    return dx, dw1, db1


def hidden(z: Tensor, form: Form) -> Tensor:
    """h [G, P, M], of which w2 makes y."""
    return ACTIVATIONS[form.activation][0](z)


def kv_of(y: Tensor, form: Form, dtype: torch.dtype) -> Tensor:  # y [G, P, O]
    """kv [N, 2, Hkv, P, D] that the rows y are, contiguous."""
    kv = kv_view(y, form)
    out = torch.empty(kv.shape, dtype=dtype, device=y.device)
    return out.copy_(kv).flatten(0, 1)


def kv_view(y: Tensor, form: Form) -> Tensor:  # y [G, P, O]
    """y seen as [G, n, 2, Hkv, P, D]."""
    G, P, _ = y.shape
    n, Hkv, D = form.layers, form.kv_heads, form.head_dim
    if form.interleaved:
        return y.view(G, P, n, Hkv, D, 2).permute(0, 2, 5, 3, 1, 4)
    return y.view(G, P, n, 2, Hkv, D).permute(0, 2, 3, 4, 1, 5)


def rows_of(kv: Tensor, form: Form, networks: int, dtype: torch.dtype) -> Tensor:  # kv [N, 2, Hkv, P, D]
    """The rows [G, P, O] that kv is, or their gradient, contiguous: kv_of undone."""
    G, P = networks, kv.shape[3]
    n, Hkv, D = form.layers, form.kv_heads, form.head_dim
    grouped = kv.unflatten(0, (G, n))  # [G, n, 2, Hkv, P, D]
    order = (0, 4, 1, 3, 5, 2) if form.interleaved else (0, 4, 1, 2, 3, 5)
    rows = grouped.permute(order)
    out = torch.empty(rows.shape, dtype=dtype, device=kv.device)
    return out.copy_(rows).view(G, P, n * 2 * Hkv * D)


def as_rows(dy: Tensor, form: Form | None, w: Tensor) -> Tensor:
    """What fused steps take for dy as rows [G, P, O]: without a form it is them, with one the gradient of kv."""
    return dy if form is None else rows_of(dy, form, len(w), w.dtype)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[G, P, I] and [G, J, I] to [G, P, J], in float32 at least."""
    precision = torch.promote_types(rows.dtype, torch.float32)
    out = rows.to(precision) @ weight.to(precision).mT
    return out if bias is None else out + bias.to(precision)[:, None]
