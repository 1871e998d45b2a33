"""prefix_attention and its packed form: what a call means, in words and shapes; every refusal of bad input is here."""

from typing import Any

import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.attention.call import Call, Needs, Wants
from prefixattn.attention.checks import (
    FLOATS,
    as_number,
    check_flags,
    check_float,
    check_indices,
    check_probability,
    check_range,
    check_scale,
    check_softcap,
    check_tensor,
    check_types,
    require_shape,
)
from prefixattn.attention.layout import unit_stride, unpacked
from prefixattn.attention.ops import prefix_attn, prefix_attn_qkvpacked
from prefixattn.attention.reference import PHIS
from prefixattn.attention.sinks import check as check_sinks
from prefixattn.attention.windows import bounds
from prefixattn.attention.windows import check as check_window

_NOTHING = Needs()  # made once, for calls that want no gradient


def prefix_attention(
    q: Tensor,  # [B, H, L, D], or without B in q, k and v
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, D]
    prefix_k: Tensor,  # [Hkv, P, D] shared | [B, Hkv, P, D] one per sample | [T, Hkv, P, D] a bank, with prefix_ids
    prefix_v: Tensor,  # as prefix_k
    attn_mask: Tensor | None = None,  # broadcastable to [B, H, L, S]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    prefix_ids: Tensor | None = None,  # int64 [B]
    prefix_lengths: Tensor | None = None,  # int64 [T] or [B]
    prefix_dropout_p: float = 0.0,
    memory: Tensor | None = None,  # [H, D, D] shared | [B, H, D, D] or, with prefix_ids, [T, H, D, D]
    phi: str = "elu",
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [H]
    window_size: tuple[int, int] = (-1, -1),
    prefix_in_window: bool = False,
    return_lse: bool = False,
    return_prefix_mass: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # [B, H, L, D], then lse and mass [B, H, L] if asked for
    """Attention over the keys and, ahead of them, a learned prefix that every query sees.

    Equal to ``scaled_dot_product_attention(q, cat(prefix_k, k), cat(prefix_v, v))`` without the two copies and
    without expanding the prefix over the batch.

    q, k and v have one number of samples, or some of them one sample for all; without that axis the results lack it
    too. v has the width D of q and k. Hidden keys (by a mask, by causality, past prefix_lengths) have the weight zero
    and never reach lse and mass, whatever they hold. But zero times nan or inf is nan, as in SDPA: what a mask or
    causality hides should be finite, or out and the gradients may not be. Rows past prefix_lengths may hold anything.

    Args:
        attn_mask: As in SDPA (bool: True attends; float: added, in the type of q or float32), for the own keys only.
            Read through its strides; gets a gradient if float. A float of -1e37 or less (float32's and bfloat16's
            `finfo.min`) hides its key as -inf does. A query that sees no own key attends to the prefix alone; with no
            prefix either its output is zero and its lse -inf.
        dropout_p: Dropout on the softmax weights; lse and mass are those before it. With 1 out has no softmax's part.
        is_causal: Own key s is visible to query l iff ``s <= l + S - L``. May be combined with attn_mask.
        scale: Defaults to ``D ** -0.5``; finite, in float32's range but for float64.
        enable_gqa: Allows H to be a multiple of Hkv; query head h reads key head ``h // (H // Hkv)``.
        prefix_ids: Which prefix of the bank each sample has.
        prefix_lengths: Rows of a prefix past its length are ignored. With prefix_ids a tensor of length T belongs to
            the bank's prefixes (also where T equals B), one of length B to the samples.
        prefix_dropout_p: Dropout on the prefix's keys and values, an own mask for each sample. Both kinds of dropout
            draw a seed from the device's default generator, so `torch.manual_seed` repeats them, on any backend.
        memory: As in Prefix-Tuning+, ``phi(q) @ memory`` is added to out, per head, and the sum rounded once. It is no
            part of the softmax: scale, masks, dropout, lse and mass do not know it, and where no key is seen it is all
            there is. The prefix may have length 0. One memory for each row of prefix_k has prefix_k's first axis.
        phi: "elu", "gelu" (with erf), "relu" or "none", of q as it comes.
        softcap: Scores of prefix and own keys become ``softcap * tanh(score / softcap)`` before mask and softmax;
            from 2**-126 to 2**126 but for float64.
        sinks: A finite score for each head that joins its softmax without a value, as gpt-oss has it: a part of the
            weight that falls on nothing. In the type of q or float32; gets a gradient. lse has it in its sum, and a
            query that sees no key has the output zero. Scale, softcap, masks, dropout and memory do not know it.
        window_size: As in FlashAttention, (left, right): query l, whose position is ``l + S - L``, sees own keys from
            ``position - left`` to ``position + right``; -1 stands for all there are. With is_causal right is 0.
            Tiles of keys outside are not visited. May be combined with attn_mask.
        prefix_in_window: Row i of a prefix of P rows (or of its length) lies at position ``i - P``, and the window's
            left bound hides it too, as where a prefix stands in a cache (PEFT's). False: every query sees it.
        return_lse: Also return the log of the softmax's sum (natural), float32 (float64 for float64); differentiable.
        return_prefix_mass: Also return the softmax weight that fell on the prefix, float32; carries no gradient.
        backend: "auto", or the name of one backend, which then runs or says why it cannot.

    Under autocast the inputs are cast as SDPA's are; a float32 mask stays as it is.

    Raises:
        ValueError: What was got and what was expected, for any argument.
        NotImplementedError: No backend, or not the one named, takes the call: why each cannot.
        MemoryError: A thread of the CPU kernels got no scratch.
    """
    check_flags(is_causal, enable_gqa, return_lse, return_prefix_mass)
    one_sample = all(isinstance(t, Tensor) and t.dim() == 3 for t in (q, k, v))
    if one_sample:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    form = _normal_form(
        *(q, k, v, prefix_k, prefix_v, attn_mask),
        *(dropout_p, is_causal, scale, enable_gqa),
        *(prefix_ids, prefix_lengths, prefix_dropout_p),
        *(memory, phi, softcap),
        *(sinks, window_size, prefix_in_window, return_prefix_mass, backend),
    )
    results = _asked_for(*_without_softmax(prefix_attn(*form), form, dropout_p), return_lse, return_prefix_mass)
    if not one_sample:
        return results
    return results.squeeze(0) if isinstance(results, Tensor) else tuple([t.squeeze(0) for t in results])


def prefix_attention_qkvpacked(
    qkv: Tensor,  # [B, N, 3, H, D]
    prefix_k: Tensor,  # [H, P, D] shared | [B, H, P, D] one per sample | [T, H, P, D] a bank, with prefix_ids
    prefix_v: Tensor,  # as prefix_k
    attn_mask: Tensor | None = None,  # broadcastable to [B, H, N, N]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,  # int64 [B]
    prefix_lengths: Tensor | None = None,  # int64 [T] or [B]
    prefix_dropout_p: float = 0.0,
    memory: Tensor | None = None,  # [H, D, D] shared | [B, H, D, D] or, with prefix_ids, [T, H, D, D]
    phi: str = "elu",
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [H]
    window_size: tuple[int, int] = (-1, -1),
    prefix_in_window: bool = False,
    return_lse: bool = False,
    return_prefix_mass: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # [B, N, H, D], then lse and mass [B, H, N] if asked for
    """prefix_attention for queries, keys and values that one projection makes and leaves in one tensor.

    Equal to ``prefix_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(), prefix_k, prefix_v, ...).transpose(1, 2)``, made
    contiguous if it is not. The gradient of qkv is one contiguous tensor that the kernels write themselves; that of the
    three views is copied together from three. So it is, with the same values, in a program made by torch.export.

    Args:
        qkv: As ``projection(x).view(B, N, 3, H, D)`` leaves it. Copied only if its last axis has another stride than 1.

    The other arguments are those of prefix_attention.
    """
    check_flags(is_causal, False, return_lse, return_prefix_mass)
    check_tensor("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}, expected [B, N, 3, H, D]")
    check_float("qkv", qkv)
    # here and not in the parts, so that the gradient of a cast or a copy is of one tensor too
    if _autocasts(qkv):
        (qkv,) = _autocast(qkv)
    qkv = unit_stride(qkv)
    form = _normal_form(
        *(*unpacked(qkv), prefix_k, prefix_v, attn_mask),
        *(dropout_p, is_causal, scale, False),
        *(prefix_ids, prefix_lengths, prefix_dropout_p),
        *(memory, phi, softcap),
        *(sinks, window_size, prefix_in_window, return_prefix_mass, backend),
    )
    out, lse, mass = _without_softmax(prefix_attn_qkvpacked(qkv, *form), form, dropout_p)
    # contiguous as it is, unless qkv's own axes lie in another order
    return _asked_for(out.transpose(1, 2).contiguous(), lse, mass, return_lse, return_prefix_mass)


def _normal_form(
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
) -> tuple[Call, Wants, str]:
    """The arguments of prefix_attn, checked, with a backend that takes them."""
    tensors = (q, k, v, prefix_k, prefix_v, attn_mask, memory, prefix_ids, prefix_lengths, sinks)
    check_types(tensors, (dropout_p, prefix_dropout_p, scale, softcap))
    dropout_p, prefix_dropout_p, scale, softcap = map(as_number, (dropout_p, prefix_dropout_p, scale, softcap))
    if _autocasts(q):
        q, k, v, prefix_k, prefix_v = _autocast(q, k, v, prefix_k, prefix_v)
        memory = None if memory is None else _autocast(memory)[0]
        if attn_mask is not None and attn_mask.dtype != torch.float32:
            (attn_mask,) = _autocast(attn_mask)
    q, k, v = _one_batch(q, k, v)
    _check_shapes(q, k, v, prefix_k, prefix_v, enable_gqa)
    if memory is not None:
        memory = _normal_memory(memory, prefix_k, q)
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
        q, k, v, prefix_k, prefix_v, memory = _distinct(q, k, v, prefix_k, prefix_v, memory)
    q, k, v, prefix_k, prefix_v = map(unit_stride, (q, k, v, prefix_k, prefix_v))
    call = Call(
        q, k, v, prefix_k, prefix_v, attn_mask, sinks, memory, prefix_ids, lengths, seed,
        dropout_p=dropout_p, prefix_dropout_p=prefix_dropout_p, is_causal=is_causal, scale=scale, phi=phi,
        softcap=0.0 if softcap is None else softcap,
        window_left=left, window_right=right, prefix_in_window=in_window,
    )  # fmt: skip
    needs = _wanted(call)
    chosen = backends.choose(backend, call, needs)
    return call, Wants(return_prefix_mass, _keeps_attended(memory, needs)), chosen


def _without_softmax(
    results: tuple[Tensor, ...], form: tuple[Call, Wants, str], dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and mass; out without the softmax's part where all of that is dropped."""
    out, lse, mass, _ = results
    if dropout_p == 1:  # what is left is the memory's part, and that a call without keys has
        call, wants, backend = form
        k, v, prefix_k, prefix_v = [t[:, :, :0] for t in (call.k, call.v, call.prefix_k, call.prefix_v)]
        call = call._replace(k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, attn_mask=None, prefix_lengths=None)
        out = prefix_attn(call, wants, backend)[0]
    return out, lse, mass


def _asked_for(
    out: Tensor, lse: Tensor, mass: Tensor, return_lse: bool, return_prefix_mass: bool
) -> Tensor | tuple[Tensor, ...]:
    if return_lse:
        lse = lse if out.dtype == torch.float64 else lse.float()
        return (out, lse, mass) if return_prefix_mass else (out, lse)
    return (out, mass) if return_prefix_mass else out


def _autocasts(t: Tensor) -> bool:
    # torch's question has no answer for meta, and raises
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the type of autocast; float64 stays, as for SDPA, and so does what is no float."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [t.to(dtype) if t.dtype in FLOATS[:3] else t for t in tensors]


def _distinct(*tensors: Any) -> list[Any]:
    """Views in place of what came before: Dynamo gives no autograd.Function the same tensor twice."""
    return [
        t.view_as(t) if t is not None and any([t is earlier for earlier in tensors[:i]]) else t
        for i, t in enumerate(tensors)
    ]


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
    require_shape("v", v, B=B, Hkv=Hkv, S=S, D=D)
    several = {"T": prefix_k.shape[0]} if prefix_k.dim() == 4 else {}
    require_shape("prefix_k", prefix_k, **several, Hkv=Hkv, P=prefix_k.shape[-2], D=D)
    require_shape("prefix_v", prefix_v, **several, Hkv=Hkv, P=prefix_k.shape[-2], D=D)
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


def _normal_memory(memory: Tensor, prefix_k: Tensor, q: Tensor) -> Tensor:
    """[1, H, D, D], or [T, H, D, D] with the T of the prefixes."""
    H, D = q.shape[1], q.shape[3]
    rows = (prefix_k.shape[0],) if memory.dim() == 4 and prefix_k.dim() == 4 else ()
    if memory.shape != (*rows, H, D, D):
        spelled = "".join(f"T={T}, " for T in rows) + f"H={H}, D={D}, D={D}"
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
