"""What `prefix_attention` is measured against: one attention, spelt the ways that PyTorch offers, and the shapes.

Masks, which depend on the shape alone, are made outside the timed call; the expansion and the concatenation, which
depend on the data, are inside.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn import prefix_attention, prefix_attention_qkvpacked
from prefixattn.attention.layout import unpacked


@dataclass(frozen=True)
class BenchShape:
    model: str  # "vit": bidirectional; "gpt": causal
    B: int
    H: int
    L: int
    P: int
    D: int
    Hkv: int = 0  # key heads; 0: H
    S: int = 0  # own keys; 0: L (training, not decoding)
    form: str = ""  # "bank": a prefix of a bank for each sample; "packed": q, k and v are one projection

    @property
    def causal(self) -> bool:
        return self.model == "gpt"

    @property
    def kv_heads(self) -> int:
        return self.Hkv or self.H

    @property
    def keys(self) -> int:
        return self.S or self.L

    def __str__(self) -> str:
        more = (f"-Hkv{self.Hkv}" if self.Hkv else "") + (f"-S{self.S}" if self.S else "")
        more += f"-{self.form}" if self.form else ""
        return f"{self.model}-B{self.B}-N{self.L}-P{self.P}-D{self.D}{more}"

    def gflop(self, backward: bool) -> float:
        """Useful arithmetic: pairs of a query and a key that it sees; a backward counts 2.5 forwards."""
        own = self.L * self.keys - (self.L * (self.L - 1) // 2 if self.causal else 0)
        return 4e-9 * self.B * self.H * self.D * (own + self.L * self.P) * (3.5 if backward else 1.0)

    def mbytes(self, passes: str, itemsize: int) -> float:
        """What must cross device memory at least: each input read once in a pass, each output written once."""
        query, key = self.B * self.H * self.L * self.D, self.B * self.kv_heads * self.keys * self.D
        prefixes = BANK_SIZE if self.form == "bank" else 1
        prefix = prefixes * self.kv_heads * self.P * self.D
        lse = 4 * self.B * self.H * self.L
        fwd = (2 * query + 2 * key + 2 * prefix) * itemsize + lse
        bwd = {
            "fwd": 0,
            "fwd+bwd": (4 * query + 4 * key + 4 * prefix) * itemsize + lse,  # q out dout dq, k v dk dv
            # own keys and values are not read: softmax's share of the prefix needs lse alone
            "prefix grads": (3 * query + 4 * prefix) * itemsize + lse,
        }
        return (fwd + bwd[passes]) / 1e6


BANK_SIZE = 32


class BenchInputs(NamedTuple):
    """q, k and v as models make them: [B, L, H, D] in memory."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]
    prefix_k: Tensor  # [Hkv, P, D] or, of a bank, [T, Hkv, P, D]
    prefix_v: Tensor
    ids: Tensor | None = None  # [B]
    qkv: Tensor | None = None  # [B, N, 3, H, D]: then q, k and v are its parts

    def leaves(self) -> tuple[Tensor, ...]:
        own = (self.q, self.k, self.v) if self.qkv is None else (self.qkv,)
        return *own, self.prefix_k, self.prefix_v

    def with_leaves(self, *leaves: Tensor) -> "BenchInputs":
        """The same call on other tensors; the parts of a packed projection are made anew, as a model does each time."""
        *own, prefix_k, prefix_v = leaves
        parts = own if self.qkv is None else unpacked(own[0])
        return BenchInputs(*parts, prefix_k, prefix_v, self.ids, None if self.qkv is None else own[0])


Attention = Callable[[BenchInputs, BenchShape], Tensor]


def make_inputs(
    shape: BenchShape, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[BenchInputs, Tensor]:
    """The inputs, whose leaves want gradients, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    B, H, Hkv, L, S, P, D = shape.B, shape.H, shape.kv_heads, shape.L, shape.keys, shape.P, shape.D
    bank = (BANK_SIZE,) if shape.form == "bank" else ()
    ids = torch.arange(B, device=device) * 7 % BANK_SIZE if bank else None
    if shape.form == "packed":
        own = [normal(B, L, 3, H, D).requires_grad_()]
        parts, qkv = unpacked(own[0]), own[0]
    else:
        own = [normal(B, n, h, D).transpose(1, 2).requires_grad_() for n, h in ((L, H), (S, Hkv), (S, Hkv))]
        parts, qkv = (own[0], own[1], own[2]), None
    prefix = [normal(*bank, Hkv, P, D).requires_grad_() for _ in range(2)]
    return BenchInputs(*parts, *prefix, ids, qkv), normal(B, L, H, D).transpose(1, 2)


def concatenated(x: BenchInputs) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, P+S, D]."""
    prefixes = (x.prefix_k, x.prefix_v) if x.ids is None else (x.prefix_k[x.ids], x.prefix_v[x.ids])
    k, v = (joined(prefix, own) for prefix, own in zip(prefixes, (x.k, x.v), strict=True))
    return k, v


def joined(prefix: Tensor, own: Tensor) -> Tensor:  # [Hkv, P, D] or one a sample, [B, Hkv, S, D]
    return torch.cat([prefix.expand(own.shape[0], -1, -1, -1), own], 2)


@cache
def visible(L: int, P: int, S: int = 0, device: torch.device | str = "cpu") -> Tensor:  # [L, P+S]; True attends
    S = S or L
    own = torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L)
    return torch.cat([torch.ones(L, P, dtype=torch.bool, device=device), own], 1)


@cache
def visible_float(L: int, P: int, dtype: torch.dtype) -> Tensor:  # [L, P+L]; added to the scores
    return torch.zeros(L, P + L, dtype=dtype).masked_fill(~visible(L, P), float("-inf"))


def ours(x: BenchInputs, shape: BenchShape, backend: str) -> Tensor:
    options = {"is_causal": shape.causal, "prefix_ids": x.ids, "backend": backend}
    if x.qkv is not None:
        return prefix_attention_qkvpacked(x.qkv, x.prefix_k, x.prefix_v, **options).transpose(1, 2)
    return prefix_attention(x.q, x.k, x.v, x.prefix_k, x.prefix_v, enable_gqa=shape.Hkv > 0, **options)


def eager_concat(x: BenchInputs, shape: BenchShape) -> Tensor:
    """Plain PyTorch: the measure of exactness, and what the papers' code does."""
    k, v = (t.repeat_interleave(shape.H // shape.kv_heads, 1) for t in concatenated(x))
    scores = x.q @ k.mT * shape.D**-0.5  # [B, H, L, P+S]
    if shape.causal:
        scores = scores.masked_fill(~visible(shape.L, shape.P, shape.keys, x.q.device), float("-inf"))
    return scores.softmax(-1) @ v


def sdpa_concat(x: BenchInputs, shape: BenchShape) -> Tensor:
    # causal_lower_right is this with the mask made anew in each call: on a CPU it has no path of its own
    mask = visible(shape.L, shape.P) if shape.causal else None
    return F.scaled_dot_product_attention(x.q, *concatenated(x), attn_mask=mask)


def sdpa_concat_float(x: BenchInputs, shape: BenchShape) -> Tensor:
    return F.scaled_dot_product_attention(x.q, *concatenated(x), attn_mask=visible_float(shape.L, shape.P, x.q.dtype))


def sdpa_padded_q(x: BenchInputs, shape: BenchShape) -> Tensor:
    """P idle queries ahead make causality top-left, which SDPA skips tiles for; nobody is known to write it so."""
    idle = x.q.new_zeros(shape.B, shape.H, shape.P, shape.D)
    out = F.scaled_dot_product_attention(torch.cat([idle, x.q], 2), *concatenated(x), is_causal=True)
    return out[:, :, shape.P :]


def sdpa_no_prefix(x: BenchInputs, shape: BenchShape) -> Tensor:
    """Less work, so no peer: what the attention cost before there was a prefix."""
    return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=shape.causal)


@cache
def _compiled_flex(dynamic: bool) -> Callable[..., Tensor]:
    import torch._inductor.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._inductor.config.compile_threads = 1  # no pool of compilers that goes on running beside the clock
    return torch.compile(flex_attention, dynamic=dynamic)


@cache
def _flex_block_mask(L: int, P: int) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    prefix = torch.tensor(P)  # a tensor, not a number: one compilation serves every P
    return create_block_mask(lambda b, h, i, j: j <= i + prefix, None, None, L, P + L, device="cpu")


def flex_concat(x: BenchInputs, shape: BenchShape) -> Tensor:
    mask = _flex_block_mask(shape.L, shape.P) if shape.causal else None
    return flex(x.q, *concatenated(x), mask, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: object, dynamic: bool = False) -> Tensor:
    """FlexAttention; `dynamic`: one compilation for all sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about itself
        return _compiled_flex(dynamic)(q, k, v, block_mask=blocks)


class Baseline(NamedTuple):
    """What ours is compared with."""

    attention: Attention
    causal: tuple[bool, ...]  # which shapes it is for
    role: str  # "peer": the fastest of these is what our ratio is over; "trick", "floor": shown beside


BOTH, CAUSAL = (False, True), (True,)
BASELINES = {
    "sdpa_concat": Baseline(sdpa_concat, BOTH, "peer"),
    "sdpa_concat_float": Baseline(sdpa_concat_float, CAUSAL, "peer"),
    "flex_concat": Baseline(flex_concat, BOTH, "peer"),
    "sdpa_padded_q": Baseline(sdpa_padded_q, CAUSAL, "trick"),
    "sdpa_no_prefix": Baseline(sdpa_no_prefix, BOTH, "floor"),
}
OURS: dict[str, Attention] = {name: partial(ours, backend=name) for name in ("cpu", "triton", "reference")}


def forward(attention: Attention, x: BenchInputs, shape: BenchShape) -> Tensor:
    with torch.no_grad():
        return attention(x, shape)


def forward_backward(attention: Attention, x: BenchInputs, dout: Tensor, shape: BenchShape) -> tuple[Tensor, ...]:
    """The output and the gradients of all leaves that want one."""
    leaves = x.leaves()
    if x.qkv is not None:  # the views belong to the step that is timed
        x = x.with_leaves(*leaves)
    out = attention(x, shape)
    wanted = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(out, wanted, dout, allow_unused=True)  # unused: a floor has no prefix
    return out.detach(), *(g for g in grads if g is not None)


# ViT-B and GPT-2 have 12 heads; batches such that a call takes milliseconds to tens of milliseconds on two cores
_BATCH = {("vit", 197): 16, ("vit", 577): 2, ("gpt", 64): 64, ("gpt", 256): 12, ("gpt", 1024): 1}
_LENGTHS = {"vit": ((197, 577), (5, 10, 50, 200)), "gpt": ((64, 256, 1024), (5, 20, 200))}


def all_shapes() -> list[BenchShape]:
    return [
        BenchShape(model, max(1, _BATCH[model, N] * 64 // D), 12, N, P, D)
        for model, (lengths, prefixes) in _LENGTHS.items()
        for D in (64, 128)
        for N in lengths
        for P in prefixes
    ]


QUICK = [BenchShape("vit", 1, 2, 50, 10, 64), BenchShape("gpt", 1, 2, 64, 5, 64)]
