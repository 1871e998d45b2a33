"""From what a caller gives to the call that backends get: every refusal of bad input is here, or in checks.py."""

from typing import Any

import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.attention import sequences as packing
from prefixattn.attention.call import Call, Needs, Wants
from prefixattn.attention.checks import (
    FLOATS,
    as_number,
    check_float,
    check_indices,
    check_probability,
    check_range,
    check_scale,
    check_softcap,
    check_types,
    require_shape,
)
from prefixattn.attention.layout import unit_stride
from prefixattn.attention.precision import splits_float32
from prefixattn.attention.reference import PHIS
from prefixattn.attention.sequences import Sequences
from prefixattn.attention.sinks import check as check_sinks
from prefixattn.attention.windows import bounds
from prefixattn.attention.windows import check as check_window

_NOTHING = Needs()  # made once, for calls that want no gradient


def normal_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    prefix_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    prefix_dropout_p: float,
    memory: Tensor | None,
    phi: str,
    softcap: float | None,
    sinks: Tensor | None,
    window_size: tuple[int, int],
    prefix_in_window: bool,
    return_prefix_mass: bool,
    backend: str,
    sequences: Sequences | None = None,
) -> tuple[Call, Wants, str]:
    """The arguments of prefix_attn, checked, with a backend that takes them.

    With `sequences` q, k and v are theirs, [1, heads, total, D].
    """
    tensors = (q, k, v, prefix_k, prefix_v, attn_mask, memory, prefix_ids, prefix_lengths, sinks)
    check_types(tensors, (dropout_p, prefix_dropout_p, scale, softcap))
    dropout_p, prefix_dropout_p, scale, softcap = map(as_number, (dropout_p, prefix_dropout_p, scale, softcap))
    if autocasts(q):
        q, k, v, prefix_k, prefix_v = autocast(q, k, v, prefix_k, prefix_v)
        memory = None if memory is None else autocast(memory)[0]
        if attn_mask is not None and attn_mask.dtype != torch.float32:
            (attn_mask,) = autocast(attn_mask)
    q, k, v = _one_batch(q, k, v)
    _check_shapes(q, k, v, prefix_k, prefix_v, enable_gqa)
    if memory is not None:
        memory = _normal_memory(memory, prefix_k, q, v.shape[3])
    if sinks is not None:
        check_sinks(sinks, q)
    if not isinstance(phi, str) or phi not in PHIS:
        raise ValueError(f"phi is {phi!r}, expected one of {', '.join(map(repr, PHIS))}")
    if prefix_k.dim() == 3:
        if prefix_ids is not None:
            raise ValueError(
                f"prefix_ids picks prefixes of a bank [T, Hkv, P, D], but prefix_k has shape {list(prefix_k.shape)}"
            )
        prefix_k, prefix_v = prefix_k.unsqueeze(0), prefix_v.unsqueeze(0)
    B, H, L, D = q.shape
    S, T, P = k.shape[2], prefix_k.shape[0], prefix_k.shape[2]
    if sequences is not None:
        sequences = packing.normal(sequences, q, k)
        B, L, S = sequences.number, sequences.max_seqlen_q, sequences.max_seqlen_k
    if prefix_ids is not None:
        check_indices("prefix_ids", prefix_ids, (B,), "[B]", q)
        check_range("prefix_ids", prefix_ids, T - 1, "T", T)
    elif T not in (1, B):
        raise ValueError(f"prefix_k holds T={T} prefixes for B={B} samples; pass prefix_ids to choose among them")
    lengths = None
    if prefix_lengths is not None:
        lengths = _lengths_per_sample(prefix_lengths, prefix_ids, B, T, P, q)
    if attn_mask is not None:
        attn_mask = _normal_mask(attn_mask, B, H, L, S, q)
    check_probability("dropout_p", dropout_p, one=True)
    check_probability("prefix_dropout_p", prefix_dropout_p, one=False)
    dropout_p = 0.0 if dropout_p == 1 else dropout_p  # see _without_softmax
    if scale is None:
        scale = D**-0.5 if D else 1.0
    check_scale(scale, q.dtype)
    check_softcap(softcap, q.dtype)
    check_window(window_size, prefix_in_window)
    is_causal, left, right, in_window = bounds(window_size, prefix_in_window, is_causal, L, S, P)
    seed = None
    if dropout_p or prefix_dropout_p:
        seed = torch.randint(2**62, (1,), device=q.device)

    if torch.compiler.is_compiling():
        q, k, v, prefix_k, prefix_v, memory = anew(q, k, v, prefix_k, prefix_v, memory)
        attn_mask, sinks = anew(attn_mask, sinks)
    q, k, v, prefix_k, prefix_v = map(unit_stride, (q, k, v, prefix_k, prefix_v))
    call = Call(
        q, k, v, prefix_k, prefix_v, attn_mask, sinks, memory, prefix_ids, lengths, seed=seed,
        dropout_p=dropout_p, prefix_dropout_p=prefix_dropout_p, is_causal=is_causal, scale=scale, phi=phi,
        softcap=0.0 if softcap is None else softcap,
        window_left=left, window_right=right, prefix_in_window=in_window,
    )  # fmt: skip
    if sequences is not None:
        call = call._replace(**sequences._asdict())
    needs = _wanted(call)
    chosen = backends.choose(backend, call, needs)
    if chosen == "cpu" and q.dtype == torch.float32 and splits_float32():
        call = call._replace(splits_float32=True)
    return call, Wants(return_prefix_mass, _keeps_attended(memory, needs)), chosen


def autocasts(t: Tensor) -> bool:
    # torch's question has no answer for meta, and raises
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the type of autocast; float64 stays, as for SDPA, and so does what is no float."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [t.to(dtype) if t.dtype in FLOATS[:3] else t for t in tensors]


def anew(*tensors: Any) -> list[Any]:
    """A view of each, for Dynamo: it gives no autograd.Function the same tensor twice.

    And of a tensor that was filled in place, as DeepSeek's keys are, it takes requires_grad for what it was before, so
    that the gradient would be lost (torch 2.15).
    """
    return [None if t is None else t.view_as(t) for t in tensors]


def _wanted(call: Call) -> Needs:
    if not torch.is_grad_enabled():
        return _NOTHING
    return Needs(*[t is not None and t.requires_grad for t in call.differentiable])


def _keeps_attended(memory: Tensor | None, needs: Needs) -> bool:
    """Whether the softmax's own part of out is kept for the backward pass, which cannot take it out of their sum."""
    # who runs an exported program may want other gradients than who made it
    wanted = torch.is_grad_enabled() if torch.compiler.is_exporting() else needs.softmax
    return memory is not None and wanted


def _one_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """A single sample of q, k or v is that of all samples."""
    sizes = [t.shape[0] if t.dim() == 4 else 0 for t in tensors]
    many = [n for n in sizes if n != 1]
    if not many or len(many) == len(sizes):
        return tensors
    return tuple([t.expand(many[0], -1, -1, -1) if n == 1 else t for n, t in zip(sizes, tensors, strict=True)])


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, enable_gqa: bool) -> None:
    for name, t, axes in (("q", q, "B, H, L, D"), ("k", k, "B, Hkv, S, D")):
        if t.dim() != 4:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected 4 axes [{axes}]")
    if prefix_k.dim() not in (3, 4):
        raise ValueError(
            f"prefix_k has shape {list(prefix_k.shape)}, expected [Hkv, P, D], or [B, Hkv, P, D] for one per sample"
        )
    B, H, _, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    require_shape("k", k, B=B, Hkv=Hkv, S=S, D=D)
    Dv = v.shape[3] if v.dim() == 4 else D
    require_shape("v", v, B=B, Hkv=Hkv, S=S, Dv=Dv)
    if Dv == 0 and D:
        raise ValueError(f"v has shape {list(v.shape)}, expected [B={B}, Hkv={Hkv}, S={S}, Dv] with Dv from 1")
    several = {"T": prefix_k.shape[0]} if prefix_k.dim() == 4 else {}
    require_shape("prefix_k", prefix_k, **several, Hkv=Hkv, P=prefix_k.shape[-2], D=D)
    require_shape("prefix_v", prefix_v, **several, Hkv=Hkv, P=prefix_k.shape[-2], Dv=Dv)
    if H != Hkv:
        if not enable_gqa:
            raise ValueError(f"q has H={H} heads and k has Hkv={Hkv}; expected as many, or enable_gqa=True")
        if Hkv == 0 or H % Hkv:
            raise ValueError(f"q has H={H} heads, expected a multiple of the Hkv={Hkv} heads of k")
    check_float("q", q)
    dtype, device = q.dtype, q.device
    for name, t in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if t.dtype != dtype:
            raise ValueError(f"{name} is {t.dtype}, expected {dtype} as q")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, expected {device} as q")


def _normal_memory(memory: Tensor, prefix_k: Tensor, q: Tensor, Dv: int) -> Tensor:
    """[1, H, D, Dv], or [T, H, D, Dv] with the T of the prefixes."""
    H, D = q.shape[1], q.shape[3]
    rows = (prefix_k.shape[0],) if memory.dim() == 4 and prefix_k.dim() == 4 else ()
    if memory.shape != (*rows, H, D, Dv):
        spelled = "".join(f"T={T}, " for T in rows) + f"H={H}, D={D}, Dv={Dv}"
        raise ValueError(f"memory has shape {list(memory.shape)}, expected [{spelled}]")
    if memory.dtype != q.dtype:
        raise ValueError(f"memory is {memory.dtype}, expected {q.dtype} as q")
    if memory.device != q.device:
        raise ValueError(f"memory is on {memory.device}, expected {q.device} as q")
    return unit_stride(memory if memory.dim() == 4 else memory.unsqueeze(0))


def _normal_mask(mask: Tensor, B: int, H: int, L: int, S: int, q: Tensor) -> Tensor:
    """The mask with four axes, each full or 1: backends read it by strides and its gradient has its own size."""
    full = (B, H, L, S)
    got = list(mask.shape)
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask.dim() != 4 or any(m != n and m != 1 for m, n in zip(mask.shape, full, strict=True)):
        raise ValueError(f"attn_mask has shape {got}, expected one that broadcasts to [B={B}, H={H}, L={L}, S={S}]")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        allowed = "bool or float32" if q.dtype == torch.float32 else f"bool, float32 or {q.dtype} as q"
        raise ValueError(f"attn_mask is {mask.dtype}, expected {allowed}")
    if mask.device != q.device:
        raise ValueError(f"attn_mask is on {mask.device}, expected {q.device} as q")
    return mask


def _lengths_per_sample(lengths: Tensor, ids: Tensor | None, B: int, T: int, P: int, q: Tensor) -> Tensor:
    """[T] or [B] to [B]."""
    check_indices("prefix_lengths", lengths, (T, B), "[T] or [B]", q)
    check_range("prefix_lengths", lengths, P, "P", P)
    if ids is not None and lengths.shape[0] == T:
        return lengths[ids]
    return lengths.expand(B).contiguous()
