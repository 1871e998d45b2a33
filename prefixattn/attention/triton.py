"""The Triton kernels of kernels/ as a backend. Triton itself is imported by the first call that runs."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefixattn.attention import sinks, widths
from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants, refused, unknown
from prefixattn.attention.invariance import batch_invariant
from prefixattn.attention.layout import lse_type, unit_stride
from prefixattn.kernels.table import INTERPRETED

if TYPE_CHECKING:
    from prefixattn.kernels.call import Call as KernelCall

DTYPES = torch.float32, torch.bfloat16, torch.float16
MAX_HEAD_DIM = 256
LAST = 2**31 - 1
# how the kinds end that have one compiled in, in this order
MEMORY, SOFTCAP, WINDOW, PACKED = "_memory", "_softcap", "_window", "_packed"
INSTALLED = find_spec("triton") is not None
# every option of Call that the kernels have
KNOWN = (
    *("attn_mask", "sinks", "memory", "prefix_ids", "prefix_lengths", "seed", "dropout_p", "prefix_dropout_p"),
    *("is_causal", "scale", "phi", "softcap", "window_left", "window_right", "prefix_in_window"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
)
UNKNOWN = unknown(KNOWN)


def unsupported(call: Call, needs: Needs) -> list[str]:
    q = call.q
    reasons = refused(call, UNKNOWN)
    if not INSTALLED:
        reasons.append("triton is not installed")
    if q.device.type != "cuda" and not (INTERPRETED and q.device.type == "cpu"):
        reasons.append(f"q is on {q.device.type}; needs cuda (or cpu with TRITON_INTERPRET=1)")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype={q.dtype}; needs float32, bfloat16 or float16")
    D = widths.wider(call)
    if not 1 <= D <= MAX_HEAD_DIM:
        reasons.append(f"head_dim={D}; needs 1 to {MAX_HEAD_DIM}")
    # within a head the kernels count in 32 bits; the gradient of a packed projection has the longest rows
    operands = {"q": q, "k": call.k, "v": call.v, "prefix_k": call.prefix_k, "prefix_v": call.prefix_v}
    for name, t in operands.items():
        if max((t.shape[2] - 1) * t.stride(2), 3 * t.shape[1] * t.shape[2] * D) > LAST:
            reasons.append(f"{name} {list(t.shape)} spans more than 2**31 elements between the rows of one head")
    if (rows_of_q := q.shape[0] * q.shape[1] * q.shape[2]) > LAST:
        reasons.append(f"q has {rows_of_q} rows; needs fewer than 2**31")
    if call.cu_seqlens_q is not None:
        # grids have as many programs for each sequence as the longest one needs
        n, longest = len(call.cu_seqlens_q) - 1, max(call.max_seqlen_q, call.max_seqlen_k)
        longest = min(longest, max(q.shape[2], call.k.shape[2]))
        if (rows := n * q.shape[1] * longest) > LAST:
            reasons.append(f"sequences as long as the longest have {rows} rows; needs fewer than 2**31")
    return reasons


@widths.around_fwd
@sinks.around_fwd
def fwd(call: Call, wants: Wants) -> Results:
    from prefixattn.kernels.launch_fwd import forward

    q = call.q
    with _on(q):
        results = forward(_readable_call(call), wants)
    return results._replace(
        out=results.out.to(q.dtype), lse=results.lse.to(lse_type(q)), attended=results.attended.to(q.dtype)
    )


@widths.around_bwd
@sinks.around_bwd
def bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
    from prefixattn.kernels.launch_bwd import backward

    q, mask, dout = call.q, call.attn_mask, _readable(given.dout)
    # not read, and perhaps empty, if only the memory's gradient is wanted
    out = _readable(given.out) if needs.softmax else dout
    given = Given(dout, None if given.dlse is None else given.dlse.float().contiguous(), out, given.lse.contiguous())
    readable = _readable_call(call)
    emulated = readable.q.dtype != q.dtype
    with _on(q):
        made = backward(readable, given, needs, None if emulated else into)
    grads = Grads(*(t.to(q.dtype) for t in made))
    if emulated and into is not None:
        for buffer, grad, need in zip(into, made, needs, strict=False):
            if need:
                buffer.copy_(grad)
        dq, dk, dv = into
        grads = grads._replace(q=dq, k=dk, v=dv)
    of_mask = q.dtype if mask is None or not needs.attn_mask else mask.dtype
    return grads._replace(attn_mask=made.attn_mask.to(of_mask))


def kind_of_forward(call: Call) -> str:
    """Which kernel a forward pass leads to, for guard.py: "fwd_short", "fwd_fold" or "fwd", and what is compiled in."""
    from prefixattn.kernels.launch_fwd import folds, short_plan

    readable = _readable_call(call)
    kind = "fwd_fold" if folds(readable) else "fwd_short" if short_plan(readable) is not None else "fwd"
    return kind + _compiled_in(readable)


def kind_of_backward(call: Call, needs: Needs) -> str:
    """The same of a backward pass: "bwd_short" or "bwd"."""
    from prefixattn.kernels.launch_bwd import short_plan

    readable = _readable_call(call)
    return ("bwd" if short_plan(readable, needs) is None else "bwd_short") + _compiled_in(readable)


def _compiled_in(call: "KernelCall") -> str:
    memory, softcap = MEMORY if call.memory is not None else "", SOFTCAP if call.softcap else ""
    window, packed = WINDOW if call.window.first is not None else "", PACKED if call.packed is not None else ""
    return memory + softcap + window + packed


def least_batch(device: torch.device, heads: int) -> int:
    """The smallest batch with which samples of so many heads take the short backward."""
    from prefixattn.kernels.table import processors

    return -(-processors(device) // heads)


def _readable_call(call: Call) -> "KernelCall":
    from prefixattn.kernels.any_length import AnyLength
    from prefixattn.kernels.call import Call as KernelCall

    kind = AnyLength if batch_invariant() and call.cu_seqlens_q is not None else KernelCall
    mask, memory, ids, lengths = call.attn_mask, call.memory, call.prefix_ids, call.prefix_lengths
    queries, keys = call.cu_seqlens_q, call.cu_seqlens_k
    return kind(*call)._replace(
        q=_readable(call.q), k=_readable(call.k), v=_readable(call.v),
        prefix_k=_readable(call.prefix_k), prefix_v=_readable(call.prefix_v),
        attn_mask=None if mask is None else _emulated(mask),
        memory=None if memory is None else _emulated(memory).contiguous(),
        prefix_ids=None if ids is None else ids.contiguous(),
        prefix_lengths=None if lengths is None else lengths.contiguous(),
        cu_seqlens_q=None if queries is None else queries.contiguous(),
        cu_seqlens_k=None if keys is None else keys.contiguous(),
    )  # fmt: skip


def _readable(t: Tensor) -> Tensor:
    t = unit_stride(_emulated(t))
    return t if (t.shape[2] - 1) * t.stride(2) <= LAST else t.contiguous()


def _emulated(t: Tensor) -> Tensor:
    """Triton's interpreter gets bfloat16 wrong (it truncates, and multiplies the bits): there it becomes float32."""
    return t.float() if INTERPRETED and t.dtype == torch.bfloat16 else t


def _on(q: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()
