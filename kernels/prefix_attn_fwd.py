"""Forward: a program is one block of queries of one head, and goes over its keys with an online softmax.

First the whole tiles of own keys, then, under causality, those that cross the diagonal, then the rest: own keys that
fill no tile, and the prefix. The last tile is only as wide as what is left.
"""

import triton
import triton.language as tl

from prefixattn.kernels.arguments import Window
from prefixattn.kernels.fwd_tiles import add_values, finish, prefix_share, scores
from prefixattn.kernels.phi_tiles import memory_of
from prefixattn.kernels.sequences import first_of_head, sequence
from prefixattn.kernels.tiles import (
    LOG2E,
    MINUS_INF,
    NATURAL,
    OWN,
    RAW,
    below_top,
    head_of,
    load_rows,
    natural_weights,
    prefix_of,
)
from prefixattn.kernels.window_tiles import key_tiles, masked_tile, prefix_columns, prefix_seen


@triton.jit
def _online(
    state, queries, keys, values, bias, axis, draws, row, first, scale, softcap, window,
    FEATURES: tl.constexpr, W: tl.constexpr, CAUSAL: tl.constexpr, MASS: tl.constexpr,
    PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """The running softmax (sum of values, largest score, sum of weights, those on the prefix) with W more columns."""
    acc, top, weight_sum, prefix_sum = state
    column = first + tl.arange(0, W)
    score = scores(queries, keys, bias, axis, draws, row, column, scale, softcap, window, FEATURES, CAUSAL, PART, BOUND)
    factor = scale * LOG2E
    new_top = tl.maximum(top, tl.max(score, 1))
    pivot = tl.where(new_top == MINUS_INF, 0.0, new_top)  # a query that has met no key: -inf - -inf is nan
    rescale = below_top(top, pivot, factor, FEATURES.EXP)
    weight = below_top(score, pivot[:, None], factor, FEATURES.EXP)
    weight_sum = weight_sum * rescale + tl.sum(weight, 1)
    if MASS:
        prefix_sum = prefix_sum * rescale + prefix_share(weight, column, axis, PART)
    acc = add_values(acc * rescale[:, None], weight, values, axis, draws, row, column, FEATURES, PART, BOUND)
    return acc, new_top, weight_sum, prefix_sum


@triton.jit
def prefix_attn_fwd(
    q, k, v, prefix_k, prefix_v, mask, prefix_ids, lengths, seed, memory, out, lse, mass, attended,
    part_out, part_top, part_sum,
    layout, B, H, L, S, P, scale, softcap, drops, window, packed,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr,  # what the columns after the tiles of own keys are: OWN, PREFIX or SPLIT
    REST_LOOP: tl.constexpr,  # they may fill whole tiles
    TAIL: tl.constexpr,  # width of the last tile; 0: none, the loop over the rest ends masked
    PARTS: tl.constexpr,  # 0, or the number of partial results over the prefix to start from
    MASS: tl.constexpr,
    KEEP: tl.constexpr,  # out without the memory's part is written to `attended`, which lies as out does
):  # fmt: skip
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    blocks = tl.cdiv(L, BLOCK_M)
    if FEATURES.CAUSAL:  # heavy blocks first, so that the light ones fill the gaps
        block, bh = blocks - 1 - tl.program_id(0) // (B * H), tl.program_id(0) % (B * H)
    else:  # blocks of one head side by side: they read the same keys
        block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // GROUP
    t, length = prefix_of(b, prefix_ids, lengths, P, FEATURES.HAS_IDS, FEATURES.PER_SAMPLE, FEATURES.HAS_LENGTHS)
    number = tl.zeros((), tl.int64)
    if FEATURES.DROPOUT or FEATURES.PREFIX_DROPOUT:
        number = tl.load(seed)
    head, kv_head = b * H + h, b * (H // GROUP) + g
    row0 = block * BLOCK_M
    at_q, at_k = b, b
    if packed is not None:
        at_q, L = sequence(packed.queries, b)
        at_k, S = sequence(packed.keys, b)
        if row0 >= L:
            return
        if window.first is not None:
            window = Window(window.left, window.right, S - L)
    row = row0 + tl.arange(0, BLOCK_M)
    queries = load_rows(head_of(q, layout.q, at_q, h), layout.q.row, row, row < L, D, BLOCK_D)
    keys = (head_of(k, layout.k, at_k, g), head_of(prefix_k, layout.prefix_k, t, g), layout.k.row, layout.prefix_k.row)
    values = (
        head_of(v, layout.v, at_k, g), head_of(prefix_v, layout.prefix_v, t, g), layout.v.row, layout.prefix_v.row,
    )  # fmt: skip
    bias = (head_of(mask, layout.mask, b, h), layout.mask.row, layout.mask.column)
    draws = (number, head, kv_head, drops)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    weight_sum, prefix_sum = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    UNIT: tl.constexpr = NATURAL if FEATURES.EXP == RAW else FEATURES.EXP
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
        if FEATURES.EXP == RAW:
            top *= 1.0 / scale
    state = (acc, top, weight_sum, prefix_sum)

    axis = (S, P, S, L)
    # own columns that all queries of the block see, that some see
    open_first, open_end, own_end = 0, S // BLOCK_N * BLOCK_N, S
    if window.first is not None:
        span = key_tiles(window, row0, BLOCK_M, S, FEATURES.CAUSAL, BLOCK_N)
        _, _, open_first, open_end, masked_tiles = span
        for i in range(0, masked_tiles):
            first = masked_tile(i, span, BLOCK_N)
            state = _online(
                state, queries, keys, values, bias, axis, draws, row, first, scale, softcap, window,
                FEATURES, BLOCK_N, FEATURES.CAUSAL, MASS, OWN, True,
            )  # fmt: skip
    elif FEATURES.CAUSAL:
        hidden = tl.maximum(row0 + S - L + 1, 0)  # the first column that the block's first query does not see
        open_end = tl.minimum(S, hidden) // BLOCK_N * BLOCK_N
        own_end = tl.minimum(S, tl.maximum(row0 + BLOCK_M + S - L, 0))
    for first in range(open_first, open_end, BLOCK_N):
        state = _online(
            state, queries, keys, values, bias, axis, draws, row, first, scale, softcap, Window(None, None, None),
            FEATURES, BLOCK_N, False, MASS, OWN, False,
        )  # fmt: skip
    first_rest = open_end
    if window.first is not None:
        first_rest = S
    elif FEATURES.CAUSAL or packed is not None:  # how many of a sequence's keys fill no tile, no launch knows
        for first in range(open_end, own_end, BLOCK_N):
            state = _online(
                state, queries, keys, values, bias, axis, draws, row, first, scale, softcap, Window(None, None, None),
                FEATURES, BLOCK_N, FEATURES.CAUSAL, MASS, OWN, True,
            )  # fmt: skip
        first_rest = S
    end = S if PARTS else S + length
    axis = (S, P, end, L)
    tail = end
    if TAIL:
        tail = first_rest
        if REST_LOOP:
            tail += (end - first_rest) // BLOCK_N * BLOCK_N
    if FEATURES.PREFIX_IN_WINDOW:
        first_rest = prefix_columns(window, row0, S, end, BLOCK_N)
    if REST_LOOP:
        for first in range(first_rest, tail, BLOCK_N):
            state = _online(
                state, queries, keys, values, bias, axis, draws, row, first, scale, softcap,
                window if FEATURES.PREFIX_IN_WINDOW else Window(None, None, None),
                FEATURES, BLOCK_N, False, MASS, REST, TAIL == 0,
            )  # fmt: skip
    acc, top, weight_sum, prefix_sum = state
    if TAIL:
        if not FEATURES.PREFIX_IN_WINDOW or prefix_seen(window, row0):
            acc, top, weight_sum, prefix_sum = _online(
                (acc, top, weight_sum, prefix_sum),
                queries, keys, values, bias, axis, draws, row, tail, scale, softcap,
                window if FEATURES.PREFIX_IN_WINDOW else Window(None, None, None),
                FEATURES, TAIL, False, MASS, REST, True,
            )  # fmt: skip
    target = (head_of(out, layout.out, at_q, h), layout.out.row, lse, mass)
    own_memory = memory_of(memory, t, h, H, D, FEATURES.MEMORY_PER_PREFIX)
    memory_side = (head_of(q, layout.q, at_q, h), layout.q.row, own_memory, head_of(attended, layout.out, at_q, h))
    at = first_of_head(packed, head, h, at_q, L)
    finish(target, memory_side, acc, top, weight_sum, prefix_sum, row, L, at, scale, FEATURES, MASS, KEEP)
