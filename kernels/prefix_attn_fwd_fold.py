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
    kept,
    load_columns,
    load_rows,
)  # fmt: skip


@triton.jit
def prefix_attn_fwd_fold(
    q, prefix_k, prefix_v, order, rows, lengths, seed, part_out, part_top, part_sum,
    stride_qb, stride_qh, stride_ql, stride_pkt, stride_pkh, stride_pkp, stride_pvt, stride_pvh, stride_pvp,
    B, H, L, P, scale, softcap, threshold, keep_scale, part_width,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ROWS: tl.constexpr,  # `order` [B] sorts the samples by their row of the bank
    HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    KV = H // GROUP
    part, g = (tl.program_id(1) // KV).to(tl.int64), (tl.program_id(1) % KV).to(tl.int64)
    folded = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # over samples in order, heads of the group, queries
    count = B * GROUP * L
    inside = folded < count
    sample = tl.minimum(folded // (GROUP * L), B - 1).to(tl.int64)
    head, row = g * GROUP + folded // L % GROUP, folded % L
    if HAS_ROWS:
        sample = tl.load(order + sample)
    number = tl.zeros((), tl.int64)
    if DROPOUT:
        number = tl.load(seed)
    end = tl.full((BLOCK_M,), 0, tl.int32) + P
    if HAS_LENGTHS:
        end = tl.load(lengths + sample).to(tl.int32)
    used = tl.zeros((BLOCK_M,), tl.int64)
    if HAS_ROWS:
        used = tl.load(rows + sample)
    queries = load_rows(q, 1, sample * stride_qb + head * stride_qh + row * stride_ql, inside, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    factor = scale * LOG2E

    t = tl.min(tl.where(inside, used, 2**62), 0)
    last = tl.max(tl.where(inside, used, -1), 0)
    while t <= last:
        mine = inside & (used == t)
        own_k, own_v = prefix_k + t * stride_pkt + g * stride_pkh, prefix_v + t * stride_pvt + g * stride_pvh
        longest = tl.max(tl.where(mine, end, 0), 0)
        part_end = tl.minimum((part.to(tl.int32) + 1) * part_width, longest)
        for first in range(part.to(tl.int32) * part_width, part_end, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            key = load_columns(own_k, own_k, stride_pkp, stride_pkp, column, 0, part_end, D, BLOCK_D, PREFIX, True)
            score = tl.dot(queries, tl.trans(key), input_precision=PRECISION)
            if EXP != RAW:
                score *= scale
            if softcap is not None:
                score, _ = capped(score, softcap)
            seen = mine[:, None] & (column[None, :] < tl.minimum(end, part_end)[:, None])
            score = tl.where(seen, score, MINUS_INF)
            new_top = tl.maximum(top, tl.max(score, 1))
            pivot = tl.where(new_top == MINUS_INF, 0.0, new_top)
            rescale = below_top(top, pivot, factor, EXP)
            weight = below_top(score, pivot[:, None], factor, EXP)
            weight_sum = weight_sum * rescale + tl.sum(weight, 1)
            if DROPOUT:
                counter = (sample * H + head)[:, None]
                keep = kept(number, row[:, None], column[None, :], counter, ATTENTION, threshold)
                weight *= keep * keep_scale
            value = load_columns(own_v, own_v, stride_pvp, stride_pvp, column, 0, part_end, D, BLOCK_D, PREFIX, True)
            if HAS_LENGTHS:  # a row that is not finite is for those queries alone whose prefix is long enough
                finite = tl.min((value.to(tl.float32) * 0.0 == 0.0).to(tl.int32), 1)  # [BLOCK_N]
                value = tl.where((finite == 1)[:, None], value, tl.zeros_like(value))
                spoilt = tl.max((seen & (finite == 0)[None, :]).to(tl.int32), 1)  # [BLOCK_M]
                acc = tl.where((spoilt == 1)[:, None], float("nan"), acc)
            new_acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
            if HAS_ROWS:  # zero times another row's nan is nan
                new_acc = tl.where(mine[:, None], new_acc, acc)
            acc = new_acc
            top = new_top
        # the next row of the bank that a query of this tile uses
        t = tl.min(tl.where(inside & (used > t), used, 2**62), 0)

    if EXP == RAW:
        top *= scale
    at = ((part * B + sample) * H + head) * L + row
    tl.store(part_top + at, top, mask=inside)
    tl.store(part_sum + at, weight_sum, mask=inside)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(part_out + at[:, None] * D + d, acc, mask=inside[:, None] & (d < D))
