"""The definition of prefix attention in plain PyTorch, forward and backward; a backend for every type and shape.

Tensors are in the normal form of functional.py: prefixes [T, Hkv, P, D]; `rows` int64 [B] names the prefix of each
sample (None: row 0 if T is 1, else row b); `lengths` int64 [B] per sample; `attn_mask` 4-D, each axis full or 1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn import philox
from prefixattn.layout import empty_like_order, lse_type

INF = float("inf")
HIDDEN = -1e37  # a mask value from here down hides its key as -inf does: types' least values are written for that
Needs = tuple[bool, bool, bool, bool, bool, bool, bool]  # wanted: q, k, v, prefix_k, prefix_v, attn_mask, memory
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # out, lse, mass, attended: see fwd
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # in the order of Needs


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# what a memory is multiplied by: a function of q, and its derivative
PHIS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda x: x, torch.ones_like),
    "elu": (F.elu, lambda x: x.clamp(max=0.0).exp()),
    "gelu": (F.gelu, _gelu_slope),
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
}


def unsupported(*_: object) -> list[str]:
    return []


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
    softcap: float,  # 0: none
    want_mass: bool,
    want_attended: bool,
) -> Results:
    """Returns out [B, H, L, D]; lse [B, H, L], natural log; the softmax weight on the prefix [B, H, L], or empty; and
    out without the memory's part [B, H, L, D], or empty.
    """
    P = prefix_k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        keep_k, keep_v = _prefix_dropout(q, prefix_k, seed, prefix_dropout_p)
        keys = _virtual(k, prefix_k, rows, lengths, keep_k, q)  # [B, H, P+S, D]
        values = _virtual(v, prefix_v, rows, lengths, keep_v, q)  # [B, H, P+S, D]
        raw = _raw_scores(q, keys, scale)
        scores = _masked(_capped(raw, softcap), P, attn_mask, lengths, is_causal)  # [B, H, L, P+S]
        lse = scores.logsumexp(-1)  # [B, H, L]
        weights = _weights(scores, lse)
        mass = weights[..., :P].sum(-1).float() if want_mass else lse.new_empty(0, dtype=torch.float32)
        if dropout_p > 0:
            weights = weights * _attention_dropout(weights, seed, dropout_p)
        attended = weights @ values
        kept = empty_like_order(q).copy_(attended) if want_attended else q.new_empty(0)
        if memory is not None:
            attended = attended + PHIS[phi][0](q.to(attended.dtype)) @ _memories(memory, rows, attended)
        out = empty_like_order(q).copy_(attended)
    return out, lse.to(lse_type(q)), mass, kept


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
    out: Tensor,  # [B, H, L, D]; with a memory, what fwd returned as out without its part
    lse: Tensor,  # [B, H, L], of lse_type
    dropout_p: float,
    prefix_dropout_p: float,
    is_causal: bool,
    scale: float,
    phi: str,
    softcap: float,
    needs: Needs,
    into: tuple[Tensor, Tensor, Tensor] | None = None,  # shaped as q, k, v; strides as they come, 1 in D
) -> Grads:
    """Returns the gradients in the order of Needs, each in its input's shape, or empty [0].

    Those of q, k and v that are wanted are written to `into`, and returned from there, if it is given.
    """
    T, P = prefix_k.shape[0], prefix_k.shape[2]
    need_q, need_k, need_v, need_prefix_k, need_prefix_v, need_mask, need_memory = needs
    into_q, into_k, into_v = into or (None, None, None)
    grads = [q.new_empty(0) for _ in needs]
    with torch.autocast(q.device.type, enabled=False):
        keep_k, keep_v = _prefix_dropout(q, prefix_k, seed, prefix_dropout_p)
        keys = _virtual(k, prefix_k, rows, lengths, keep_k, q)
        raw = _raw_scores(q, keys, scale)
        weights = _weights(_masked(_capped(raw, softcap), P, attn_mask, lengths, is_causal), lse)  # [B, H, L, P+S]
        kept = _attention_dropout(weights, seed, dropout_p) if dropout_p > 0 else 1.0
        dout = dout.to(weights.dtype)
        if need_v or need_prefix_v:
            dvalues = _over_group((weights * kept).mT @ dout, k.shape[1])  # [B, Hkv, P+S, D]
            if need_v:
                grads[2] = _written(dvalues[:, :, P:], v, into_v)
            if need_prefix_v:
                grads[4] = _over_batch(dvalues[:, :, :P], keep_v, rows, T).to(prefix_v.dtype)
        if need_q or need_k or need_prefix_k or need_mask:
            values = _virtual(v, prefix_v, rows, lengths, keep_v, q)
            dweights = dout @ values.mT * kept  # [B, H, L, P+S]
            # what the softmax's normalisation takes back, [B, H, L]; from out it would err as that is rounded
            delta = (weights * dweights).sum(-1)
            if dlse is not None:
                delta = delta - dlse.to(delta.dtype)
            dscores = weights * (dweights - delta[..., None])
            if need_mask and attn_mask is not None:
                grads[5] = dscores[..., P:].sum_to_size(attn_mask.shape).to(attn_mask.dtype).contiguous()
            if softcap:
                dscores = dscores / torch.cosh(raw / softcap).square()  # near the cap, 1 - tanh^2 is what rounding left
            if need_q:
                dq = dscores @ keys * scale
                if memory is not None:
                    slope = PHIS[phi][1](q.to(dq.dtype))
                    dq = dq + slope * (dout @ _memories(memory, rows, dq).mT)
                grads[0] = _written(dq, q, into_q)
            if need_k or need_prefix_k:
                dkeys = _over_group(dscores.mT @ q.to(dscores.dtype) * scale, k.shape[1])  # [B, Hkv, P+S, D]
                if need_k:
                    grads[1] = _written(dkeys[:, :, P:], k, into_k)
                if need_prefix_k:
                    grads[3] = _over_batch(dkeys[:, :, :P], keep_k, rows, T).to(prefix_k.dtype)
        if need_memory and memory is not None:
            dmemory = PHIS[phi][0](q.to(dout.dtype)).mT @ dout  # [B, H, D, D]
            of_bank = rows if memory.shape[0] > 1 else None
            grads[6] = _over_batch(dmemory, 1.0, of_bank, memory.shape[0]).to(memory.dtype)
    dq, dk, dv, dprefix_k, dprefix_v, dmask, dmemory = grads
    return dq, dk, dv, dprefix_k, dprefix_v, dmask, dmemory


def _written(grad: Tensor, t: Tensor, into: Tensor | None) -> Tensor:
    """The gradient of `t` in the type of `t`, in the memory of `into` or else in the order of `t`."""
    return (empty_like_order(t) if into is None else into).copy_(grad)


def _virtual(
    own: Tensor,  # [B, Hkv, S, D]
    prefix: Tensor,  # [T, Hkv, P, D]
    rows: Tensor | None,
    lengths: Tensor | None,
    kept: Tensor | float,
    q: Tensor,
) -> Tensor:
    """The keys or values that the queries see, prefix first: [B, H, P+S, D] in the type of the scores."""
    B, Hkv, _, _ = own.shape
    prefix = prefix.expand(B, -1, -1, -1) if rows is None else prefix[rows]
    if lengths is not None:  # whatever lies there: a weight of zero would still make nan of nan
        prefix = prefix.masked_fill(_past(lengths, prefix.shape[2])[:, None, :, None], 0.0)
    both = torch.cat([prefix.to(_precision(q)) * kept, own.to(_precision(q))], 2)
    return both.repeat_interleave(q.shape[1] // Hkv, 1) if q.shape[1] != Hkv else both


def _memories(memory: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Each sample's memory, [B or 1, H, D, D], in the type of `like`."""
    return (memory if rows is None or memory.shape[0] == 1 else memory[rows]).to(like.dtype)


def _raw_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:  # keys [B, H, P+S, D] -> [B, H, L, P+S]
    return q.to(keys.dtype) @ keys.mT * scale


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _masked(
    scores: Tensor,  # [B, H, L, P+S]
    P: int,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """-inf at each key that the query does not see."""
    L, S = scores.shape[2], scores.shape[3] - P
    prefix, own = scores[..., :P], scores[..., P:]
    if attn_mask is not None:
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask <= HIDDEN
        own = (own if attn_mask.dtype == torch.bool else own + attn_mask).masked_fill(hidden, -INF)
    if is_causal:
        query, key = torch.arange(L, device=scores.device)[:, None], torch.arange(S, device=scores.device)
        own = own.masked_fill(key > query + (S - L), -INF)
    if lengths is not None:
        prefix = prefix.masked_fill(_past(lengths, P)[:, None, None], -INF)
    return torch.cat([prefix, own], -1)


def _past(lengths: Tensor, P: int) -> Tensor:
    """True at the prefix rows that a sample does not use, [B, P]."""
    return torch.arange(P, device=lengths.device) >= lengths[:, None]


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # a row that sees no key has lse -inf; softmax makes it nan, its weights are zero
    return scores.softmax(-1).masked_fill((lse == -INF)[..., None], 0.0)


def _prefix_dropout(
    q: Tensor, prefix_k: Tensor, seed: Tensor | None, p: float
) -> tuple[Tensor | float, Tensor | float]:
    """Factors 0 or 1 / (1 - p) for each sample's prefix keys and values, [B, Hkv, P, D], or 1 without dropout."""
    if p == 0 or seed is None:
        return 1.0, 1.0
    shape = (q.shape[0], *prefix_k.shape[1:])
    keep_k, keep_v = (philox.keep(seed, p, shape, kind) for kind in (philox.PREFIX_K, philox.PREFIX_V))
    return keep_k.to(_precision(q)) / (1 - p), keep_v.to(_precision(q)) / (1 - p)


def _attention_dropout(weights: Tensor, seed: Tensor | None, p: float) -> Tensor:
    assert seed is not None
    B, H, L, N = weights.shape
    return philox.keep(seed, p, (B, H, L, N), philox.ATTENTION).to(weights.dtype) / (1 - p)


def _over_group(grad: Tensor, Hkv: int) -> Tensor:
    """Sums [B, H, N, D] over the query heads that share a key head: [B, Hkv, N, D]."""
    return grad.unflatten(1, (Hkv, -1)).sum(2) if grad.shape[1] != Hkv else grad


def _over_batch(grad: Tensor, kept: Tensor | float, rows: Tensor | None, T: int) -> Tensor:
    """Sums the samples' prefix gradients [B, Hkv, P, D] into the prefixes that they used: [T, Hkv, P, D]."""
    grad = grad * kept
    if rows is not None:
        total = grad.new_zeros(T, *grad.shape[1:])
        for row in rows.unique().tolist():  # in a fixed order on every device, which index_add_ is not
            total[row] = _pairwise(grad[rows == row])
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
