"""The CPU kernels of csrc/cpu as a backend: torch tensors to addresses and strides, outputs allocated here or given."""

import torch
from torch import Tensor

import prefixattn._C as _C
from prefixattn.layout import empty_like_order, lse_type
from prefixattn.reference import Grads, Needs, Results

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of csrc/prefix_attn.h
MASK_NONE, MASK_BOOL, MASK_SAME_AS_Q, MASK_FLOAT32 = range(4)  # enum MaskKind
PHIS = {"none": 0, "elu": 1, "gelu": 2, "relu": 3}  # enum Phi
MAX_HEAD_DIM = 256
ABSENT = 0, 0, 0, 0


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
    if q.device.type != "cpu":
        reasons.append(f"q is on {q.device.type}; needs cpu")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype={q.dtype}; needs float32, bfloat16 or float16")
    D = q.shape[3]
    if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
        reasons.append(f"head_dim={D}; needs a multiple of 8 up to {MAX_HEAD_DIM}")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype, torch.float32):
        reasons.append(f"attn_mask has dtype {attn_mask.dtype}; needs bool, {q.dtype} or float32")
    if needs[5]:
        reasons.append("attn_mask requires a gradient, which has the size of the scores; the reference makes it")
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
    out = empty_like_order(q)
    lse = q.new_empty(q.shape[:3], dtype=lse_type(q))
    mass = q.new_empty(q.shape[:3] if want_mass else (0,), dtype=torch.float32)
    attended = empty_like_order(q) if want_attended else q.new_empty(0)
    _require_type_and_device(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, memory=memory)
    q, k, v, prefix_k, prefix_v = map(_readable, (q, k, v, prefix_k, prefix_v))
    rows, lengths = _indices(rows), _indices(lengths)
    tensors = (q, k, v, prefix_k, prefix_v, attn_mask, memory, rows, lengths, seed)
    common = _common(*tensors, dropout_p, prefix_dropout_p, is_causal, scale, softcap, phi)
    kept = _strided(attended) if want_attended else ABSENT
    _C.prefix_attn_fwd(common, _strided(out), kept, lse.data_ptr(), mass.data_ptr() if want_mass else 0)
    return out, lse, mass, attended


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
    into: tuple[Tensor, Tensor, Tensor] | None = None,  # where dq, dk and dv are to be written
) -> Grads:
    empty = q.new_empty(0)
    inputs = (q, k, v, prefix_k, prefix_v)
    if into is None:
        grads = [empty_like_order(t) if need else empty for t, need in zip(inputs[:3], needs, strict=False)]
    else:
        grads = [t if need else empty for t, need in zip(into, needs, strict=False)]
    # dense, whatever the prefix's own order: as the op's fake and the reference make them
    grads += [t.new_empty(t.shape) if need else empty for t, need in zip(inputs[3:], needs[3:5], strict=True)]
    dmemory = memory.new_empty(memory.shape) if memory is not None and needs[6] else empty
    _require_type_and_device(q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, memory=memory, dout=dout, out=out)
    q, k, v, prefix_k, prefix_v, dout = map(_readable, (*inputs, dout))
    if any(needs[:6]):  # else it is not read, and may be empty
        out = _readable(out)
    rows, lengths = _indices(rows), _indices(lengths)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.float().contiguous()
    tensors = (q, k, v, prefix_k, prefix_v, attn_mask, memory, rows, lengths, seed)
    common = _common(*tensors, dropout_p, prefix_dropout_p, is_causal, scale, softcap, phi)
    wanted = tuple(
        _strided(g) if need else ABSENT for g, need in zip((*grads, dmemory), (*needs[:5], needs[6]), strict=True)
    )
    given = _strided(out) if out.dim() == 4 else ABSENT
    _C.prefix_attn_bwd(common, _strided(dout), given, lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(), wanted)
    dq, dk, dv, dprefix_k, dprefix_v = grads
    return dq, dk, dv, dprefix_k, dprefix_v, empty, dmemory


def _require_type_and_device(q: Tensor, **others: Tensor | None) -> None:
    """An exported program, or parts of it, can be moved or cast after its backend was chosen."""
    if q.dtype not in DTYPES:
        raise NotImplementedError(f"the cpu kernels were called with q {q.dtype}; they take float32, bfloat16, float16")
    for name, t in {"q": q, **others}.items():
        if t is not None and (t.dtype != q.dtype or t.device.type != "cpu"):
            raise NotImplementedError(
                f"the cpu kernels were called with {name} {t.dtype} on {t.device.type}, expected {q.dtype} on cpu"
            )


def _readable(t: Tensor) -> Tensor:
    # gradients arrive in any layout, an expanded scalar's (stride 0) among them
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _indices(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _strided(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def _common(
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
    dropout_p: float,
    prefix_dropout_p: float,
    is_causal: bool,
    scale: float,
    softcap: float,
    phi: str,
) -> tuple[object, ...]:
    """What both passes hand over, in the order of Common::read in csrc/bindings.cpp."""
    B, H, L, D = q.shape
    T, Hkv, P, _ = prefix_k.shape
    kind, mask, mask_strides = MASK_NONE, 0, [0, 0, 0, 0]
    if attn_mask is not None:
        kind = {torch.bool: MASK_BOOL, q.dtype: MASK_SAME_AS_Q}.get(attn_mask.dtype, MASK_FLOAT32)
        mask = attn_mask.data_ptr()
        mask_strides = [s if n > 1 else 0 for s, n in zip(attn_mask.stride(), attn_mask.shape, strict=True)]
    return (
        DTYPES[q.dtype],
        *(B, H, Hkv, L, k.shape[2], T, P, D),
        *map(_strided, (q, k, v, prefix_k, prefix_v)),
        *((ABSENT, 0) if memory is None else (_strided(_readable(memory)), memory.shape[0])),
        PHIS[phi],
        0 if rows is None else rows.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        *(kind, (mask, *mask_strides[:3]), mask_strides[3]),
        *(scale, softcap, is_causal, dropout_p, prefix_dropout_p),
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
        torch.get_num_threads(),
    )
