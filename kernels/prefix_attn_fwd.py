"""Forward: a program is one block of queries of one head, and goes over its keys with an online softmax.

First the whole tiles of own keys, then, under causality, those that cross the diagonal, then the rest: own keys that
fill no tile, and the prefix. The last tile is only as wide as what is left.
"""

import triton
import triton.language as tl

from prefixattn.kernels.fwd_tiles import add_values, finish, prefix_share, scores
from prefixattn.kernels.memory_tiles import memory_of
from prefixattn.kernels.tiles import (
    LOG2E,
    MINUS_INF,
    NATURAL,
    OWN,
    RAW,
    below_top,
    load_rows,
    natural_weights,
    prefix_of,
)


@triton.jit
def _online(
    state, queries, keys, values, bias, axis, drops, row, first, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, MASS: tl.constexpr,
    PRECISION: tl.constexpr, EXP: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """The running softmax (sum of values, largest score, sum of weights, those on the prefix) with W more columns."""
    acc, top, weight_sum, prefix_sum = state
    column = first + tl.arange(0, W)
    score = scores(
        queries, keys, bias, axis, drops, row, column, scale, softcap,
        D, BLOCK_D, MASK, KEY_MASK, CAUSAL, PREFIX_DROPOUT, PRECISION, EXP, PART, BOUND,
    )  # fmt: skip
    factor = scale * LOG2E
    new_top = tl.maximum(top, tl.max(score, 1))
    pivot = tl.where(new_top == MINUS_INF, 0.0, new_top)  # a query that has met no key: -inf - -inf is nan
    rescale = below_top(top, pivot, factor, EXP)
    weight = below_top(score, pivot[:, None], factor, EXP)
    weight_sum = weight_sum * rescale + tl.sum(weight, 1)
    if MASS:
        prefix_sum = prefix_sum * rescale + prefix_share(weight, column, axis, PART)
    acc = add_values(
        acc * rescale[:, None], weight, values, axis, drops, row, column,
        D, BLOCK_D, DROPOUT, PREFIX_DROPOUT, PRECISION, PART, BOUND,
    )  # fmt: skip
    return acc, new_top, weight_sum, prefix_sum


@triton.jit
def prefix_attn_fwd(
    q, k, v, prefix_k, prefix_v, mask, rows, lengths, seed, memory, out, lse, mass, attended,
    part_out, part_top, part_sum,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkt, stride_pkh, stride_pkp, stride_pvt, stride_pvh, stride_pvp,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_ob, stride_oh, stride_ol,
    B, H, L, S, P, scale, softcap, threshold, keep_scale, prefix_threshold, prefix_gain,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr,  # what the columns after the tiles of own keys are: OWN, PREFIX or SPLIT
    REST_LOOP: tl.constexpr,  # they may fill whole tiles
    TAIL: tl.constexpr,  # width of the last tile; 0: none, the loop over the rest ends masked
    PARTS: tl.constexpr,  # 0, or the number of partial results over the prefix to start from
    HAS_ROWS: tl.constexpr, PER_SAMPLE: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr,
    MASS: tl.constexpr,
    PHI: tl.constexpr,  # NO_MEMORY, or what is done to the queries that meet the memory
    MEMORY_ROWS: tl.constexpr,  # there is a memory for each row of the prefixes
    KEEP: tl.constexpr,  # out without the memory's part is written to `attended`, which lies as out does
    PRECISION: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_M)
    if CAUSAL:  # heavy blocks first, so that the light ones fill the gaps
        block, bh = blocks - 1 - tl.program_id(0) // (B * H), tl.program_id(0) % (B * H)
    else:  # blocks of one head side by side: they read the same keys
        block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // GROUP
    t, length = prefix_of(b, rows, lengths, P, HAS_ROWS, PER_SAMPLE, HAS_LENGTHS)
    number = tl.zeros((), tl.int64)
    if DROPOUT or PREFIX_DROPOUT:
        number = tl.load(seed)
    head, kv_head = b * H + h, b * (H // GROUP) + g
    row0 = block * BLOCK_M
    row = row0 + tl.arange(0, BLOCK_M)
    queries = load_rows(q + b * stride_qb + h * stride_qh, stride_ql, row, row < L, D, BLOCK_D)
    keys = (k + b * stride_kb + g * stride_kh, prefix_k + t * stride_pkt + g * stride_pkh, stride_ks, stride_pkp)
    values = (v + b * stride_vb + g * stride_vh, prefix_v + t * stride_pvt + g * stride_pvh, stride_vs, stride_pvp)
    bias = (mask + b * stride_mb + h * stride_mh, stride_ml, stride_ms)
    drops = (number, head, kv_head, threshold, keep_scale, prefix_threshold, prefix_gain)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    weight_sum, prefix_sum = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    UNIT: tl.constexpr = NATURAL if EXP == RAW else EXP
    for part in range(0, PARTS):
        at = (part * B * H + head) * L + row
        part_pivot = tl.load(part_top + at, mask=row < L, other=MINUS_INF)
        new_top = tl.maximum(top, part_pivot)
        pivot = tl.where(new_top == MINUS_INF, 0.0, new_top)
        old, new = natural_weights(top, pivot, 0.0, UNIT), natural_weights(part_pivot, pivot, 0.0, UNIT)
        weight_sum = weight_sum * old + tl.load(part_sum + at, mask=row < L, other=0.0) * new
        acc = acc * old[:, None] + load_rows(part_out, D, at, row < L, D, BLOCK_D) * new[:, None]
        top = new_top
    if PARTS:
        prefix_sum = weight_sum
        if EXP == RAW:
            top *= 1.0 / scale
    state = (acc, top, weight_sum, prefix_sum)

    open_end, own_end = S // BLOCK_N * BLOCK_N, S  # own columns that all queries of the block see, that some see
    if CAUSAL:
        hidden = tl.maximum(row0 + S - L + 1, 0)  # the first column that the block's first query does not see
        open_end = tl.minimum(S, hidden) // BLOCK_N * BLOCK_N
        own_end = tl.minimum(S, tl.maximum(row0 + BLOCK_M + S - L, 0))
    axis = (S, P, S, L)
    for first in range(0, open_end, BLOCK_N):
        state = _online(
            state, queries, keys, values, bias, axis, drops, row, first, scale, softcap, D, BLOCK_D, BLOCK_N,
            MASK, KEY_MASK, False, DROPOUT, PREFIX_DROPOUT, MASS, PRECISION, EXP, OWN, False,
        )  # fmt: skip
    first_rest = open_end
    if CAUSAL:
        for first in range(open_end, own_end, BLOCK_N):
            state = _online(
                state, queries, keys, values, bias, axis, drops, row, first, scale, softcap, D, BLOCK_D, BLOCK_N,
                MASK, KEY_MASK, True, DROPOUT, PREFIX_DROPOUT, MASS, PRECISION, EXP, OWN, True,
            )  # fmt: skip
        first_rest = S
    end = S if PARTS else S + length
    axis = (S, P, end, L)
    tail = end
    if TAIL:
        tail = first_rest
        if REST_LOOP:
            tail += (end - first_rest) // BLOCK_N * BLOCK_N
    if REST_LOOP:
        for first in range(first_rest, tail, BLOCK_N):
            state = _online(
                state, queries, keys, values, bias, axis, drops, row, first, scale, softcap, D, BLOCK_D, BLOCK_N,
                MASK, KEY_MASK, False, DROPOUT, PREFIX_DROPOUT, MASS, PRECISION, EXP, REST, TAIL == 0,
            )  # fmt: skip
    if TAIL:
        state = _online(
            state, queries, keys, values, bias, axis, drops, row, tail, scale, softcap, D, BLOCK_D, TAIL,
            MASK, KEY_MASK, False, DROPOUT, PREFIX_DROPOUT, MASS, PRECISION, EXP, REST, True,
        )  # fmt: skip
    acc, top, weight_sum, prefix_sum = state
    target = (out + b * stride_ob + h * stride_oh, stride_ol, lse, mass)
    memory_side = (
        q + b * stride_qb + h * stride_qh, stride_ql, memory_of(memory, t, h, H, D, MEMORY_ROWS),
        attended + b * stride_ob + h * stride_oh,
    )  # fmt: skip
    finish(
        target, memory_side, acc, top, weight_sum, prefix_sum, row, L, head * L, scale,
        D, BLOCK_D, MASS, PHI, KEEP, PRECISION, EXP,
    )  # fmt: skip
