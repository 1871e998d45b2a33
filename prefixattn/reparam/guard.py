"""What "auto" takes on a GPU for the reparameterization and its fused steps: the Triton kernels, once tried.

As attention/guard.py does for attention: each kind of kernel is compared with the reference at its first use on a
device and for a type. Where it disagrees the reference takes over for the rest of the process, with a warning.
"""

from typing import Any

import torch
from torch import Tensor

from prefixattn.reparam import fused_step, reference, triton
from prefixattn.reparam.call import Call, Form, Given, Grads, Needs, Results
from prefixattn.reparam.fused_step import Moment
from prefixattn.reparam.moments8 import BLOCK, Moment8
from prefixattn.trials import Pairs, Trials, close, device_name

Case = tuple[str, torch.device, torch.dtype]  # kind; device; type of kv or of moments (8 bits: float32)
_KV_TYPES = torch.bfloat16, torch.float16, torch.float32
_MOMENTS = torch.bfloat16, torch.float32
_WIDE = (torch.float32,)
KINDS = {"fwd": _KV_TYPES, "bwd": _KV_TYPES, "adamw": _MOMENTS, "adamw8": _WIDE, "sgd": _MOMENTS, "dh": _WIDE}
_LENGTHS = 5, 40  # P: less than a tile of rows, and more
_FORM = Form(2, 2, 16, False, "tanh")


def unsupported(call: Call, needs: Needs) -> list[str]:
    return _on_a_gpu(call.x, triton.unsupported(call, needs))


def fused_step_unsupported(w: Tensor, *args: Any) -> list[str]:
    return _on_a_gpu(w, triton.fused_step_unsupported(w, *args))


def _on_a_gpu(t: Tensor, reasons: list[str]) -> list[str]:
    return reasons if reasons or t.device.type == "cuda" else ["Triton's interpreter is for tests"]


def fwd(call: Call) -> Results:
    return (triton if trials.trusted(("fwd", call.x.device, call.dtype)) else reference).fwd(call)


def bwd(call: Call, given: Given, needs: Needs) -> Grads:
    dkv = given.dkv
    return (triton if trials.trusted(("bwd", dkv.device, dkv.dtype)) else reference).bwd(call, given, needs)


def fused_adamw(w: Tensor, exp_avg: Moment, exp_avg_sq: Moment, *args: Any, **numbers: Any) -> Tensor | None:
    if isinstance(exp_avg, Moment8) or isinstance(exp_avg_sq, Moment8):
        case = "adamw8", w.device, torch.float32
    else:
        case = "adamw", w.device, exp_avg.dtype
    module = triton if trials.trusted(case) else fused_step
    return module.fused_adamw(w, exp_avg, exp_avg_sq, *args, **numbers)


def fused_sgd(w: Tensor, momentum_buffer: Tensor | None, *args: Any, **numbers: Any) -> Tensor | None:
    dtype = torch.float32 if momentum_buffer is None else momentum_buffer.dtype
    module = triton if trials.trusted(("sgd", w.device, dtype)) else fused_step
    return module.fused_sgd(w, momentum_buffer, *args, **numbers)


def dh_only(w: Tensor, dy: Tensor, form: Form | None = None) -> Tensor:
    return (triton if trials.trusted(("dh", w.device, w.dtype)) else fused_step).dh_only(w, dy, form)


def _lost(kind: str, device: torch.device, dtype: torch.dtype) -> str:
    return f"the triton kernels of the reparameterization fail ({kind}) for {dtype} on {device_name(device)}"


def _agree(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    if a.dtype == torch.uint8:  # codes at an edge of their rounding may differ; rounded by other coins, many would
        return bool((a != b).float().mean() < 0.01)
    return close(a, b, dtype)


def _pairs(kind: str, device: torch.device, dtype: torch.dtype) -> Pairs:
    for P in _LENGTHS:
        found, expected = (_run(module, kind, P, device, dtype) for module in (triton, None))
        yield from ((label, found[label], right) for label, right in expected.items())


trials = Trials(lambda *case: _pairs(*case), _lost, _agree)


def _eight(values: Tensor, signed: bool) -> Moment8:
    G, O, M = values.shape
    made = Moment8(torch.empty_like(values, dtype=torch.uint8), values.new_empty(G, O, -(-M // BLOCK)), signed)
    for g in range(G):
        made.encode(g, slice(0, O), values[g], 1)
    return made


def _run(module: Any, kind: str, P: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Named results of a tiny case, by the kernels or, for None, by the reference."""
    G, E, M, O = 2, 40, 300 if kind == "adamw8" else 48, _FORM.layers * 2 * _FORM.kv_heads * _FORM.head_dim
    form = _FORM._replace(interleaved=P != _LENGTHS[0])
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(device)

    x, w1, w2, b1, b2 = normal(G, P, E), normal(G, M, E) / 6, normal(G, O, M) / 7, normal(G, M), normal(G, O)
    dkv = normal(G * _FORM.layers, 2, _FORM.kv_heads, P, _FORM.head_dim).to(dtype)
    h, dy = normal(G, P, M), normal(G, P, O)
    first, second = normal(G, O, M).to(dtype), normal(G, O, M).square().to(dtype)
    network, optimizer = module or reference, module or fused_step
    if kind == "fwd":
        found: dict[str, Tensor] = network.fwd(Call(x, w1, b1, w2, b2, form, dtype))._asdict()
        return found
    if kind == "bwd":
        every = Needs(x=True, w1=True, b1=True, w2=True, b2=True)
        call = Call(x, w1, None, w2, None, form, dtype)
        grads = network.bwd(call, Given(dkv, b1[:, None] + h), every)
        return {"d" + name: grad for name, grad in grads._asdict().items()}
    if kind == "dh":
        return {"dh": optimizer.dh_only(w2, dy), "dh of kv": optimizer.dh_only(w2, dkv, form)}
    numbers = {"lr": 1e-2, "weight_decay": 0.1, "grad_scale": 0.5, "want_dh": True}
    more: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 3}
    if kind == "adamw8":
        m, v = _eight(first, True), _eight(second, False)
        dh = optimizer.fused_adamw(w2, m, v, h, dkv, form=form, **numbers, **more)
        return {"w": w2, "m": m.code, "scale of m": m.scale, "v": v.code, "scale of v": v.scale, "dh": dh}
    if kind == "adamw":
        dh = optimizer.fused_adamw(w2, first, second, h, dkv, form=form, **numbers, **more)
        return {"w": w2, "exp_avg": first, "exp_avg_sq": second, "dh": dh}
    more = {"momentum": 0.9, "dampening": 0.1, "nesterov": False, "first": False}
    dh = optimizer.fused_sgd(w2, first, h, dkv, form=form, **numbers, **more)
    return {"w": w2, "momentum_buffer": first, "dh": dh}
