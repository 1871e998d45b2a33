"""The CPU kernels of csrc/cpu as a backend: torch tensors to addresses and strides, outputs allocated here or given."""

from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

import prefixattn._C as _C
from prefixattn.attention import sinks, widths
from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants, allocated, refused, unknown
from prefixattn.attention.invariance import batch_invariant
from prefixattn.attention.layout import empty_like_order, lse_type
from prefixattn.attention.native import address, attn_fields, strided

if TYPE_CHECKING:
    from prefixattn._C import AttnOnCpu

DTYPES: dict[torch.dtype, int] = {getattr(torch, name): number for name, number in _C.DTYPES.items()}
# every option of Call that the kernels have
KNOWN = (
    *("attn_mask", "sinks", "memory", "prefix_ids", "prefix_lengths", "seed", "dropout_p", "prefix_dropout_p"),
    *("is_causal", "scale", "phi", "softcap", "window_left", "window_right", "prefix_in_window"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "splits_float32"),
)
UNKNOWN = unknown(KNOWN)


def unsupported(call: Call, needs: Needs) -> list[str]:
    q, mask, reasons = call.q, call.attn_mask, refused(call, UNKNOWN)
    if q.device.type != "cpu":
        reasons.append(f"q is on {q.device.type}; needs cpu")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype={q.dtype}; needs float32, bfloat16 or float16")
    D = widths.wider(call)
    if D % _C.HEAD_DIM_STEP or not 0 < D <= _C.MAX_HEAD_DIM:
        reasons.append(f"head_dim={D}; needs a multiple of {_C.HEAD_DIM_STEP} up to {_C.MAX_HEAD_DIM}")
    if mask is not None and mask.dtype not in (torch.bool, q.dtype, torch.float32):
        reasons.append(f"attn_mask has dtype {mask.dtype}; needs bool, {q.dtype} or float32")
    if needs.attn_mask:
        reasons.append("attn_mask requires a gradient, which has the size of the scores; the reference makes it")
    return reasons


@widths.around_fwd
@sinks.around_fwd
def fwd(call: Call, wants: Wants) -> Results:
    q = call.q
    out = empty_like_order(q)
    lse = q.new_empty(q.shape[:3], dtype=lse_type(q))
    mass = q.new_empty(q.shape[:3] if wants.mass else (0,), dtype=torch.float32)
    attended = empty_like_order(q) if wants.attended else q.new_empty(0)
    call = _readable_call(call)
    _C.prefix_attn_fwd({
        **_fields(call),
        "out": strided(out),
        "attended": strided(attended) if wants.attended else None,
        "lse": lse.data_ptr(),
        "mass": mass.data_ptr() if wants.mass else None,
    }, torch.get_num_threads())  # fmt: skip
    return Results(out, lse, mass, attended)


@widths.around_bwd
@sinks.around_bwd
def bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
    grads = allocated(call, needs, into)
    call = _readable_call(call, dout=given.dout, out=given.out)
    dout, out, dlse = _readable(given.dout), given.out, given.dlse
    if needs.softmax:  # else it is not read, and may be empty
        out = _readable(out)
    lse, dlse = given.lse.contiguous(), None if dlse is None else dlse.float().contiguous()
    _C.prefix_attn_bwd({
        **_fields(call),
        "dout": strided(dout),
        "out": strided(out) if out.dim() == 4 else None,
        "lse": lse.data_ptr(),
        "dlse": address(dlse),
        "dq": strided(grads.q) if needs.q else None,
        "dk": strided(grads.k) if needs.k else None,
        "dv": strided(grads.v) if needs.v else None,
        "dprefix_k": strided(grads.prefix_k) if needs.prefix_k else None,
        "dprefix_v": strided(grads.prefix_v) if needs.prefix_v else None,
        "dmemory": strided(grads.memory) if needs.memory else None,
    }, torch.get_num_threads())  # fmt: skip
    return grads


def _fields(call: Call) -> "AttnOnCpu":
    """What both passes hand over."""
    fields = attn_fields(_C, DTYPES[call.q.dtype], call)
    if call.cu_seqlens_q is not None:
        # where no sequence has more than a query, they have a kernel of their own: 2 says that one has
        longest = 2 if batch_invariant() and call.max_seqlen_q == 1 else call.max_seqlen_q
        fields["B"], fields["L"], fields["S"] = len(call.cu_seqlens_q) - 1, longest, call.max_seqlen_k
    return {
        **fields,
        "window_left": call.window_left,
        "window_right": call.window_right,
        "prefix_in_window": call.prefix_in_window,
        "cu_seqlens_q": address(call.cu_seqlens_q),
        "cu_seqlens_k": address(call.cu_seqlens_k),
        "total_q": call.q.shape[2],
        "splits_float32": call.splits_float32,
    }


def _readable_call(call: Call, **others: Tensor) -> Call:
    """The call as the kernels can read it; a refusal if a tensor of it or of `others` has another type or device."""
    memory, ids, lengths, dtype = call.memory, call.prefix_ids, call.prefix_lengths, call.q.dtype
    queries, keys = call.cu_seqlens_q, call.cu_seqlens_k
    tensors = [call.q, call.k, call.v, call.prefix_k, call.prefix_v]
    if memory is not None:
        tensors.append(memory)
    # an exported program, or parts of it, can be moved or cast after its backend was chosen
    if dtype not in DTYPES or not all([t.dtype == dtype and t.is_cpu for t in (*tensors, *others.values())]):
        _refuse(call, others)
    if call.seed is not None and (call.seed.dtype != torch.int64 or not call.seed.is_cpu):
        call = call._replace(seed=call.seed.to("cpu", torch.int64))
    indices = [t for t in (ids, lengths, queries, keys) if t is not None]
    if all([_is_readable(t) for t in tensors]) and all([t.is_contiguous() for t in indices]):
        return call
    return call._replace(
        q=_readable(call.q), k=_readable(call.k), v=_readable(call.v),
        prefix_k=_readable(call.prefix_k), prefix_v=_readable(call.prefix_v),
        memory=None if memory is None else _readable(memory),
        prefix_ids=None if ids is None else ids.contiguous(),
        prefix_lengths=None if lengths is None else lengths.contiguous(),
        cu_seqlens_q=None if queries is None else queries.contiguous(),
        cu_seqlens_k=None if keys is None else keys.contiguous(),
    )  # fmt: skip


def _refuse(call: Call, others: dict[str, Tensor]) -> NoReturn:
    q = call.q
    if q.dtype not in DTYPES:
        raise NotImplementedError(f"the cpu kernels were called with q {q.dtype}; they take float32, bfloat16, float16")
    named = {name: getattr(call, name) for name in ("q", "k", "v", "prefix_k", "prefix_v", "memory")} | others
    name, t = next((n, t) for n, t in named.items() if t is not None and (t.dtype != q.dtype or not t.is_cpu))
    raise NotImplementedError(
        f"the cpu kernels were called with {name} {t.dtype} on {t.device.type}, expected {q.dtype} on cpu"
    )


def _is_readable(t: Tensor) -> bool:
    return t.stride(3) == 1 or t.shape[3] == 1


def _readable(t: Tensor) -> Tensor:
    # gradients arrive in any layout, an expanded scalar's (stride 0) among them
    return t if _is_readable(t) else t.contiguous()
