"""The Triton kernels of kernels/ as a backend. Triton itself is imported by the first call that runs."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefixattn.kernels.table import INTERPRETED
from prefixattn.layout import lse_type, unit_stride
from prefixattn.reference import Grads, Needs, Results

if TYPE_CHECKING:
    from prefixattn.kernels.call import Call

DTYPES = torch.float32, torch.bfloat16, torch.float16
MAX_HEAD_DIM = 256
LAST = 2**31 - 1
MEMORY, SOFTCAP = "_memory", "_softcap"  # how the kinds end that have one compiled in, in this order
INSTALLED = find_spec("triton") is not None


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    memory: Tensor | None,
    rows: Tensor | None,
    lengths: Tensor | None,
    dropout_p: float,
    prefix_dropout_p: float,
    is_causal: bool,
    softcap: float,
    needs: Needs,
) -> list[str]:
    reasons = []
    if not INSTALLED:
        reasons.append("triton is not installed")
    if q.device.type != "cuda" and not (INTERPRETED and q.device.type == "cpu"):
        reasons.append(f"q is on {q.device.type}; needs cuda (or cpu with TRITON_INTERPRET=1)")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype={q.dtype}; needs float32, bfloat16 or float16")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        reasons.append(f"head_dim={q.shape[3]}; needs 1 to {MAX_HEAD_DIM}")
    # within a head the kernels count in 32 bits; the gradient of a packed projection has the longest rows
    for name, t in {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}.items():
        if max((t.shape[2] - 1) * t.stride(2), 3 * t.shape[1] * t.shape[2] * t.shape[3]) > LAST:
            reasons.append(f"{name} {list(t.shape)} spans more than 2**31 elements between the rows of one head")
    if (rows_of_q := q.shape[0] * q.shape[1] * q.shape[2]) > LAST:
        reasons.append(f"q has {rows_of_q} rows; needs fewer than 2**31")
    return reasons


def fwd(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, D]
    prefix_k: Tensor,  # [T, Hkv, P, D]
    prefix_v: Tensor,  # [T, Hkv, P, D]
    attn_mask: Tensor | None,  # [B or 1, H or 1, L or 1, S or 1]
    memory: Tensor | None,  # [1 or T, H, D, D]
    rows: Tensor | None,  # [B]
    lengths: Tensor | None,  # [B]
    seed: Tensor | None,  # [1]
    dropout_p: float,
    prefix_dropout_p: float,
    is_causal: bool,
    scale: float,
    phi: str,
    softcap: float,
    want_mass: bool,
    want_attended: bool,
) -> Results:
    from prefixattn.kernels.launch_fwd import forward

    tensors = (q, k, v, prefix_k, prefix_v, attn_mask, memory, rows, lengths, seed)
    call = _call(*tensors, (dropout_p, prefix_dropout_p, is_causal, scale, phi, softcap))
    with _on(q):
        out, lse, mass, attended = forward(call, want_mass, want_attended)
    return out.to(q.dtype), lse.to(lse_type(q)), mass, attended.to(q.dtype)


def bwd(
    dout: Tensor,  # [B, H, L, D]
    dlse: Tensor | None,  # [B, H, L]
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, D]
    prefix_k: Tensor,  # [T, Hkv, P, D]
    prefix_v: Tensor,  # [T, Hkv, P, D]
    attn_mask: Tensor | None,  # [B or 1, H or 1, L or 1, S or 1]
    memory: Tensor | None,  # [1 or T, H, D, D]
    rows: Tensor | None,  # [B]
    lengths: Tensor | None,  # [B]
    seed: Tensor | None,  # [1]
    out: Tensor,  # [B, H, L, D]; with a memory, without its part
    lse: Tensor,  # [B, H, L], of lse_type
    dropout_p: float,
    prefix_dropout_p: float,
    is_causal: bool,
    scale: float,
    phi: str,
    softcap: float,
    needs: Needs,
    into: tuple[Tensor, Tensor, Tensor] | None = None,  # buffers for dq, dk and dv
) -> Grads:
    from prefixattn.kernels.launch_bwd import Given, backward

    tensors = (q, k, v, prefix_k, prefix_v, attn_mask, memory, rows, lengths, seed)
    call = _call(*tensors, (dropout_p, prefix_dropout_p, is_causal, scale, phi, softcap))
    # not read, and perhaps empty, if only the memory's gradient is wanted
    out = _readable(out) if any(needs[:6]) else dout
    given = Given(out, lse.contiguous(), _readable(dout), None if dlse is None else dlse.float().contiguous())
    emulated = call.q.dtype != q.dtype
    with _on(q):
        grads = backward(call, given, needs, None if emulated else into)
    if emulated and into is not None:
        for buffer, grad, need in zip(into, grads, needs, strict=False):
            if need:
                buffer.copy_(grad)
        grads = grads._replace(dq=into[0], dk=into[1], dv=into[2])
    *inputs, dmask, dmemory = (t.to(q.dtype) for t in grads)
    dmask = grads.dmask if attn_mask is None or not needs[5] else grads.dmask.to(attn_mask.dtype)
    dq, dk, dv, dprefix_k, dprefix_v = inputs
    return dq, dk, dv, dprefix_k, dprefix_v, dmask, dmemory


def kind_of_forward(q: Tensor, *inputs: Any) -> str:
    """Which kernel fwd's inputs lead to, for guard.py: "fwd_short", "fwd_fold" or "fwd", and what is compiled in."""
    from prefixattn.kernels.launch_fwd import folds, short_plan

    call = _call(q, *inputs[:9], inputs[9:15])  # type: ignore[call-arg]
    kind = "fwd_fold" if folds(call) else "fwd_short" if short_plan(call) is not None else "fwd"
    return kind + _compiled_in(call)


def kind_of_backward(dout: Tensor, dlse: Tensor | None, *inputs: Any) -> str:
    """The same of bwd's inputs: "bwd_short" or "bwd"."""
    from prefixattn.kernels.launch_bwd import short_plan

    call = _call(*inputs[:10], inputs[12:18])  # type: ignore[call-arg]
    kind = "bwd" if short_plan(call, inputs[18]) is None else "bwd_short"
    return kind + _compiled_in(call)


def _compiled_in(call: "Call") -> str:
    return (MEMORY if call.memory is not None else "") + (SOFTCAP if call.softcap is not None else "")


def least_batch(device: torch.device, heads: int) -> int:
    """The smallest batch with which samples of so many heads take the short backward."""
    from prefixattn.kernels.table import processors

    return -(-processors(device) // heads)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    memory: Tensor | None,
    rows: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    numbers: tuple[float, float, bool, float, str, float],
) -> "Call":
    from prefixattn.kernels.call import Call

    mask = _emulated(attn_mask) if attn_mask is not None else None
    rows, lengths = (None if t is None else t.contiguous() for t in (rows, lengths))
    inputs = map(_readable, (q, k, v, prefix_k, prefix_v))
    memory = None if memory is None else _emulated(memory).contiguous()
    *drops, is_causal, scale, phi, softcap = numbers
    others = (mask, rows, lengths, seed)
    return Call(*inputs, *others, *drops, is_causal, scale, memory, phi, softcap or None)  # type: ignore[call-arg, arg-type]


def _readable(t: Tensor) -> Tensor:
    t = unit_stride(_emulated(t))
    return t if (t.shape[2] - 1) * t.stride(2) <= LAST else t.contiguous()


def _emulated(t: Tensor) -> Tensor:
    """Triton's interpreter gets bfloat16 wrong (it truncates, and multiplies the bits): there it becomes float32."""
    return t.float() if INTERPRETED and t.dtype == torch.bfloat16 else t


def _on(q: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()
