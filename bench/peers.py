"""What `prefix_attention` is measured against: one attention, spelt the ways that PyTorch offers, and the shapes.

Masks, which depend on the shape alone, are made outside the timed call; the expansion and the concatenation, which
depend on the data, are inside.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn import prefix_attention


@dataclass(frozen=True)
class Shape:
    model: str  # "vit": bidirectional; "gpt": causal
    B: int
    H: int
    L: int  # = S: training, not decoding
    P: int
    D: int

    @property
    def causal(self) -> bool:
        return self.model == "gpt"

    def __str__(self) -> str:
        return f"{self.model}-B{self.B}-N{self.L}-P{self.P}-D{self.D}"

    def gflop(self, backward: bool) -> float:
        """Useful arithmetic: pairs of a query and a key that it sees; a backward counts 2.5 forwards."""
        own = self.L * (self.L + 1) // 2 if self.causal else self.L * self.L
        return 4e-9 * self.B * self.H * self.D * (own + self.L * self.P) * (3.5 if backward else 1.0)


class Inputs(NamedTuple):
    q: Tensor  # [B, H, L, D], as models make it: [B, L, H, D] in memory
    k: Tensor  # [B, H, L, D]
    v: Tensor  # [B, H, L, D]
    prefix_k: Tensor  # [H, P, D]
    prefix_v: Tensor  # [H, P, D]


Attention = Callable[[Inputs, Shape], Tensor]


def make_inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Inputs, Tensor]:
    """The five inputs, which want gradients, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    B, H, L, P, D = shape.B, shape.H, shape.L, shape.P, shape.D
    own = [normal(B, L, H, D).transpose(1, 2).requires_grad_() for _ in range(3)]
    prefix = [normal(H, P, D).requires_grad_() for _ in range(2)]
    return Inputs(*own, *prefix), normal(B, L, H, D).transpose(1, 2)


def concatenated(x: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, P+L, D]."""
    B = x.q.shape[0]
    k = torch.cat([x.prefix_k.expand(B, -1, -1, -1), x.k], 2)
    return k, torch.cat([x.prefix_v.expand(B, -1, -1, -1), x.v], 2)


@cache
def visible(L: int, P: int) -> Tensor:  # [L, P+L]; True attends
    return torch.cat([torch.ones(L, P, dtype=torch.bool), torch.ones(L, L, dtype=torch.bool).tril()], 1)


@cache
def visible_float(L: int, P: int, dtype: torch.dtype) -> Tensor:  # [L, P+L]; added to the scores
    return torch.zeros(L, P + L, dtype=dtype).masked_fill(~visible(L, P), float("-inf"))


def cpu(x: Inputs, shape: Shape) -> Tensor:
    return prefix_attention(*x, is_causal=shape.causal, backend="cpu")


def reference(x: Inputs, shape: Shape) -> Tensor:
    return prefix_attention(*x, is_causal=shape.causal, backend="reference")


def eager_concat(x: Inputs, shape: Shape) -> Tensor:
    """Plain PyTorch: the measure of exactness, and what the papers' code does."""
    k, v = concatenated(x)
    scores = x.q @ k.mT * shape.D**-0.5  # [B, H, L, P+L]
    if shape.causal:
        scores = scores.masked_fill(~visible(shape.L, shape.P), float("-inf"))
    return scores.softmax(-1) @ v


def sdpa_concat(x: Inputs, shape: Shape) -> Tensor:
    # causal_lower_right is this with the mask made anew in each call: on a CPU it has no path of its own
    mask = visible(shape.L, shape.P) if shape.causal else None
    return F.scaled_dot_product_attention(x.q, *concatenated(x), attn_mask=mask)


def sdpa_concat_float(x: Inputs, shape: Shape) -> Tensor:
    return F.scaled_dot_product_attention(x.q, *concatenated(x), attn_mask=visible_float(shape.L, shape.P, x.q.dtype))


def sdpa_padded_q(x: Inputs, shape: Shape) -> Tensor:
    """P idle queries ahead make causality top-left, which SDPA skips tiles for; nobody is known to write it so."""
    idle = x.q.new_zeros(shape.B, shape.H, shape.P, shape.D)
    out = F.scaled_dot_product_attention(torch.cat([idle, x.q], 2), *concatenated(x), is_causal=True)
    return out[:, :, shape.P :]


def sdpa_no_prefix(x: Inputs, shape: Shape) -> Tensor:
    """Less work, so no peer: what the attention cost before there was a prefix."""
    return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=shape.causal)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._inductor.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._inductor.config.compile_threads = 1  # no pool of compilers that goes on running beside the clock
    return torch.compile(flex_attention, dynamic=True)


@cache
def _flex_block_mask(L: int, P: int) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    prefix = torch.tensor(P)  # a tensor, not a number: one compilation serves every P
    return create_block_mask(lambda b, h, i, j: j <= i + prefix, None, None, L, P + L, device="cpu")


def flex_concat(x: Inputs, shape: Shape) -> Tensor:
    mask = _flex_block_mask(shape.L, shape.P) if shape.causal else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about itself
        return _compiled_flex()(x.q, *concatenated(x), block_mask=mask)


class Peer(NamedTuple):
    attention: Attention
    causal: tuple[bool, ...]  # which shapes it is for
    role: str  # "peer": the fastest of these is what our ratio is over; "trick", "floor": shown beside


BOTH, CAUSAL = (False, True), (True,)
PEERS = {
    "sdpa_concat": Peer(sdpa_concat, BOTH, "peer"),
    "sdpa_concat_float": Peer(sdpa_concat_float, CAUSAL, "peer"),
    "flex_concat": Peer(flex_concat, BOTH, "peer"),
    "sdpa_padded_q": Peer(sdpa_padded_q, CAUSAL, "trick"),
    "sdpa_no_prefix": Peer(sdpa_no_prefix, BOTH, "floor"),
}
OURS: dict[str, Attention] = {"cpu": cpu, "reference": reference}


def forward(attention: Attention, x: Inputs, shape: Shape) -> Tensor:
    with torch.no_grad():
        return attention(x, shape)


def forward_backward(attention: Attention, x: Inputs, dout: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    """The output and the gradients of all five inputs."""
    out = attention(x, shape)
    grads = torch.autograd.grad(out, x, dout, allow_unused=True)  # unused: a floor has no prefix
    return out.detach(), *(g for g in grads if g is not None)


# ViT-B and GPT-2 have 12 heads; batches such that a call takes milliseconds to tens of milliseconds on two cores
_BATCH = {("vit", 197): 16, ("vit", 577): 2, ("gpt", 64): 64, ("gpt", 256): 12, ("gpt", 1024): 1}
_LENGTHS = {"vit": ((197, 577), (5, 10, 50, 200)), "gpt": ((64, 256, 1024), (5, 20, 200))}


def all_shapes() -> list[Shape]:
    return [
        Shape(model, max(1, _BATCH[model, N] * 64 // D), 12, N, P, D)
        for model, (lengths, prefixes) in _LENGTHS.items()
        for D in (64, 128)
        for N in lengths
        for P in prefixes
    ]


QUICK = [Shape("vit", 1, 2, 50, 10, 64), Shape("gpt", 1, 2, 64, 5, 64)]
