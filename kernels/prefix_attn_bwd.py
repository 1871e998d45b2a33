"""Backward of long sequences: delta; the gradients of own keys and values; those of queries and of a float mask.

Weights are recomputed from lse. Every sum runs in a fixed order: there are no atomics.
"""

import triton
import triton.language as tl

from prefixattn.kernels.arguments import Window
from prefixattn.kernels.bwd_tiles import load_given, load_keys, over_keys, over_queries
from prefixattn.kernels.phi_tiles import NO_MEMORY, memory_dq, memory_of
from prefixattn.kernels.sequences import first_of_head, sequence
from prefixattn.kernels.tiles import OWN, head_of, load_rows, prefix_of, store_rows


@triton.jit
def prefix_attn_bwd_delta(
    out, dout, dlse, delta, layout, H, L,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta [B, H, L]: what the softmax's normalisation takes back."""
    blocks = tl.cdiv(L, BLOCK_M)
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < L
    o = load_rows(head_of(out, layout.out, b, h), layout.out.row, row, inside, D, BLOCK_D).to(tl.float32)
    g = load_rows(head_of(dout, layout.dout, b, h), layout.dout.row, row, inside, D, BLOCK_D).to(tl.float32)
    total = tl.sum(o * g, 1)
    at = (b * H + h) * L + row
    if HAS_DLSE:
        total -= tl.load(dlse + at, mask=inside, other=0.0)
    tl.store(delta + at, total, mask=inside)


@triton.jit
def prefix_attn_bwd_keys(
    q, k, v, mask, seed, dout, lse, delta, dk, dv,
    layout, H, L, S, P, scale, softcap, drops, window, packed,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """A program is one tile of own keys of one key head; it goes over the queries of the head's group."""
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    tiles = tl.cdiv(S, BLOCK_N)
    tile, bg = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    KV = H // GROUP
    b, g = (bg // KV).to(tl.int64), (bg % KV).to(tl.int64)
    number = tl.zeros((), tl.int64)
    if FEATURES.DROPOUT:
        number = tl.load(seed)
    first = tile * BLOCK_N
    at_q, at_k = b, b
    if packed is not None:
        at_q, L = sequence(packed.queries, b)
        at_k, S = sequence(packed.keys, b)
        if first >= S:
            return
        if window.first is not None:
            window = Window(window.left, window.right, S - L)
    column = first + tl.arange(0, BLOCK_N)
    axis = (S, P, S, L)
    keys = (head_of(k, layout.k, at_k, g), k, layout.k.row, layout.k.row)
    values = (head_of(v, layout.v, at_k, g), v, layout.v.row, layout.v.row)
    key, value = load_keys(keys, values, axis, (), column, D, BLOCK_D, False, OWN, True)
    dkeys, dvalues = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, GROUP):
        h = g * GROUP + member
        head = b * H + h
        sources = (
            head_of(q, layout.q, at_q, h), head_of(dout, layout.dout, at_q, h),
            lse + first_of_head(packed, head, h, at_q, L), delta + first_of_head(packed, head, h, at_q, L),
            layout.q.row, layout.dout.row,
        )  # fmt: skip
        bias = (head_of(mask, layout.mask, b, h), layout.mask.row, layout.mask.column)
        draws = (number, head, b * KV + g, drops)
        dkeys, dvalues = over_queries(
            dkeys, dvalues, key, value, sources, bias, axis, draws, column, first, scale, softcap, window,
            FEATURES, BLOCK_M, BLOCK_N, 0, FEATURES.CAUSAL, NEED_K, NEED_V, OWN, False,
        )  # fmt: skip
    if NEED_K:
        store_rows(head_of(dk, layout.dk, at_k, g), layout.dk.row, column, column < S, dkeys * scale, D, BLOCK_D)
    if NEED_V:
        store_rows(head_of(dv, layout.dv, at_k, g), layout.dv.row, column, column < S, dvalues, D, BLOCK_D)


@triton.jit
def prefix_attn_bwd_queries(
    q, k, v, prefix_k, prefix_v, mask, prefix_ids, lengths, seed, memory, dout, lse, delta, dq, dmask,
    layout, B, H, L, S, P, scale, softcap, drops, window, packed,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, REST_LOOP: tl.constexpr, TAIL: tl.constexpr,  # as in prefix_attn_fwd
    NEED_Q: tl.constexpr,
    NEED_MASK: tl.constexpr,  # dmask [B, H, L, S], float32, is written at every column
):  # fmt: skip
    """A program is one block of queries of one head; it goes over the keys as prefix_attn_fwd does."""
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    blocks = tl.cdiv(L, BLOCK_M)
    if FEATURES.CAUSAL:
        block, bh = blocks - 1 - tl.program_id(0) // (B * H), tl.program_id(0) % (B * H)
    else:
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
    sources = (
        head_of(q, layout.q, at_q, h), head_of(dout, layout.dout, at_q, h),
        lse + first_of_head(packed, head, h, at_q, L), delta + first_of_head(packed, head, h, at_q, L),
        layout.q.row, layout.dout.row,
    )  # fmt: skip
    given = load_given(sources, row, row < L, D, BLOCK_D)
    keys = (head_of(k, layout.k, at_k, g), head_of(prefix_k, layout.prefix_k, t, g), layout.k.row, layout.prefix_k.row)
    values = (
        head_of(v, layout.v, at_k, g), head_of(prefix_v, layout.prefix_v, t, g), layout.v.row, layout.prefix_v.row,
    )  # fmt: skip
    bias = (head_of(mask, layout.mask, b, h), layout.mask.row, layout.mask.column)
    draws = (number, head, kv_head, drops)
    dqueries = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    dqueries = over_keys(
        dqueries, given, keys, values, bias, (S, P, S + length, L), draws, dmask, row, row0, scale, softcap, window,
        FEATURES, BLOCK_M, BLOCK_N, REST, REST_LOOP, TAIL, packed is not None, NEED_Q, NEED_MASK,
    )  # fmt: skip
    if NEED_Q:
        dqueries *= scale
        if FEATURES.PHI != NO_MEMORY:
            own_memory = memory_of(memory, t, h, H, D, FEATURES.MEMORY_PER_PREFIX)
            dqueries += memory_dq(
                head_of(q, layout.q, at_q, h), layout.q.row, head_of(dout, layout.dout, at_q, h), layout.dout.row,
                row, row < L, own_memory, FEATURES, BLOCK_M,
            )  # fmt: skip
        store_rows(head_of(dq, layout.dq, at_q, h), layout.dq.row, row, row < L, dqueries, D, BLOCK_D)
