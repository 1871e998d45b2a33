"""Forward of short sequences: a program holds its queries' scores for all keys at once, so nothing is ever rescaled."""

import triton
import triton.language as tl

from prefixattn.kernels.fwd_tiles import add_values, finish, prefix_share, scores
from prefixattn.kernels.memory_tiles import memory_of
from prefixattn.kernels.tiles import LOG2E, MINUS_INF, OWN, PREFIX, SPLIT, below_top, load_rows, prefix_of


@triton.jit
def _tile_scores(
    queries, keys, bias, axis, drops, row, seen_end, scale, softcap,
    FIRST: tl.constexpr, W: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXP: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    column = FIRST + tl.arange(0, W)
    if CAUSAL and PART == OWN:
        score = tl.full((M, W), MINUS_INF, tl.float32)
        if seen_end > FIRST:
            score = scores(
                queries, keys, bias, axis, drops, row, column, scale, softcap,
                D, BLOCK_D, MASK, KEY_MASK, True, PREFIX_DROPOUT, PRECISION, EXP, PART, BOUND,
            )  # fmt: skip
        return score
    else:
        return scores(
            queries, keys, bias, axis, drops, row, column, scale, softcap,
            D, BLOCK_D, MASK, KEY_MASK, CAUSAL, PREFIX_DROPOUT, PRECISION, EXP, PART, BOUND,
        )  # fmt: skip


@triton.jit
def _tile_values(
    acc, weight_sum, prefix_sum, score, pivot, values, axis, drops, row, seen_end, factor,
    FIRST: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, MASS: tl.constexpr, PRECISION: tl.constexpr,
    EXP: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    column = FIRST + tl.arange(0, W)
    weight = below_top(score, pivot[:, None], factor, EXP)
    weight_sum += tl.sum(weight, 1)
    if MASS:
        prefix_sum += prefix_share(weight, column, axis, PART)
    if CAUSAL and PART == OWN:
        if seen_end > FIRST:
            acc = add_values(
                acc, weight, values, axis, drops, row, column,
                D, BLOCK_D, DROPOUT, PREFIX_DROPOUT, PRECISION, PART, BOUND,
            )  # fmt: skip
    else:
        acc = add_values(
            acc, weight, values, axis, drops, row, column,
            D, BLOCK_D, DROPOUT, PREFIX_DROPOUT, PRECISION, PART, BOUND,
        )  # fmt: skip
    return acc, weight_sum, prefix_sum


@triton.jit
def prefix_attn_fwd_short(
    q, k, v, prefix_k, prefix_v, mask, rows, lengths, seed, memory, out, lse, mass, attended,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkt, stride_pkh, stride_pkp, stride_pvt, stride_pvh, stride_pvp,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_ob, stride_oh, stride_ol,
    H, L, S, P, scale, softcap, threshold, keep_scale, prefix_threshold, prefix_gain,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,  # whole ones
    TAIL: tl.constexpr,  # width of the last tile; 0: the keys fill whole ones
    OWN_TILES: tl.constexpr,  # of own keys alone
    SPLIT_TILE: tl.constexpr,  # the tile after those holds own keys too
    HAS_ROWS: tl.constexpr, PER_SAMPLE: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr,
    MASS: tl.constexpr,
    PHI: tl.constexpr,  # NO_MEMORY, or what is done to the queries that meet the memory
    MEMORY_ROWS: tl.constexpr,  # there is a memory for each row of the prefixes
    KEEP: tl.constexpr,  # out without the memory's part is written to `attended`, which lies as out does
    PRECISION: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_M)
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
    axis = (S, P, S + length, L)
    drops = (number, head, kv_head, threshold, keep_scale, prefix_threshold, prefix_gain)

    seen_end = row0 + BLOCK_M + S - L  # under causality, own columns from here on are seen by no query of the block
    found = ()
    top = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    for i in tl.static_range(TILES + (TAIL > 0)):
        score = _tile_scores(
            queries, keys, bias, axis, drops, row, seen_end, scale, softcap,
            i * BLOCK_N, BLOCK_N if i < TILES else TAIL, BLOCK_M, D, BLOCK_D, MASK, KEY_MASK, CAUSAL,
            PREFIX_DROPOUT, PRECISION, EXP,
            OWN if i < OWN_TILES else (SPLIT if SPLIT_TILE and i == OWN_TILES else PREFIX), HAS_LENGTHS or i == TILES,
        )  # fmt: skip
        found = found + (score,)
        top = tl.maximum(top, tl.max(score, 1))

    factor = scale * LOG2E
    pivot = tl.where(top == MINUS_INF, 0.0, top)  # a query that sees no key: -inf - -inf is nan
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weight_sum, prefix_sum = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(TILES + (TAIL > 0)):
        acc, weight_sum, prefix_sum = _tile_values(
            acc, weight_sum, prefix_sum, found[i], pivot, values, axis, drops, row, seen_end, factor,
            i * BLOCK_N, BLOCK_N if i < TILES else TAIL, D, BLOCK_D, CAUSAL,
            DROPOUT, PREFIX_DROPOUT, MASS, PRECISION, EXP,
            OWN if i < OWN_TILES else (SPLIT if SPLIT_TILE and i == OWN_TILES else PREFIX), HAS_LENGTHS or i == TILES,
        )  # fmt: skip
    target = (out + b * stride_ob + h * stride_oh, stride_ol, lse, mass)
    memory_side = (
        q + b * stride_qb + h * stride_qh, stride_ql, memory_of(memory, t, h, H, D, MEMORY_ROWS),
        attended + b * stride_ob + h * stride_oh,
    )  # fmt: skip
    finish(
        target, memory_side, acc, top, weight_sum, prefix_sum, row, L, head * L, scale,
        D, BLOCK_D, MASS, PHI, KEEP, PRECISION, EXP,
    )  # fmt: skip
