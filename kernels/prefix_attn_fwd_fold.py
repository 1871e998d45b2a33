"""Forward over the prefix alone, for few queries and a long prefix that samples share.

The queries of all samples (and of a key head's group) are the rows of one tile, so each row of the prefix is read
once for all of them, and the prefix is cut into parts for as many programs as the GPU needs. `prefix_attn_fwd` starts
from the parts.

Prefix rows that no query of a tile uses are not read.
"""

import triton
import triton.language as tl

from prefixattn.kernels.tiles import (
    ATTENTION,
    LOG2E,
    MINUS_INF,
    PREFIX,
    RAW,
    below_top,
    capped,
    head_of,
    kept,
    load_columns,
    load_rows,
)  # fmt: skip
from prefixattn.kernels.window_tiles import NOWHERE


@triton.jit
def prefix_attn_fwd_fold(
    q, prefix_k, prefix_v,
    order,  # [B], sorts the samples by their prefix
    prefix_ids, lengths, seed, part_out, part_top, part_sum,
    layout, B, H, L, P, scale, softcap, drops,
    window,  # no window if it hides nothing of the prefix
    part_width,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    KV = H // GROUP
    part, g = (tl.program_id(1) // KV).to(tl.int64), (tl.program_id(1) % KV).to(tl.int64)
    folded = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # over samples in order, heads of the group, queries
    count = B * GROUP * L
    inside = folded < count
    sample = tl.minimum(folded // (GROUP * L), B - 1).to(tl.int64)
    head, row = g * GROUP + folded // L % GROUP, folded % L
    if FEATURES.HAS_IDS:
        sample = tl.load(order + sample)
    number = tl.zeros((), tl.int64)
    if FEATURES.DROPOUT:
        number = tl.load(seed)
    end = tl.full((BLOCK_M,), 0, tl.int32) + P
    if FEATURES.HAS_LENGTHS:
        end = tl.load(lengths + sample).to(tl.int32)
    used = tl.zeros((BLOCK_M,), tl.int64)
    if FEATURES.HAS_IDS:
        used = tl.load(prefix_ids + sample)
    begin = 0
    if window.first is not None:
        begin = tl.maximum(end + row + window.first - window.left, 0)  # the first row that a query sees, [BLOCK_M]
        begin = tl.where(begin < end, begin, NOWHERE)
    queries = load_rows(q, 1, sample * layout.q.sample + head * layout.q.head + row * layout.q.row, inside, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    factor = scale * LOG2E
    stride_k, stride_v = layout.prefix_k.row, layout.prefix_v.row

    t = tl.min(tl.where(inside, used, 2**62), 0)
    last = tl.max(tl.where(inside, used, -1), 0)
    while t <= last:
        mine = inside & (used == t)
        own_k, own_v = head_of(prefix_k, layout.prefix_k, t, g), head_of(prefix_v, layout.prefix_v, t, g)
        longest = tl.max(tl.where(mine, end, 0), 0)
        part_end = tl.minimum((part.to(tl.int32) + 1) * part_width, longest)
        part_begin = part.to(tl.int32) * part_width
        if window.first is not None:
            least = tl.min(tl.where(mine, begin, NOWHERE), 0)
            part_begin += tl.maximum(least - part_begin, 0) // BLOCK_N * BLOCK_N
        for first in range(part_begin, part_end, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            key = load_columns(own_k, own_k, stride_k, stride_k, column, 0, part_end, D, BLOCK_D, PREFIX, True)
            score = tl.dot(queries, tl.trans(key), input_precision=FEATURES.PRECISION)
            if FEATURES.EXP != RAW:
                score *= scale
            if softcap is not None:
                score, _ = capped(score, softcap)
            seen = mine[:, None] & (column[None, :] < tl.minimum(end, part_end)[:, None])
            if window.first is not None:
                seen = seen & (column[None, :] >= begin[:, None])
            score = tl.where(seen, score, MINUS_INF)
            new_top = tl.maximum(top, tl.max(score, 1))
            pivot = tl.where(new_top == MINUS_INF, 0.0, new_top)
            rescale = below_top(top, pivot, factor, FEATURES.EXP)
            weight = below_top(score, pivot[:, None], factor, FEATURES.EXP)
            weight_sum = weight_sum * rescale + tl.sum(weight, 1)
            if FEATURES.DROPOUT:
                counter = (sample * H + head)[:, None]
                keep = kept(number, row[:, None], column[None, :], counter, ATTENTION, drops.threshold)
                weight *= keep * drops.keep_scale
            value = load_columns(own_v, own_v, stride_v, stride_v, column, 0, part_end, D, BLOCK_D, PREFIX, True)
            if FEATURES.HAS_LENGTHS:  # a row that is not finite is for those queries alone whose prefix is long enough
                finite = tl.min((value.to(tl.float32) * 0.0 == 0.0).to(tl.int32), 1)  # [BLOCK_N]
                value = tl.where((finite == 1)[:, None], value, tl.zeros_like(value))
                spoilt = tl.max((seen & (finite == 0)[None, :]).to(tl.int32), 1)  # [BLOCK_M]
                acc = tl.where((spoilt == 1)[:, None], float("nan"), acc)
            new_acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision=FEATURES.PRECISION)
            if FEATURES.HAS_IDS:  # zero times the nan of another prefix is nan
                new_acc = tl.where(mine[:, None], new_acc, acc)
            acc = new_acc
            top = new_top
        # the next prefix of the bank that a query of this tile uses
        t = tl.min(tl.where(inside & (used > t), used, 2**62), 0)

    if FEATURES.EXP == RAW:
        top *= scale
    at = ((part * B + sample) * H + head) * L + row
    tl.store(part_top + at, top, mask=inside)
    tl.store(part_sum + at, weight_sum, mask=inside)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(part_out + at[:, None] * D + d, acc, mask=inside[:, None] & (d < D))
