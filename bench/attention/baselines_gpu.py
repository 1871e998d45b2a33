"""What `prefix_attention` is measured against on a GPU, each baseline in the form that serves it best, and the shapes.

SDPA's backends are forced one by one, since which of them is fastest depends on the versions. Causality behind a
prefix is aligned bottom-right: FlashAttention has it, cuDNN through SDPA has not and is given a mask. Packages that are
not installed are lines in the record.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.attention.baselines import (
    BOTH,
    CAUSAL,
    Baseline,
    BenchInputs,
    BenchShape,
    concatenated,
    eager_concat,
    visible,
)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_concat(x: BenchInputs, shape: BenchShape, backend: str) -> Tensor:
    k, v = concatenated(x)
    mask: Any = None
    if shape.causal and shape.L > 1:  # one query sees every key
        lower_right = backend != "cudnn"
        mask = (
            causal_lower_right(shape.L, shape.P + shape.keys)
            if lower_right
            else visible(shape.L, shape.P, shape.keys, x.q.device)
        )
    with sdpa_kernel([BACKENDS[backend]]):
        return F.scaled_dot_product_attention(x.q, k, v, attn_mask=mask, enable_gqa=shape.Hkv > 0)


def sdpa_padded_q(x: BenchInputs, shape: BenchShape) -> Tensor:
    """P idle queries ahead make causality top-left, which cuDNN has; nobody is known to write it so."""
    idle = x.q.new_zeros(shape.B, shape.H, shape.P, shape.D)
    k, v = concatenated(x)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        out = F.scaled_dot_product_attention(torch.cat([idle, x.q], 2), k, v, is_causal=True, enable_gqa=shape.Hkv > 0)
    return out[:, :, shape.P :]


def sdpa_no_prefix(x: BenchInputs, shape: BenchShape, backend: str) -> Tensor:
    """Less work, so no peer: what the attention cost before there was a prefix."""
    mask = causal_lower_right(shape.L, shape.keys) if shape.causal and shape.L not in (1, shape.keys) else None
    causal = shape.causal and shape.L == shape.keys
    with sdpa_kernel([BACKENDS[backend]]):
        return F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=mask, is_causal=causal, enable_gqa=shape.Hkv > 0)


def peft(x: BenchInputs, shape: BenchShape) -> Tensor:
    """PEFT and transformers: one copy of the prefix a sample, a cache that concatenates, and a mask of every score."""
    B = shape.B
    prefixes = (x.prefix_k, x.prefix_v) if x.ids is None else (x.prefix_k[x.ids], x.prefix_v[x.ids])
    copies = [p.expand(B, *p.shape[-3:]).contiguous() for p in prefixes]
    k, v = (torch.cat([p, own], 2) for p, own in zip(copies, (x.k, x.v), strict=True))
    mask = visible(shape.L, shape.P, shape.keys, x.q.device).expand(B, 1, -1, -1) if shape.causal else None
    return F.scaled_dot_product_attention(x.q, k, v, attn_mask=mask, enable_gqa=shape.Hkv > 0)


def flash_attn_2(x: BenchInputs, shape: BenchShape) -> Tensor:
    from flash_attn import flash_attn_func

    return _rows_first(flash_attn_func, x, shape)


def flash_attn_3(x: BenchInputs, shape: BenchShape) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _rows_first(flash_attn_func, x, shape)


def flash_attn_4(x: BenchInputs, shape: BenchShape) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return _rows_first(flash_attn_func, x, shape)


def _rows_first(function: Callable[..., Any], x: BenchInputs, shape: BenchShape) -> Tensor:
    out = function(*(t.transpose(1, 2) for t in (x.q, *concatenated(x))), causal=shape.causal)
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2)


def xformers(x: BenchInputs, shape: BenchShape) -> Tensor:
    from xformers.ops import LowerTriangularFromBottomRightMask, memory_efficient_attention

    bias = LowerTriangularFromBottomRightMask() if shape.causal else None
    group = shape.H // shape.kv_heads
    q, k, v = (t.transpose(1, 2) for t in (x.q, *concatenated(x)))
    if group > 1:  # [B, n, Hkv, group, D]
        q = q.unflatten(2, (shape.kv_heads, group))
        k, v = (t[:, :, :, None].expand(-1, -1, -1, group, -1) for t in (k, v))
        return memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3).transpose(1, 2)
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # its forward on a CPU, which is there for trying this file, is the uncompiled one: that has a backward
    return torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else flex_attention


@cache
def _block_mask(L: int, P: int, S: int, causal: bool, device: torch.device, B: int | None = None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, noop_mask

    sees = (lambda b, h, i, j: j <= i + P + S - L) if causal else noop_mask
    return create_block_mask(sees, B, None, L, P + S, device=device)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, gqa: bool, lse: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about itself; and the old name of an option
        if not lse:
            return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=gqa)
        try:
            from torch.nn.attention.flex_attention import AuxRequest
        except ImportError:
            return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=gqa, return_lse=True)
        out, aux = _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
        return out, aux.lse


def flex_concat(x: BenchInputs, shape: BenchShape) -> Tensor:
    mask = _block_mask(shape.L, shape.P, shape.keys, True, x.q.device) if shape.causal else None
    return _flex(x.q, *concatenated(x), mask, shape.Hkv > 0)


def flex_merge(x: BenchInputs, shape: BenchShape) -> Tensor:
    """A call over the prefix with a batch of one, whose gradient is summed over the samples, and one over own keys."""
    q, gqa = x.q, shape.Hkv > 0
    one = (x.prefix_k, x.prefix_v) if x.ids is None else (x.prefix_k[x.ids], x.prefix_v[x.ids])
    prefix_k, prefix_v = (p if p.ndim == 4 else p[None] for p in one)
    # where the batches differ, FlexAttention wants a mask of the queries' batch, be it one that hides nothing
    everything = _block_mask(shape.L, shape.P, 0, False, q.device, shape.B)
    first, first_lse = _flex(q, prefix_k, prefix_v, everything, gqa, lse=True)
    own = _block_mask(shape.L, 0, shape.keys, True, q.device) if shape.causal else None
    second, second_lse = _flex(q, x.k, x.v, own, gqa, lse=True)
    share = torch.sigmoid((first_lse - second_lse).float())[..., None]  # [B, H, L, 1]
    return (first * share + second * (1 - share)).to(q.dtype)


FLEX = ("flex_concat", "flex_merge")
BASELINES = {
    **{f"sdpa_concat_{name}": Baseline(partial(sdpa_concat, backend=name), BOTH, "peer") for name in BACKENDS},
    "flex_merge": Baseline(flex_merge, BOTH, "peer"),
    "flex_concat": Baseline(flex_concat, BOTH, "peer"),
    "peft": Baseline(peft, BOTH, "peer"),
    "flash_attn_2": Baseline(flash_attn_2, BOTH, "peer"),
    "flash_attn_3": Baseline(flash_attn_3, BOTH, "peer"),
    "flash_attn_4": Baseline(flash_attn_4, BOTH, "peer"),
    "xformers": Baseline(xformers, BOTH, "peer"),
    "sdpa_padded_q": Baseline(sdpa_padded_q, CAUSAL, "trick"),
    **{f"sdpa_no_prefix_{n}": Baseline(partial(sdpa_no_prefix, backend=n), BOTH, "floor") for n in ("flash", "cudnn")},
}
# without a GPU SDPA has its "math" form and nothing to force: enough to try the code around it
DRY_BASELINES = {
    "flex_merge": BASELINES["flex_merge"],
    "flex_concat": BASELINES["flex_concat"],
    "peft": BASELINES["peft"],
    "eager_concat": Baseline(eager_concat, BOTH, "peer"),
    "flash_attn_2": BASELINES["flash_attn_2"],
}

# the shapes that targets were set for: microseconds of our forward, ratio to the best peer forward and with backward
TARGETS = {
    BenchShape("vit", 64, 12, 197, 10, 64): (30, 2.0, 1.9),
    BenchShape("vit", 128, 12, 197, 50, 64): (62, 2.0, 1.8),
    BenchShape("vit", 64, 12, 577, 50, 64): (190, 1.5, 1.3),
    BenchShape("vit", 64, 16, 1025, 50, 64): (800, 1.3, 1.15),
    BenchShape("gpt", 16, 12, 256, 20, 64): (11, 2.0, 1.8),
    BenchShape("gpt", 8, 16, 1024, 200, 64): (68, 1.5, 1.3),
    BenchShape("gpt", 8, 25, 1024, 10, 64): (88, 1.4, 1.25),
    BenchShape("gpt", 16, 32, 512, 100, 128): (130, 1.65, 1.4),
    BenchShape("gpt", 4, 32, 2048, 30, 128): (305, 1.18, 1.05),
    BenchShape("gpt", 4, 32, 2048, 30, 128, Hkv=8): (300, 1.0, 1.0),
}
_PACKED = [
    BenchShape("vit", 64, 12, 197, 10, 64, form="packed"),
    BenchShape("gpt", 8, 16, 1024, 200, 64, form="packed"),
]
_NO_PREFIX = [BenchShape(s.model, s.B, s.H, s.L, 0, s.D, s.Hkv) for s in TARGETS if s.P != 200]
_LENGTHS = [BenchShape("vit", 64, 12, 197, P, 64) for P in (1, 5, 50, 200)]
_LENGTHS += [BenchShape("gpt", 8, 16, 1024, P, 64) for P in (1, 10, 1024, 8192)]
_DECODING = [BenchShape("gpt", 64, 16, 1, P, 64, S=128) for P in (5, 200, 2048)]
_DECODING += [BenchShape("gpt", 32, 32, 1, 2048, 128, Hkv=8, S=512)]
_BANK = [BenchShape("gpt", 64, 16, 1, 20, 64, S=128, form="bank"), BenchShape("gpt", 64, 12, 128, 20, 64, form="bank")]


def all_shapes() -> list[BenchShape]:
    """Those with targets first: the time given may not suffice for all."""
    shapes = [*TARGETS, *_PACKED, *_DECODING, *_BANK, *_NO_PREFIX, *_LENGTHS]
    return list(dict.fromkeys(shapes))


QUICK = [
    BenchShape("vit", 1, 2, 37, 10, 16),
    BenchShape("gpt", 2, 4, 33, 5, 16, Hkv=2),
    BenchShape("gpt", 2, 2, 1, 20, 16, S=9, form="bank"),
    BenchShape("vit", 1, 2, 20, 3, 16, form="packed"),
    BenchShape("vit", 1, 2, 37, 0, 16),
]

NEED_A_PREFIX = ("flex_merge", "sdpa_padded_q")
