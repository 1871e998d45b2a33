"""prefix_attention, for a packed projection and for packed sequences: what a call means, in words and shapes."""

import torch
from torch import Tensor

from prefixattn.attention.call import Call, Wants
from prefixattn.attention.checks import check_flags, check_float, check_tensor
from prefixattn.attention.layout import unit_stride, unpacked
from prefixattn.attention.normal_form import anew, autocast, autocasts, normal_form
from prefixattn.attention.ops import prefix_attn, prefix_attn_qkvpacked
from prefixattn.attention.sequences import Sequences


def prefix_attention(
    q: Tensor,  # [B, H, L, D], or without B in q, k and v
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, Dv]
    prefix_k: Tensor,  # [Hkv, P, D] shared | [B, Hkv, P, D] one per sample | [T, Hkv, P, D] a bank, with prefix_ids
    prefix_v: Tensor,  # as prefix_k, with Dv for D
    attn_mask: Tensor | None = None,  # broadcastable to [B, H, L, S]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    prefix_ids: Tensor | None = None,  # int64 [B]
    prefix_lengths: Tensor | None = None,  # int64 [T] or [B]
    prefix_dropout_p: float = 0.0,
    memory: Tensor | None = None,  # [H, D, Dv] shared | [B, H, D, Dv] or, with prefix_ids, [T, H, D, Dv]
    phi: str = "elu",
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [H]
    window_size: tuple[int, int] = (-1, -1),
    prefix_in_window: bool = False,
    return_lse: bool = False,
    return_prefix_mass: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # [B, H, L, Dv], then lse and mass [B, H, L] if asked for
    """Attention over the keys and, ahead of them, a learned prefix that every query sees.

    Equal to ``scaled_dot_product_attention(q, cat(prefix_k, k), cat(prefix_v, v))`` without the two copies and
    without expanding the prefix over the batch.

    q, k and v have one number of samples, or some of them one sample for all; without that axis the results lack it
    too. Hidden keys (by a mask, by causality, past prefix_lengths) have the weight zero and never reach lse and mass,
    whatever they hold. But zero times nan or inf is nan, as in SDPA: what a mask, causality or a window hides should be
    finite, or out and the gradients may not be. Rows past prefix_lengths may hold anything.

    Values may have another width than keys: v, prefix_v and out have Dv where q, k and prefix_k have D. The kernels
    have one width: they read copies of the narrower tensors that zeros make as wide as the others.

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

    Under autocast the inputs are cast as SDPA's are; a float32 mask stays as it is. On a CPU's tiles float32 is exact
    as far as ``torch.set_float32_matmul_precision`` says at the call, also in its backward pass.

    Raises:
        ValueError: What was got and what was expected, for any argument.
        NotImplementedError: No backend, or not the one named, takes the call: why each cannot.
        MemoryError: A thread of the CPU kernels got no scratch.
    """
    check_flags(is_causal, enable_gqa, return_lse, return_prefix_mass)
    one_sample = all(isinstance(t, Tensor) and t.dim() == 3 for t in (q, k, v))
    if one_sample:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    form = normal_form(
        *(q, k, v, prefix_k, prefix_v, attn_mask),
        *(dropout_p, is_causal, scale, enable_gqa),
        *(prefix_ids, prefix_lengths, prefix_dropout_p),
        *(memory, phi, softcap),
        *(sinks, window_size, prefix_in_window),
        *(return_prefix_mass, backend),
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
    if autocasts(qkv):
        (qkv,) = autocast(qkv)
    qkv = unit_stride(qkv)
    if torch.compiler.is_compiling():
        (qkv,) = anew(qkv)
    form = normal_form(
        *(*unpacked(qkv), prefix_k, prefix_v, attn_mask),
        *(dropout_p, is_causal, scale, False),
        *(prefix_ids, prefix_lengths, prefix_dropout_p),
        *(memory, phi, softcap),
        *(sinks, window_size, prefix_in_window),
        *(return_prefix_mass, backend),
    )
    out, lse, mass = _without_softmax(prefix_attn_qkvpacked(qkv, *form), form, dropout_p)
    # contiguous as it is, unless qkv's own axes lie in another order
    return _asked_for(out.transpose(1, 2).contiguous(), lse, mass, return_lse, return_prefix_mass)


def prefix_attention_varlen(
    q: Tensor,  # [total_q, H, D]
    k: Tensor,  # [total_k, Hkv, D]
    v: Tensor,  # [total_k, Hkv, Dv]
    prefix_k: Tensor,  # [Hkv, P, D] shared | [n, Hkv, P, D] one per sequence | [T, Hkv, P, D] a bank, with prefix_ids
    prefix_v: Tensor,  # as prefix_k, with Dv for D
    cu_seqlens_q: Tensor,  # int32 or int64 [n + 1]
    cu_seqlens_k: Tensor,  # likewise
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    prefix_ids: Tensor | None = None,  # int64 [n]
    prefix_lengths: Tensor | None = None,  # int64 [T] or [n]
    prefix_dropout_p: float = 0.0,
    memory: Tensor | None = None,  # [H, D, Dv] shared | [n, H, D, Dv] or, with prefix_ids, [T, H, D, Dv]
    phi: str = "elu",
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [H]
    window_size: tuple[int, int] = (-1, -1),
    prefix_in_window: bool = False,
    return_lse: bool = False,
    return_prefix_mass: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # [total_q, H, Dv], then lse and mass [H, total_q] if asked for
    """prefix_attention for n sequences of different length, packed one behind the other: none is padded.

    Each sequence attends to its own keys and to its prefix, as if it were alone: causality and windows are aligned at
    its own end. The arguments that describe the packing are those of FlashAttention's ``flash_attn_varlen_func``.

    Args:
        cu_seqlens_q: Sequence i has the queries from ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]``: from 0 to total_q.
        cu_seqlens_k: Its keys and values likewise.
        max_seqlen_q: No sequence has more queries.
        max_seqlen_k: Nor more keys.

    The other arguments are those of prefix_attention, whose samples are here the sequences; there is no attn_mask.

    Raises:
        ValueError: What was got and what was expected, for any argument. Offsets that do not start at 0, that decrease,
            that end elsewhere than at the total or make longer steps than max_seqlen: on a GPU and in a compiled graph
            an assertion that nobody waits for.
        NotImplementedError: No backend, or not the one named, takes the call: why each cannot.
    """
    check_flags(is_causal, enable_gqa, return_lse, return_prefix_mass)
    for name, t, axes in (("q", q, "total_q, H, D"), ("k", k, "total_k, Hkv, D"), ("v", v, "total_k, Hkv, Dv")):
        check_tensor(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected [{axes}]")
    q, k, v = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    form = normal_form(
        *(q, k, v, prefix_k, prefix_v, None),
        *(dropout_p, is_causal, scale, enable_gqa),
        *(prefix_ids, prefix_lengths, prefix_dropout_p),
        *(memory, phi, softcap),
        *(sinks, window_size, prefix_in_window),
        *(return_prefix_mass, backend),
        Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
    )
    out, lse, mass = _without_softmax(prefix_attn(*form), form, dropout_p)
    return _asked_for(
        out[0].transpose(0, 1), lse[0], mass[0] if return_prefix_mass else mass, return_lse, return_prefix_mass
    )


def _without_softmax(
    results: tuple[Tensor, ...], form: tuple[Call, Wants, str], dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and mass; out without the softmax's part where all of that is dropped."""
    out, lse, mass, _ = results
    if dropout_p == 1:  # what is left is the memory's part, and that a call without keys has
        call, wants, backend = form
        k, v, prefix_k, prefix_v = [t[:, :, :0] for t in (call.k, call.v, call.prefix_k, call.prefix_v)]
        call = call._replace(k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, attn_mask=None, prefix_lengths=None)
        if call.cu_seqlens_k is not None:
            call = call._replace(cu_seqlens_k=torch.zeros_like(call.cu_seqlens_k), max_seqlen_k=0)
        out = prefix_attn(call, wants, backend)[0]
    return out, lse, mass


def _asked_for(
    out: Tensor, lse: Tensor, mass: Tensor, return_lse: bool, return_prefix_mass: bool
) -> Tensor | tuple[Tensor, ...]:
    if return_lse:
        lse = lse if out.dtype == torch.float64 else lse.float()
        return (out, lse, mass) if return_prefix_mass else (out, lse)
    return (out, mass) if return_prefix_mass else out
