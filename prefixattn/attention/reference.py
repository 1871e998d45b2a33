"""The definition of prefix attention in plain PyTorch, forward and backward; a backend for every type and shape.

Calls are in the normal form of normal_form.py, which call.py spells: prefixes [T, Hkv, P, D]; `prefix_ids` names the
prefix of each sample (None: row 0 if T is 1, else row b); lengths per sample; `attn_mask` 4-D, each axis full or 1.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn.attention import philox
from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants
from prefixattn.attention.invariance import batch_invariant
from prefixattn.attention.layout import empty_like_order, lse_type
from prefixattn.attention.sequences import parts

INF = float("inf")
HIDDEN = -1e37  # a mask value from here down hides its key as -inf does: types' least values are written for that


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# what a memory is multiplied by: a function of q, and its derivative
PHIS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda x: x, torch.ones_like),
    "elu": (F.elu, lambda x: x.clamp(max=0.0).exp()),
    "gelu": (F.gelu, _gelu_slope),
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
}


def unsupported(call: Call, needs: Needs) -> list[str]:
    return []


def fwd(call: Call, wants: Wants) -> Results:
    if not _in_pieces(call):
        return _fwd(call, wants, 0)
    q, Dv = call.q, call.v.shape[3]
    found = Results(
        empty_like_order(q, Dv),
        q.new_empty(q.shape[:3], dtype=lse_type(q)),
        q.new_empty(q.shape[:3] if wants.mass else 0, dtype=torch.float32),
        empty_like_order(q, Dv) if wants.attended else q.new_empty(0),
    )
    for i, piece in enumerate(_pieces(call)):
        for whole, part in zip(found, _fwd(piece.call, wants, i), strict=True):
            if part.numel():
                whole[piece.samples, :, piece.queries] = part
    return found


def _fwd(call: Call, wants: Wants, first: int) -> Results:
    """Of samples, or of a piece, which are numbered from `first`."""
    q, P, Dv = call.q, call.prefix_k.shape[2], call.v.shape[3]
    with torch.autocast(q.device.type, enabled=False):
        keep_k, keep_v = _prefix_dropout(call, first)
        keys = _virtual(call.k, call.prefix_k, keep_k, call)  # [B, H, P+S, D]
        values = _virtual(call.v, call.prefix_v, keep_v, call)  # [B, H, P+S, Dv]
        scores = _masked(_capped(_raw_scores(call, keys), call.softcap), call)  # [B, H, L, P+S]
        lse = _with_sinks(scores, call).logsumexp(-1)  # [B, H, L]
        weights = _weights(scores, lse, call)[..., : scores.shape[-1]]
        mass = weights[..., :P].sum(-1).float() if wants.mass else lse.new_empty(0, dtype=torch.float32)
        if call.dropout_p > 0:
            weights = weights * _attention_dropout(weights, call, first)
        attended = weights @ values
        kept = empty_like_order(q, Dv).copy_(attended) if wants.attended else q.new_empty(0)
        if call.memory is not None:
            attended = attended + _of_memory(call, attended.dtype)
        out = empty_like_order(q, Dv).copy_(attended)
    return Results(out, lse.to(lse_type(q)), mass, kept)


def bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
    """The gradients that are wanted. `into`, if given, takes those of q, k and v, which are returned from there."""
    own = zip((call.q, call.k, call.v), into or (None, None, None), needs[:3], strict=True)
    q, k, v = (call.q.new_empty(0) if not need else empty_like_order(t) if at is None else at for t, at, need in own)
    if not _in_pieces(call):
        all_shares = [_bwd(call, given, needs, (q, k, v), 0)]
    else:
        all_shares = []
        for i, piece in enumerate(_pieces(call)):
            of_queries, of_keys = (piece.samples, slice(None), piece.queries), (piece.samples, slice(None), piece.keys)
            dlse = None if given.dlse is None else _alone(given.dlse[of_queries])
            out = given.out if given.out.dim() < 4 else _alone(given.out[of_queries])  # empty where it is not read
            mine = Given(_alone(given.dout[of_queries]), dlse, out, _alone(given.lse[of_queries]))
            at = (q[of_queries] if needs.q else q, k[of_keys] if needs.k else k, v[of_keys] if needs.v else v)
            all_shares.append(_bwd(piece.call, mine, needs, at, i))
    sums = {"attn_mask": _of_mask(call, needs, all_shares)}
    rows_of = {"prefix_k": call.prefix_ids, "prefix_v": call.prefix_ids, "sinks": None, "memory": call.prefix_ids}
    for name, ids in rows_of.items():
        t = getattr(call, name)
        if not getattr(needs, name) or t is None:
            sums[name] = call.q.new_empty(0)
        elif not all_shares:
            sums[name] = torch.zeros_like(t, memory_format=torch.contiguous_format)
        else:
            total, shared = (
                torch.cat([getattr(part, name) for part in all_shares]),
                name == "memory" and t.shape[0] == 1,
            )
            summed = total.sum(0) if name == "sinks" else _over_batch(total, None if shared else ids, t.shape[0])
            sums[name] = summed.to(t.dtype)
    return Grads(q, k, v, **sums)


def _bwd(call: Call, given: Given, needs: Needs, into: Into, first: int) -> Grads:
    """As `_fwd`. Gradients of q, k and v go into `into`; those of what samples share are each sample's, not rounded."""
    q, memory, P = call.q, call.memory, call.prefix_k.shape[2]
    grads = Grads(*(q.new_empty(0) for _ in needs))
    with torch.autocast(q.device.type, enabled=False):
        keep_k, keep_v = _prefix_dropout(call, first)
        keys = _virtual(call.k, call.prefix_k, keep_k, call)
        raw = _raw_scores(call, keys)
        weights = _weights(_masked(_capped(raw, call.softcap), call), given.lse, call)
        weights, of_sinks = weights[..., : raw.shape[-1]], weights[..., raw.shape[-1] :]  # [B, H, L, P+S], [B, H, L, 1]
        kept = _attention_dropout(weights, call, first) if call.dropout_p > 0 else 1.0
        dout = given.dout.to(weights.dtype)
        if needs.v or needs.prefix_v:
            dvalues = _over_group((weights * kept).mT @ dout, call.k.shape[1])  # [B, Hkv, P+S, Dv]
            if needs.v:
                into[2].copy_(dvalues[:, :, P:])
            if needs.prefix_v:
                grads = grads._replace(prefix_v=dvalues[:, :, :P] * keep_v)
        if needs.q or needs.k or needs.prefix_k or needs.attn_mask or needs.sinks:
            values = _virtual(call.v, call.prefix_v, keep_v, call)
            dweights = dout @ values.mT * kept  # [B, H, L, P+S]
            # what the softmax's normalisation takes back, [B, H, L]; from out it would err as that is rounded
            delta = (weights * dweights).sum(-1)
            if given.dlse is not None:
                delta = delta - given.dlse.to(delta.dtype)
            if needs.sinks and call.sinks is not None:
                grads = grads._replace(sinks=-(of_sinks[..., 0] * delta).sum(2))  # [B, H]
            dscores = weights * (dweights - delta[..., None])
            if needs.attn_mask and (mask := call.attn_mask) is not None:
                grads = grads._replace(attn_mask=dscores[..., P:].sum_to_size(mask.shape))
            if call.softcap:  # near the cap, 1 - tanh^2 is what rounding left
                dscores = dscores / torch.cosh(raw / call.softcap).square()
            if needs.q:
                dq = dscores @ keys * call.scale
                if memory is not None:
                    slope = PHIS[call.phi][1](q.to(dq.dtype))
                    dq = dq + slope * (dout @ _memories(call, dq).mT)
                into[0].copy_(dq)
            if needs.k or needs.prefix_k:
                # [B, Hkv, P+S, D]
                dkeys = _over_group(dscores.mT @ q.to(dscores.dtype) * call.scale, call.k.shape[1])
                if needs.k:
                    into[1].copy_(dkeys[:, :, P:])
                if needs.prefix_k:
                    grads = grads._replace(prefix_k=dkeys[:, :, :P] * keep_k)
        if needs.memory:
            grads = grads._replace(memory=PHIS[call.phi][0](q.to(dout.dtype)).mT @ dout)  # [B, H, D, Dv]
    return grads


class _Piece(NamedTuple):
    """A packed sequence, or a sample that is to be batch invariant, as a call of its own, and where it is."""

    call: Call
    samples: slice
    queries: slice
    keys: slice


def _in_pieces(call: Call) -> bool:
    return call.cu_seqlens_q is not None or batch_invariant()


def _pieces(call: Call) -> Iterator[_Piece]:
    ids, lengths, memory, mask = call.prefix_ids, call.prefix_lengths, call.memory, call.attn_mask
    whole, (B, T) = slice(None), (call.q.shape[0], call.prefix_k.shape[0])
    at = [(slice(i, i + 1), whole, whole) for i in range(B)]
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        at = [(whole, *both) for both in zip(parts(call.cu_seqlens_q), parts(call.cu_seqlens_k), strict=True)]
    for i, (samples, queries, keys) in enumerate(at):
        one = slice(i, i + 1)
        row = one if ids is None and T > 1 else whole
        yield _Piece(call._replace(
            q=_alone(call.q[samples, :, queries]),
            k=_alone(call.k[samples, :, keys]), v=_alone(call.v[samples, :, keys]),
            prefix_k=call.prefix_k[row], prefix_v=call.prefix_v[row],
            attn_mask=mask if mask is None or mask.shape[0] == 1 else mask[one],
            memory=memory if memory is None or memory.shape[0] == 1 else _alone(memory[row]),
            prefix_ids=None if ids is None else ids[one],
            prefix_lengths=None if lengths is None else lengths[one],
            cu_seqlens_q=None, cu_seqlens_k=None,
        ), samples, queries, keys)  # fmt: skip


def _alone(t: Tensor) -> Tensor:
    """A copy for batch invariance: how a library sums may depend on strides, and on where in memory rows begin."""
    return t.clone(memory_format=torch.contiguous_format) if batch_invariant() else t


def _virtual(own: Tensor, prefix: Tensor, kept: Tensor | float, call: Call) -> Tensor:
    """The keys or values that the queries see, prefix first: [B, H, P+S, D or Dv] in the type of the scores.

    own [B, Hkv, S, D or Dv], prefix [T, Hkv, P, D or Dv].
    """
    q, ids, lengths = call.q, call.prefix_ids, call.prefix_lengths
    B, Hkv, _, _ = own.shape
    prefix = prefix.expand(B, -1, -1, -1) if ids is None else prefix[ids]
    if lengths is not None:  # whatever lies there: a weight of zero would still make nan of nan
        prefix = prefix.masked_fill(_past(lengths, prefix.shape[2])[:, None, :, None], 0.0)
    both = torch.cat([prefix.to(_precision(q)) * kept, own.to(_precision(q))], 2)
    return both.repeat_interleave(q.shape[1] // Hkv, 1) if q.shape[1] != Hkv else both


def of_memory(call: Call, dtype: torch.dtype) -> Tensor:
    """What the memory adds to out, [B, H, L, Dv]."""
    assert call.memory is not None
    if not batch_invariant() and (call.cu_seqlens_q is None or call.memory.shape[0] == 1):
        return _of_memory(call, dtype)
    found = call.q.new_empty((*call.q.shape[:3], call.memory.shape[3]), dtype=dtype)
    for piece in _pieces(call):
        found[piece.samples, :, piece.queries] = _of_memory(piece.call, dtype)
    return found


def _of_memory(call: Call, dtype: torch.dtype) -> Tensor:
    q = call.q.to(dtype)
    return PHIS[call.phi][0](q) @ _memories(call, q)


def _memories(call: Call, like: Tensor) -> Tensor:
    """Each sample's memory, [B or 1, H, D, Dv], in the type of `like`."""
    memory, ids = call.memory, call.prefix_ids
    assert memory is not None
    return (memory if ids is None or memory.shape[0] == 1 else memory[ids]).to(like.dtype)


def _raw_scores(call: Call, keys: Tensor) -> Tensor:  # keys [B, H, P+S, D] -> [B, H, L, P+S]
    return call.q.to(keys.dtype) @ keys.mT * call.scale


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _masked(scores: Tensor, call: Call) -> Tensor:
    """-inf at each key that the query does not see; scores [B, H, L, P+S]."""
    P, mask, lengths = call.prefix_k.shape[2], call.attn_mask, call.prefix_lengths
    L, S = scores.shape[2], scores.shape[3] - P
    prefix, own = scores[..., :P], scores[..., P:]
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN
        own = (own if mask.dtype == torch.bool else own + mask).masked_fill(hidden, -INF)
    position, key = torch.arange(S - L, S, device=scores.device)[:, None], torch.arange(S, device=scores.device)
    right = 0 if call.is_causal else call.window_right
    if right >= 0:
        own = own.masked_fill(key > position + right, -INF)
    if call.window_left >= 0:
        own = own.masked_fill(key < position - call.window_left, -INF)
        if call.prefix_in_window:
            row = torch.arange(P, device=scores.device)
            place = row - P if lengths is None else (row - lengths[:, None])[:, None, None]  # [P] or [B, 1, 1, P]
            prefix = prefix.masked_fill(place < position - call.window_left, -INF)
    if lengths is not None:
        prefix = prefix.masked_fill(_past(lengths, P)[:, None, None], -INF)
    return torch.cat([prefix, own], -1)


def _past(lengths: Tensor, P: int) -> Tensor:
    """True at the prefix rows that a sample does not use, [B, P]."""
    return torch.arange(P, device=lengths.device) >= lengths[:, None]


def _with_sinks(scores: Tensor, call: Call) -> Tensor:
    """Behind the keys a column for the sinks, if the call has some."""
    if call.sinks is None:
        return scores
    column = call.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1)


def _weights(scores: Tensor, lse: Tensor, call: Call) -> Tensor:
    # a row that sees no key has lse -inf; softmax makes it nan, its weights are zero
    return _with_sinks(scores, call).softmax(-1).masked_fill((lse == -INF)[..., None], 0.0)


def _prefix_dropout(call: Call, first: int) -> tuple[Tensor | float, Tensor | float]:
    """Factors 0 or 1 / (1 - p) for prefix keys [B, Hkv, P, D] and values [B, Hkv, P, Dv], or 1 without dropout."""
    p, seed = call.prefix_dropout_p, call.seed
    if p == 0 or seed is None:
        return 1.0, 1.0
    keep_k, keep_v = (
        philox.keep(seed, p, (call.q.shape[0], *t.shape[1:]), kind, first)
        for t, kind in ((call.prefix_k, philox.PREFIX_K), (call.prefix_v, philox.PREFIX_V))
    )
    return keep_k.to(_precision(call.q)) / (1 - p), keep_v.to(_precision(call.q)) / (1 - p)


def _attention_dropout(weights: Tensor, call: Call, first: int) -> Tensor:
    assert call.seed is not None
    B, H, L, N = weights.shape
    keep = philox.keep(call.seed, call.dropout_p, (B, H, L, N), philox.ATTENTION, first)
    return keep.to(weights.dtype) / (1 - call.dropout_p)


def _of_mask(call: Call, needs: Needs, shares: list[Grads]) -> Tensor:
    """Of the mask's shape and type: rows of samples, or their sum."""
    mask = call.attn_mask
    if mask is None or not needs.attn_mask:
        return call.q.new_empty(0)
    if not shares:
        return mask.new_zeros(mask.shape)
    total = torch.cat([share.attn_mask for share in shares]) if len(shares) > 1 else shares[0].attn_mask
    total = total if total.shape[0] == mask.shape[0] else _pairwise(total)[None]
    return total.to(mask.dtype).contiguous()


def _over_group(grad: Tensor, Hkv: int) -> Tensor:
    """Sums [B, H, N, D] over the query heads that share a key head: [B, Hkv, N, D]."""
    return grad.unflatten(1, (Hkv, -1)).sum(2) if grad.shape[1] != Hkv else grad


def _over_batch(grad: Tensor, ids: Tensor | None, T: int) -> Tensor:
    """Sums the samples' prefix gradients [B, Hkv, P, D] into the prefixes that they used: [T, Hkv, P, D]."""
    if ids is not None:
        total = grad.new_zeros(T, *grad.shape[1:])
        for t in ids.unique().tolist():  # in a fixed order on every device, which index_add_ is not
            total[t] = _pairwise(grad[ids == t])
        return total
    return _pairwise(grad)[None] if T == 1 else grad.contiguous()


def _pairwise(terms: Tensor) -> Tensor:
    """The sum over the first axis, of halves: a chain of additions errs with its length."""
    if terms.shape[0] == 0:
        return terms.sum(0)
    while (n := terms.shape[0]) > 1:
        half = n // 2
        sums = terms[:half] + terms[half : 2 * half]
        terms = torch.cat([sums, terms[2 * half :]]) if n % 2 else sums
    return terms[0]


def _precision(q: Tensor) -> torch.dtype:
    return q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
