"""The CPU kernels of csrc/cpu/reparam as a backend: the large matrix there, the small half by torch."""

import torch
from torch import Tensor

import prefixattn._C as _C
from prefixattn.attention.cpu import DTYPES
from prefixattn.reparam import moments8, reference
from prefixattn.reparam.call import Call, Form, Given, Grads, Needs, Results
from prefixattn.reparam.fused_step import Moment
from prefixattn.reparam.moments8 import Moment8
from prefixattn.reparam.reference import hidden_bwd

__all__ = [
    "bwd",
    "dh_only",
    "fused_adamw",
    "fused_sgd",
    "fused_step_unsupported",
    "fwd",
    "hidden_bwd",
    "unsupported",
]

MOMENT_FORMATS: dict[torch.dtype, int] = {getattr(torch, name): number for name, number in _C.MOMENT_FORMATS.items()}


def unsupported(call: Call, needs: Needs) -> list[str]:
    x, dtype = call.x, call.dtype
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device.type}; needs cpu")
    if x.dtype != torch.float32:
        reasons.append(f"the parameters are {x.dtype}; needs float32")
    if dtype not in DTYPES:
        reasons.append(f"dtype={dtype}; needs float32, bfloat16 or float16")
    return reasons


def fwd(call: Call) -> Results:
    _require(unsupported(call, Needs()))
    x, form = call.x, call.form
    with torch.autocast("cpu", enabled=False):
        z = x @ call.w1.mT
        if call.b1 is not None:
            z += call.b1[:, None]
        h = reference.hidden(z, form).contiguous()
    w2, b2 = call.w2.contiguous(), None if call.b2 is None else call.b2.contiguous()
    shape = x.shape[0] * form.layers, 2, form.kv_heads, x.shape[1], form.head_dim
    kv = x.new_empty(shape, dtype=call.dtype)
    sizes = _sizes(w2, h)
    workspace = x.new_empty(_C.reparam_fwd_workspace(sizes))
    _C.reparam_fwd({
        **sizes,
        "h": h.data_ptr(), "w": w2.data_ptr(), "b": _address(b2),
        "form": _layout(form), "dtype": DTYPES[call.dtype],
        "workspace": workspace.data_ptr(), "kv": kv.data_ptr(),
    }, torch.get_num_threads())  # fmt: skip
    return Results(kv, z)


def bwd(call: Call, given: Given, needs: Needs) -> Grads:
    """One read of w2 gives dh; its own gradient is made from the same block of dkv."""
    _require(unsupported(call._replace(dtype=torch.float32), needs))
    x, form, z, dkv = call.x, call.form, given.z, given.dkv
    if dkv.dtype not in DTYPES:
        dkv = dkv.float()
    dkv, w2 = dkv.contiguous(), call.w2.contiguous()
    empty = x.new_empty(0)
    dw2 = torch.empty_like(w2) if needs.w2 else empty
    db2 = w2.new_empty(w2.shape[:2]) if needs.b2 else empty
    dh = torch.empty_like(z) if needs.hidden else None
    if any(needs):
        with torch.autocast("cpu", enabled=False):
            h = reference.hidden(z, form).contiguous() if needs.w2 else None
        sizes = _sizes(w2, z)
        workspace = z.new_empty(_C.reparam_step_workspace(sizes))
        _C.reparam_bwd({
            **sizes,
            "h": _address(h), "dy": dkv.data_ptr(), "form": _layout(form), "dtype": DTYPES[dkv.dtype],
            "w": w2.data_ptr(), "dh": _address(dh), "workspace": workspace.data_ptr(), "grad_scale": 1.0,
            "dw": dw2.data_ptr() if needs.w2 else None, "db": db2.data_ptr() if needs.b2 else None,
        }, torch.get_num_threads())  # fmt: skip
    dx, dw1, db1 = (empty, empty, empty) if dh is None else hidden_bwd(dh, x, call.w1, z, form, needs)
    return Grads(dx, dw1, db1, dw2, db2)


def fused_step_unsupported(
    w: Tensor,  # [G, O, M]
    exp_avg: Tensor | None,  # [G, O, M]; for SGD the momentum buffer
    exp_avg_sq: Tensor | None,  # [G, O, M]; for SGD None
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or with a form the gradient of kv
    form: Form | None = None,
) -> list[str]:
    reasons = []
    for name, t, dtypes in (
        ("w", w, [torch.float32]),
        ("exp_avg", exp_avg, list(MOMENT_FORMATS)[: 2 if exp_avg_sq is None else 3]),
        ("exp_avg_sq", exp_avg_sq, list(MOMENT_FORMATS)),
        ("h", h, [torch.float32]),
        ("dy", dy, [torch.float32] if form is None else list(DTYPES)),
    ):
        if t is None:
            continue
        if t.device.type != "cpu":
            reasons.append(f"{name} is on {t.device.type}; needs cpu")
        if t.dtype not in dtypes:
            reasons.append(f"{name} is {t.dtype}; needs {' or '.join(map(str, dtypes))}")
        if not t.is_contiguous() and name != "h":
            reasons.append(f"{name} is not contiguous: strides {t.stride()}")
    return reasons


def fused_adamw(
    w: Tensor,  # [G, O, M], updated in place
    exp_avg: Moment,  # [G, O, M]
    exp_avg_sq: Moment,  # [G, O, M]
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or with a form the gradient of kv, [N, 2, Hkv, P, D]
    *,
    form: Form | None = None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    want_dh: bool,
) -> Tensor | None:
    _require(_step_objections(w, exp_avg, exp_avg_sq, h, dy, form))
    fields, dh, _keep = _fields(w, h, dy, form, grad_scale, want_dh)
    _C.reparam_adamw({
        **fields,
        "exp_avg": _kept(exp_avg), "exp_avg_sq": _kept(exp_avg_sq),
        "one_minus_beta1": 1 - beta1, "beta2": beta2, "one_minus_beta2": 1 - beta2, "eps": eps,
        "step_size": lr / (1 - beta1**step), "inverse_sqrt_correction2": (1 - beta2**step) ** -0.5,
        "decay": 1 - lr * weight_decay, "salt": moments8.salt(step),
    }, torch.get_num_threads())  # fmt: skip
    return dh


def fused_sgd(
    w: Tensor,  # [G, O, M], updated in place
    momentum_buffer: Tensor | None,  # [G, O, M]
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
    grad_scale: float,
    want_dh: bool,
) -> Tensor | None:
    _require(_step_objections(w, momentum_buffer, None, h, dy, form))
    fields, dh, _keep = _fields(w, h, dy, form, grad_scale, want_dh)
    _C.reparam_sgd({
        **fields,
        "momentum_buffer": _kept(momentum_buffer), "lr": lr, "momentum": momentum,
        "one_minus_dampening": 1 - dampening, "weight_decay": weight_decay, "nesterov": nesterov, "first": first,
    }, torch.get_num_threads())  # fmt: skip
    return dh


def dh_only(w: Tensor, dy: Tensor, form: Form | None = None) -> Tensor:  # w [G, O, M], dy [G, P, O] or of kv
    dh = w.new_empty((w.shape[0], dy.shape[1 if form is None else 3], w.shape[2]))
    _require(_step_objections(w, None, None, dh, dy, form))
    fields, dh_made, _keep = _fields(w, dh, dy, form, 1.0, True)
    assert dh_made is not None
    _C.reparam_dh(fields, torch.get_num_threads())
    return dh_made


def _fields(
    w: Tensor, h: Tensor, dy: Tensor, form: Form | None, grad_scale: float, want_dh: bool
) -> tuple["_C.FusedStep", Tensor | None, tuple[Tensor, Tensor]]:
    """What every fused step hands over, its dh, and what has to live until it is done."""
    h = h.contiguous()
    sizes = _sizes(w, h)
    dh = torch.empty_like(h) if want_dh else None
    workspace = w.new_empty(_C.reparam_step_workspace(sizes))
    fields: _C.FusedStep = {
        **sizes,
        "h": h.data_ptr(), "dy": dy.data_ptr(), "form": None if form is None else _layout(form),
        "dtype": DTYPES[dy.dtype], "w": w.data_ptr(), "dh": _address(dh), "workspace": workspace.data_ptr(),
        "grad_scale": grad_scale,
    }  # fmt: skip
    return fields, dh, (h, workspace)


def _step_objections(
    w: Tensor, exp_avg: Moment | None, exp_avg_sq: Moment | None, h: Tensor, dy: Tensor, form: Form | None
) -> list[str]:
    """What would make the kernels read or write elsewhere than in the tensors."""
    G, O, M = w.shape
    blocks = G, O, -(-M // moments8.BLOCK)
    first, second = (m.code if isinstance(m, Moment8) else m for m in (exp_avg, exp_avg_sq))
    reasons = fused_step_unsupported(w, first, second, h, dy, form)
    for name, m, signed in (("exp_avg", exp_avg, True), ("exp_avg_sq", exp_avg_sq, False)):
        if not isinstance(m, Moment8):
            if m is not None and m.dtype == torch.uint8:
                reasons.append(f"{name} are codes without a scale")
        elif m.signed != signed:
            reasons.append(f"{name} has signed={m.signed}")
        elif m.scale.shape != blocks or m.scale.dtype != torch.float32 or not m.scale.is_contiguous():
            reasons.append(f"the scale of {name} is {m.scale.dtype} {list(m.scale.shape)}, expected {list(blocks)}")
    P = dy.shape[1 if form is None else 3]
    dy_shape: tuple[int, ...] = (G, P, O)
    if form is not None:
        if form.layers * 2 * form.kv_heads * form.head_dim != O:
            reasons.append(f"{form} does not make O={O} numbers a row")
        dy_shape = (G * form.layers, 2, form.kv_heads, P, form.head_dim)
    for name, t, shape in (
        ("exp_avg", first, (G, O, M)),
        ("exp_avg_sq", second, (G, O, M)),
        ("h", h, (G, P, M)),
        ("dy", dy, dy_shape),
    ):
        if t is not None and t.shape != shape:
            reasons.append(f"{name} has shape {list(t.shape)}, expected {list(shape)}")
    return reasons


def _sizes(w: Tensor, h: Tensor) -> "_C.ReparamSizes":
    G, O, M = w.shape
    return {"G": G, "P": h.shape[1], "O": O, "M": M}


def _layout(form: Form) -> "_C.KvForm":
    layers, kv_heads, head_dim, interleaved = form.layout
    return {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "interleaved": interleaved}


def _kept(m: Moment | None) -> "_C.KeptMoment | None":
    if m is None:
        return None
    if isinstance(m, Moment8):
        return {"data": m.code.data_ptr(), "scale": m.scale.data_ptr(), "format": MOMENT_FORMATS[m.code.dtype]}
    return {"data": m.data_ptr(), "scale": None, "format": MOMENT_FORMATS[m.dtype]}


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _require(reasons: list[str]) -> None:
    if reasons:
        raise NotImplementedError("the cpu kernels were called although " + "; ".join(reasons))
