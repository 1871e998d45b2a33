"""The Triton kernels of the reparameterization and of its fused steps.

Triton itself is imported by the first call that runs.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from prefixattn.kernels.table import INTERPRETED
from prefixattn.reparam import moments8, reference
from prefixattn.reparam.call import Call, Form, Given, Grads, Needs, Results
from prefixattn.reparam.fused_step import Moment
from prefixattn.reparam.moments8 import Moment8
from prefixattn.reparam.reference import hidden_bwd

DTYPES = torch.float32, torch.bfloat16, torch.float16
LAST = 2**31 - 1
INSTALLED = find_spec("triton") is not None


def unsupported(call: Call, needs: Needs) -> list[str]:
    x, dtype, form = call.x, call.dtype, call.form
    reasons = _not_here("x", x)
    for name in ("x", "w1", "b1", "w2", "b2"):
        t = getattr(call, name)
        if t is not None and t.dtype != torch.float32:
            reasons.append(f"{name} is {t.dtype}; needs float32")
    if dtype not in DTYPES:
        reasons.append(f"dtype={dtype}; needs float32, bfloat16 or float16")
    if form.activation not in reference.ACTIVATIONS:
        reasons.append(f'activation="{form.activation}"; needs {", ".join(reference.ACTIVATIONS)}')
    return reasons + _too_large(call.w2, x.shape[1], call.w1.shape[1:])


def fwd(call: Call) -> Results:
    from prefixattn.kernels.launch_reparam import forward

    dtype = torch.float32 if _is_emulated(call.dtype) else call.dtype
    with _on(call.x):
        kv, z = forward(call._replace(dtype=dtype))
    return Results(kv.to(call.dtype), z)


def bwd(call: Call, given: Given, needs: Needs) -> Grads:
    from prefixattn.kernels.launch_reparam import hidden_gradient, matrix_gradient

    x, w2, form, z = call.x, call.w2, call.form, given.z
    dx, dw1, db1, dw2, db2 = (x.new_empty(0) for _ in needs)
    dkv = _emulated(given.dkv)
    with _on(x):
        if needs.w2:
            dw2 = matrix_gradient(dkv, reference.hidden(z, form).contiguous(), w2, form)
        if needs.hidden:
            dh = hidden_gradient(dkv, w2, x.shape[1], form)
            dx, dw1, db1 = hidden_bwd(dh, x, call.w1, z, form, needs)
    if needs.b2:
        db2 = reference.rows_of(dkv.sum(3, keepdim=True, dtype=torch.float32), form, len(x), torch.float32)[:, 0]
    return Grads(dx, dw1, db1, dw2, db2)


def fused_step_unsupported(
    w: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    h: Tensor,
    dy: Tensor,
    form: Form | None = None,
) -> list[str]:
    reasons = _not_here("w", w)
    kept = (torch.float32, torch.bfloat16) if exp_avg_sq is None else (torch.float32, torch.bfloat16, torch.uint8)
    for name, t, dtypes in (
        ("w", w, (torch.float32,)),
        ("exp_avg", exp_avg, kept),
        ("exp_avg_sq", exp_avg_sq, kept),
        ("h", h, (torch.float32,)),
        ("dy", dy, DTYPES),
    ):
        if t is None:
            continue
        if t.dtype not in dtypes:
            reasons.append(f"{name} is {t.dtype}; needs {' or '.join(map(str, dtypes))}")
        if not t.is_contiguous():
            reasons.append(f"{name} has strides {t.stride()}; needs to be contiguous")
    return reasons + _too_large(w, h.shape[1], h.shape[2:])


def fused_adamw(
    w: Tensor,  # [G, O, M], in place
    exp_avg: Moment,  # [G, O, M], in place
    exp_avg_sq: Moment,  # [G, O, M], in place
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or with a form the gradient of kv
    *,
    form: Form | None = None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    want_dh: bool = True,
) -> Tensor | None:
    """AdamW with the gradient grad_scale dy^T h; returns grad_scale dy w, of w as it was, if wanted."""
    from prefixattn.kernels.launch_reparam import adamw

    corrections = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    salt = moments8.salt(step)
    salt -= (salt >= 2**31) * 2**32  # one type for every step
    numbers = (grad_scale, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, *corrections, salt)
    m, scale_m = _split("exp_avg", exp_avg, True)
    v, scale_v = _split("exp_avg_sq", exp_avg_sq, False)
    first, second = _emulated(m), _emulated(v)
    with _on(w):
        dh = adamw(w, first, second, (scale_m, scale_v), h, _emulated(dy), form, numbers, want_dh)
    for t, emulated in ((m, first), (v, second)):
        if emulated is not t:
            t.copy_(emulated)
    return dh


def fused_sgd(
    w: Tensor,  # [G, O, M], in place
    momentum_buffer: Tensor | None,  # [G, O, M], in place
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or with a form the gradient of kv
    *,
    form: Form | None = None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
    grad_scale: float = 1.0,
    want_dh: bool = True,
) -> Tensor | None:
    """SGD with the gradient grad_scale dy^T h; `first`: the buffer holds nothing yet. Returns as fused_adamw."""
    from prefixattn.kernels.launch_reparam import sgd

    numbers = (grad_scale, lr, momentum, 1 - dampening, weight_decay)
    buffer = None if momentum_buffer is None else _emulated(momentum_buffer)
    with _on(w):
        dh = sgd(w, buffer, h, _emulated(dy), form, numbers, nesterov, first, want_dh)
    if momentum_buffer is not None and buffer is not None and buffer is not momentum_buffer:
        momentum_buffer.copy_(buffer)
    return dh


def dh_only(w: Tensor, dy: Tensor, form: Form | None = None) -> Tensor:  # w [G, O, M], dy [G, P, O] or of kv
    """dy w [G, P, M], by one read of w."""
    from prefixattn.kernels.launch_reparam import hidden_gradient

    with _on(w):
        return hidden_gradient(_emulated(dy), w, dy.shape[1 if form is None else 3], form)


def _split(name: str, moment: Moment, signed: bool) -> tuple[Tensor, Tensor | None]:
    """Numbers and None, or codes and scales."""
    if not isinstance(moment, Moment8):
        if moment.dtype == torch.uint8:
            raise ValueError(f"{name} is uint8, expected a Moment8, codes with their scales")
        return moment, None
    expected = [*moment.code.shape[:2], -(-moment.code.shape[2] // moments8.BLOCK)]
    if moment.signed != signed or list(moment.scale.shape) != expected or not moment.scale.is_contiguous():
        found = f"signed={moment.signed} with scales {list(moment.scale.shape)}"
        raise ValueError(f"{name} has {found}, expected signed={signed} with contiguous scales {expected}")
    return moment.code, moment.scale


def _not_here(name: str, t: Tensor) -> list[str]:
    reasons = [] if INSTALLED else ["triton is not installed"]
    if t.device.type != "cuda" and not (INTERPRETED and t.device.type == "cpu"):
        reasons.append(f"{name} is on {t.device.type}; needs cuda (or cpu with TRITON_INTERPRET=1)")
    return reasons


def _too_large(w2: Tensor, P: int, inputs: torch.Size) -> list[str]:
    """Within a network the kernels count in 32 bits."""
    O, M = w2.shape[1:]
    most = max(O * M, P * O, P * M, inputs.numel(), P * inputs[-1])
    return [f"a network has a matrix of {most} numbers; needs fewer than 2**31"] if most > LAST else []


def _is_emulated(dtype: torch.dtype) -> bool:
    """Triton's interpreter gets bfloat16 wrong: there it becomes float32."""
    return INTERPRETED and dtype == torch.bfloat16


def _emulated(t: Tensor) -> Tensor:
    return t.float() if _is_emulated(t.dtype) else t


def _on(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()
