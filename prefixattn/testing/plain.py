"""Plain PyTorch's attention over a prefix, for tests: by concatenation, in any order of its sums, with any rounding."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn.attention import philox

INF = float("inf")
ORDERS = 3


def concat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    prefix_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix_dropout_p: float = 0.0,
    memory: Tensor | None = None,
    phi: str = "elu",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    prefix_in_window: bool = False,
    seed: Tensor | None = None,
    first: int = 0,  # from which dropout numbers the samples
    fused: bool = False,  # out by SDPA, which takes no dropout mask of ours
    order: int = 0,  # sums over queries, keys and head elements begin this many ORDERS-ths of the way in
    by_delta: bool = False,  # the softmax's gradient from out, as fused kernels take it
    roundings: "Roundings | None" = None,  # of each stage, on the way there and back
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and mass of prefix_attention by concatenation: nothing here is shared with reference.py but Philox."""
    B, H, L, D = q.shape
    Dv = v.shape[3]
    Hkv, S, P = k.shape[1], k.shape[2], prefix_k.shape[-2]
    T = prefix_k.shape[0] if prefix_k.dim() == 4 else 1
    scale = D**-0.5 if scale is None else scale
    bias = q.new_zeros(B, H, L, P + S)
    if attn_mask is not None and attn_mask.dtype == torch.float32:
        bias = bias.to(torch.promote_types(q.dtype, torch.float32))  # the mask is added as it is
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias[..., P:].masked_fill_(~attn_mask, -INF)
    elif attn_mask is not None:
        bias = torch.cat([bias[..., :P], attn_mask.to(bias.dtype).expand(B, H, L, S)], -1)
    if is_causal:
        future = q.new_ones(L, S, dtype=torch.bool).triu(S - L + 1)
        bias = bias.masked_fill(F.pad(future, (P, 0)), -INF)
    used = [P] * B
    if prefix_lengths is not None:
        of_bank = prefix_ids is not None and len(prefix_lengths) == T
        used = (prefix_lengths[prefix_ids] if of_bank else prefix_lengths.expand(B)).tolist()
    for b, n in enumerate(used):
        bias[b, ..., n:P] = -INF
        distance = torch.arange(S - L, S)[:, None] - torch.arange(-n, S)  # from used rows and own keys, [L, n+S]
        left, right = (INF if limit < 0 else limit for limit in window_size)
        if not prefix_in_window:
            distance[:, :n] = 0
        outside = (distance > left) | F.pad(distance[:, n:] < -right, (n, 0))
        outside = torch.cat([outside[:, :n], outside.new_zeros(L, P - n), outside[:, n:]], -1)
        bias[b] = bias[b].masked_fill(outside.to(q.device), -INF)
    if prefix_ids is not None:
        prefix_k, prefix_v = prefix_k[prefix_ids], prefix_v[prefix_ids]
    prefix_k, prefix_v = (t.expand(B, -1, -1, -1) for t in (prefix_k, prefix_v))
    if prefix_dropout_p:
        assert seed is not None
        prefix_k, prefix_v = (
            t
            * philox.keep(seed, prefix_dropout_p, (B, Hkv, P, t.shape[3]), kind, first).to(t.dtype)
            / (1 - prefix_dropout_p)
            for t, kind in ((prefix_k, philox.PREFIX_K), (prefix_v, philox.PREFIX_V))
        )
    keys, values = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)  # [B, Hkv, P+S, D or Dv]
    sunk = 0 if sinks is None else 1
    if sinks is not None:  # a key of zeros, whose score is what is added to it, with a value of zeros
        bias = torch.cat(
            [bias, sinks.to(torch.promote_types(bias.dtype, sinks.dtype))[:, None, None].expand(B, H, L, 1)], -1
        )
        keys, values = (F.pad(t, (0, 0, 0, 1)) for t in (keys, values))
    # the same sums in another order: queries, keys and head elements are moved around, and their results moved back
    by_query, by_key, by_element, by_value = (n * order // ORDERS for n in (L, P + S + sunk, D, Dv))
    q = q.roll((by_query, by_element), (2, 3))
    bias = bias.roll((by_query, by_key), (2, 3))
    keys, values = (
        t.roll((by_key, by), (2, 3)).repeat_interleave(H // max(Hkv, 1), 1)
        for t, by in ((keys, by_element), (values, by_value))
    )
    # softmax knows no empty row; such a row gets an arbitrary bias here and its defined answer below
    blind = (bias == -INF).all(-1)  # [B, H, L]
    bias = bias.masked_fill(blind[..., None], 0.0)
    rounded = roundings or torch.clone
    scores = rounded(q @ keys.mT * scale)
    if softcap:
        scores = rounded(softcap * torch.tanh(scores / softcap))
    scores = rounded(scores + bias)
    wide = scores.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    lse = wide.logsumexp(-1)
    if roundings is None:
        weights = scores.softmax(-1)
    else:  # by its parts, so that the two terms of its gradient are rounded apart
        weights = rounded((scores - roundings.gradient(lse)[..., None]).exp())
    mass = weights.roll(-by_key, -1)[..., :P].sum(-1).float().masked_fill(blind, 0.0)
    lse = lse.masked_fill(blind, -INF)
    kept = torch.ones((), dtype=weights.dtype, device=q.device)
    if dropout_p:
        assert seed is not None
        kept = philox.keep(seed, dropout_p, (B, H, L, P + S), philox.ATTENTION, first)
        kept = F.pad(kept.to(weights.dtype) / (1 - dropout_p), (0, sunk))
        kept = kept.roll((by_query, by_key), (2, 3))
    if by_delta:
        out = _Attended.apply(scores, weights, kept, values)
    elif fused and bias.dtype == q.dtype and not softcap and not dropout_p:
        out = F.scaled_dot_product_attention(q, keys, values, bias, scale=scale)
    else:
        out = (weights * kept).to(q.dtype) @ values
    out = out.masked_fill(blind[..., None], 0.0)
    if memory is not None:
        if prefix_ids is not None and memory.dim() == 4:
            memory = memory[prefix_ids]
        features: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "gelu": F.gelu, "relu": F.relu}
        memory = memory.roll((by_element, by_value), (-2, -1))
        out = out + rounded(features.get(phi, torch.clone)(q)) @ memory
    return out.roll((-by_query, -by_value), (2, 3)), lse.roll(-by_query, -1), mass.roll(-by_query, -1)


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor, kept: Tensor, values: Tensor) -> Tensor:
        out = (weights * kept) @ values
        ctx.save_for_backward(weights, kept, values, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, Tensor]:
        weights, kept, values, out = ctx.saved_tensors
        delta = (out * dout).sum(-1, keepdim=True)
        return weights * ((dout @ values.mT) * kept - delta), None, None, (weights * kept).mT @ dout


class Roundings:
    """Multiplies numbers, and the gradients that come back to them, by 1 + noise of one unit roundoff of `dtype`.

    In a float64 graph that is what arithmetic in `dtype` errs by, on any machine, even if all its sums are exact.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.unit = torch.finfo(dtype).eps / 2
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, t: Tensor) -> Tensor:
        return _Rounded.apply(t, self, self.round)

    def gradient(self, t: Tensor) -> Tensor:
        """The numbers as they are; their gradient rounded."""
        return _Rounded.apply(t, self, torch.clone)

    def round(self, t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=self.generator, dtype=t.dtype, device="cpu")
        return t * (1 + self.unit * noise.to(t.device))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, roundings: Roundings, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.roundings = roundings
        return change(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.roundings.round(grad), None, None
