"""What the forward kernels do with one tile of keys.

Arguments that go together are tuples: `keys` and `values` (own base, prefix base, their strides), `bias` (mask base,
strides), `axis` (S, P, end of the columns, L), `draws` (seed, head and key head of the counters, Drops). FEATURES are
those of arguments.py; what differs between the tiles of a call stands beside them.
"""

import triton
import triton.language as tl

from prefixattn.kernels.phi_tiles import NO_MEMORY, add_memory
from prefixattn.kernels.tiles import (
    ATTENTION,
    EXACT,
    MINUS_INF,
    OWN,
    PREFIX_K,
    PREFIX_V,
    RAW,
    SPLIT,
    capped,
    draw_column,
    drop_prefix,
    kept,
    load_columns,
    masked,
    store_rows,
)  # fmt: skip


@triton.jit
def scores(
    queries, keys, bias, axis, draws, row, column, scale, softcap, window,
    FEATURES: tl.constexpr, CAUSAL: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of keys, -inf where unseen: [M, W]."""
    S, _, end, L = axis
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    own, prefix, stride_own, stride_prefix = keys
    key = load_columns(own, prefix, stride_own, stride_prefix, column, S, end, D, BLOCK_D, PART, BOUND)
    if FEATURES.PREFIX_DROPOUT and PART != OWN:
        number, _, kv_head, drops = draws
        key = drop_prefix(key, number, column, S, kv_head, PREFIX_K, drops.prefix_threshold, BLOCK_D, PART)
    score = tl.dot(queries, tl.trans(key), input_precision=FEATURES.PRECISION)
    if FEATURES.EXP != RAW:
        score *= scale
    if FEATURES.PREFIX_DROPOUT and PART != OWN:
        score *= tl.where(column >= S, drops.prefix_gain, 1.0)[None, :]
    if softcap is not None:
        score, _ = capped(score, softcap)
    mask, stride_ml, stride_ms = bias
    return masked(
        score, mask, stride_ml, stride_ms, row[:, None], column[None, :], S, end, L, window,
        FEATURES.MASK, FEATURES.KEY_MASK, CAUSAL, FEATURES.PREFIX_IN_WINDOW, PART, BOUND,
    )  # fmt: skip


@triton.jit
def add_values(
    acc, weight, values, axis, draws, row, column,
    FEATURES: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_D] with the values of one tile of keys, weighted [M, W]."""
    S, P, end, _ = axis
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    number, head, kv_head, drops = draws
    if FEATURES.DROPOUT:
        drawn = draw_column(column, S, P, PART)
        keep = kept(number, row[:, None], drawn[None, :], head, ATTENTION, drops.threshold)
        weight *= keep * drops.keep_scale
    own, prefix, stride_own, stride_prefix = values
    value = load_columns(own, prefix, stride_own, stride_prefix, column, S, end, D, BLOCK_D, PART, BOUND)
    if FEATURES.PREFIX_DROPOUT and PART != OWN:
        value = drop_prefix(value, number, column, S, kv_head, PREFIX_V, drops.prefix_threshold, BLOCK_D, PART)
        weight *= tl.where(column >= S, drops.prefix_gain, 1.0)[None, :]
    return tl.dot(weight.to(value.dtype), value, acc, input_precision=FEATURES.PRECISION)


@triton.jit
def prefix_share(weight, column, axis, PART: tl.constexpr):
    """The part of a tile's weights [M, W] that lies on the prefix: [M]."""
    if PART == OWN:
        return tl.zeros((weight.shape[0],), tl.float32)
    if PART == SPLIT:
        weight = tl.where((column >= axis[0])[None, :], weight, 0.0)
    return tl.sum(weight, 1)


@triton.jit
def finish(
    target, memory_side, acc, top, weight_sum, prefix_sum, row, L, at, scale,
    FEATURES: tl.constexpr, MASS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Divides by the sum of the weights and writes out, lse and the share of the prefix."""
    out, stride_ol, lse, mass = target
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    inside = row < L
    if FEATURES.EXP == RAW:
        top *= scale
    seen = weight_sum != 0.0  # a nan counts as seen and stays one
    total = tl.where(seen, weight_sum, 1.0)
    inverse = tl.where(seen, 1.0 / total, 0.0)
    if FEATURES.EXP == EXACT:  # every weight of the backward inherits the rounding of lse
        logarithm = top.to(tl.float64) + tl.log(total.to(tl.float64))
    else:
        logarithm = top + tl.log(total)
    tl.store(lse + at + row, tl.where(seen, logarithm, MINUS_INF), mask=inside)
    if MASS:
        tl.store(mass + at + row, prefix_sum * inverse, mask=inside)
    acc *= inverse[:, None]
    if FEATURES.PHI != NO_MEMORY:
        q, stride_ql, memory, attended = memory_side
        if KEEP:
            store_rows(attended, stride_ol, row, inside, acc, D, BLOCK_D)
        acc = add_memory(acc, q, stride_ql, row, inside, memory, FEATURES)
    store_rows(out, stride_ol, row, inside, acc, D, BLOCK_D)
