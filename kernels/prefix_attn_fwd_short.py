"""Forward of short sequences: a program holds its queries' scores for all keys at once, so nothing is ever rescaled."""

import triton
import triton.language as tl

from prefixattn.kernels.arguments import Window
from prefixattn.kernels.fwd_tiles import add_values, finish, prefix_share, scores
from prefixattn.kernels.phi_tiles import memory_of
from prefixattn.kernels.tiles import LOG2E, MINUS_INF, OWN, PREFIX, SPLIT, below_top, head_of, load_rows, prefix_of
from prefixattn.kernels.window_tiles import NOWHERE, prefix_seen


@triton.jit
def _span(window, row0, M: tl.constexpr, axis, CAUSAL: tl.constexpr, PREFIX_IN_WINDOW: tl.constexpr):
    """Where the own columns begin and end that one of M queries from `row0` on sees, and where those of the prefix."""
    S, _, end, _ = axis
    at = row0 + window.first
    seen_begin, seen_end, prefix_begin = 0, S, S
    if window.left is not None:
        seen_begin = at - window.left
    if CAUSAL:
        seen_end = at + M
    elif window.right is not None:
        seen_end = at + M + window.right
    if PREFIX_IN_WINDOW:
        prefix_begin = tl.where(prefix_seen(window, row0), end + at - window.left, NOWHERE)
    return seen_begin, seen_end, prefix_begin


@triton.jit
def _meets(span, window, FIRST: tl.constexpr, W: tl.constexpr, PART: tl.constexpr):
    """Whether a query of the block sees anything of a tile."""
    seen_begin, seen_end, prefix_begin = span
    if window.first is None:
        return seen_end > FIRST
    if PART == PREFIX:
        return prefix_begin < FIRST + W
    meets = (seen_begin < FIRST + W) & (seen_end > FIRST)
    if PART == SPLIT:
        meets = meets | (prefix_begin < FIRST + W)
    return meets


@triton.jit
def _tile_scores(
    queries, keys, bias, axis, draws, row, span, scale, softcap, window,
    FEATURES: tl.constexpr, FIRST: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    column = FIRST + tl.arange(0, W)
    if (PART == OWN and (FEATURES.CAUSAL or window.first is not None)) or FEATURES.PREFIX_IN_WINDOW:
        score = tl.full((M, W), MINUS_INF, tl.float32)
        if _meets(span, window, FIRST, W, PART):
            score = scores(
                queries, keys, bias, axis, draws, row, column, scale, softcap, window,
                FEATURES, FEATURES.CAUSAL, PART, BOUND,
            )  # fmt: skip
        return score
    else:
        return scores(
            queries, keys, bias, axis, draws, row, column, scale, softcap,
            window if PART == SPLIT else Window(None, None, None), FEATURES, FEATURES.CAUSAL, PART, BOUND,
        )  # fmt: skip


@triton.jit
def _tile_values(
    acc, weight_sum, prefix_sum, score, pivot, values, axis, draws, row, span, factor, window,
    FEATURES: tl.constexpr, FIRST: tl.constexpr, W: tl.constexpr, MASS: tl.constexpr,
    PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    column = FIRST + tl.arange(0, W)
    weight = below_top(score, pivot[:, None], factor, FEATURES.EXP)
    weight_sum += tl.sum(weight, 1)
    if MASS:
        prefix_sum += prefix_share(weight, column, axis, PART)
    if (PART == OWN and (FEATURES.CAUSAL or window.first is not None)) or FEATURES.PREFIX_IN_WINDOW:
        if _meets(span, window, FIRST, W, PART):
            acc = add_values(acc, weight, values, axis, draws, row, column, FEATURES, PART, BOUND)
    else:
        acc = add_values(acc, weight, values, axis, draws, row, column, FEATURES, PART, BOUND)
    return acc, weight_sum, prefix_sum


@triton.jit
def prefix_attn_fwd_short(
    q, k, v, prefix_k, prefix_v, mask, prefix_ids, lengths, seed, memory, out, lse, mass, attended,
    layout, H, L, S, P, scale, softcap, drops, window,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,  # whole ones
    TAIL: tl.constexpr,  # width of the last tile; 0: the keys fill whole ones
    OWN_TILES: tl.constexpr,  # of own keys alone
    SPLIT_TILE: tl.constexpr,  # the tile after those holds own keys too
    MASS: tl.constexpr,
    KEEP: tl.constexpr,  # out without the memory's part is written to `attended`, which lies as out does
):  # fmt: skip
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    blocks = tl.cdiv(L, BLOCK_M)
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // GROUP
    t, length = prefix_of(b, prefix_ids, lengths, P, FEATURES.HAS_IDS, FEATURES.PER_SAMPLE, FEATURES.HAS_LENGTHS)
    number = tl.zeros((), tl.int64)
    if FEATURES.DROPOUT or FEATURES.PREFIX_DROPOUT:
        number = tl.load(seed)
    head, kv_head = b * H + h, b * (H // GROUP) + g
    row0 = block * BLOCK_M
    row = row0 + tl.arange(0, BLOCK_M)
    queries = load_rows(head_of(q, layout.q, b, h), layout.q.row, row, row < L, D, BLOCK_D)
    keys = (head_of(k, layout.k, b, g), head_of(prefix_k, layout.prefix_k, t, g), layout.k.row, layout.prefix_k.row)
    values = (head_of(v, layout.v, b, g), head_of(prefix_v, layout.prefix_v, t, g), layout.v.row, layout.prefix_v.row)
    bias = (head_of(mask, layout.mask, b, h), layout.mask.row, layout.mask.column)
    axis = (S, P, S + length, L)
    draws = (number, head, kv_head, drops)

    seen_end = row0 + BLOCK_M + S - L  # under causality, own columns from here on are seen by no query of the block
    span = (seen_end, seen_end, seen_end)  # without a window only the second counts
    if window.first is not None:
        span = _span(window, row0, BLOCK_M, axis, FEATURES.CAUSAL, FEATURES.PREFIX_IN_WINDOW)
    found = ()
    top = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    for i in tl.static_range(TILES + (TAIL > 0)):
        score = _tile_scores(
            queries, keys, bias, axis, draws, row, span, scale, softcap, window,
            FEATURES, i * BLOCK_N, BLOCK_N if i < TILES else TAIL, BLOCK_M,
            OWN if i < OWN_TILES else (SPLIT if SPLIT_TILE and i == OWN_TILES else PREFIX),
            FEATURES.HAS_LENGTHS or i == TILES,
        )  # fmt: skip
        found = found + (score,)
        top = tl.maximum(top, tl.max(score, 1))

    factor = scale * LOG2E
    pivot = tl.where(top == MINUS_INF, 0.0, top)  # a query that sees no key: -inf - -inf is nan
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weight_sum, prefix_sum = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(TILES + (TAIL > 0)):
        acc, weight_sum, prefix_sum = _tile_values(
            acc, weight_sum, prefix_sum, found[i], pivot, values, axis, draws, row, span, factor, window,
            FEATURES, i * BLOCK_N, BLOCK_N if i < TILES else TAIL, MASS,
            OWN if i < OWN_TILES else (SPLIT if SPLIT_TILE and i == OWN_TILES else PREFIX),
            FEATURES.HAS_LENGTHS or i == TILES,
        )  # fmt: skip
    target = (head_of(out, layout.out, b, h), layout.out.row, lse, mass)
    own_memory = memory_of(memory, t, h, H, D, FEATURES.MEMORY_PER_PREFIX)
    memory_side = (head_of(q, layout.q, b, h), layout.q.row, own_memory, head_of(attended, layout.out, b, h))
    finish(target, memory_side, acc, top, weight_sum, prefix_sum, row, L, head * L, scale, FEATURES, MASS, KEEP)
