"""What the backward kernels do with one tile of keys and one of queries, and with a row or a column of them.

Arguments that go together are tuples, as in fwd_tiles.py; `sources` and `given` are what belongs to the queries
(queries, dout, lse, delta), in memory and loaded.
"""

import triton
import triton.language as tl

from prefixattn.kernels.arguments import Window
from prefixattn.kernels.tiles import (
    ATTENTION,
    LOG2E,
    OWN,
    PREFIX,
    PREFIX_K,
    PREFIX_V,
    RAW,
    capped,
    draw_column,
    drop_prefix,
    kept,
    load_columns,
    load_lse,
    load_rows,
    masked,
    natural_weights,
    weights,
)  # fmt: skip
from prefixattn.kernels.window_tiles import key_tiles, masked_tile, prefix_columns, prefix_seen, query_tiles


@triton.jit
def load_keys(
    keys, values, axis, draws, column,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """A tile's keys and values, with prefix dropout but without its gain: [W, BLOCK_D] each."""
    S, _, end, _ = axis
    own, prefix, stride_own, stride_prefix = keys
    key = load_columns(own, prefix, stride_own, stride_prefix, column, S, end, D, BLOCK_D, PART, BOUND)
    own, prefix, stride_own, stride_prefix = values
    value = load_columns(own, prefix, stride_own, stride_prefix, column, S, end, D, BLOCK_D, PART, BOUND)
    if PREFIX_DROPOUT and PART != OWN:
        key, value = drop_both(key, value, axis, draws, column, BLOCK_D, PART)
    return key, value


@triton.jit
def load_given(sources, row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile's queries and dout [M, BLOCK_D], lse in two parts and delta [M]."""
    q, dout, lse, delta, stride_ql, stride_gl = sources
    queries = load_rows(q, stride_ql, row, inside, D, BLOCK_D)
    grads = load_rows(dout, stride_gl, row, inside, D, BLOCK_D)
    return queries, grads, load_lse(lse, row, inside), tl.load(delta + row, mask=inside, other=0.0)


@triton.jit
def drop_both(key, value, axis, draws, column, BLOCK_D: tl.constexpr, PART: tl.constexpr):
    """Prefix dropout's masks on keys and values, or on their gradients."""
    number, _, kv_head, drops = draws
    key = drop_prefix(key, number, column, axis[0], kv_head, PREFIX_K, drops.prefix_threshold, BLOCK_D, PART)
    value = drop_prefix(value, number, column, axis[0], kv_head, PREFIX_V, drops.prefix_threshold, BLOCK_D, PART)
    return key, value


@triton.jit
def pair(
    dk, dv, key, value, sources, places, bias, axis, draws, row, column, scale, softcap, window,
    FEATURES: tl.constexpr, CAUSAL: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """dk and dv [W, BLOCK_D] with what one tile of queries adds; scale and prefix dropout's mask come at the end."""
    S, P, end, L = axis
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    number, head, _, drops = draws
    q, dout, lse, delta = sources
    q_at, dout_at, lse_at, inside = places
    queries = load_rows(q, 1, q_at, inside, D, BLOCK_D)
    pivot, rest = load_lse(lse, lse_at, inside)
    score = tl.dot(key, tl.trans(queries), input_precision=FEATURES.PRECISION)  # [W, M]
    if FEATURES.EXP == RAW:
        pivot *= LOG2E
    else:
        score *= scale
    if FEATURES.PREFIX_DROPOUT and PART != OWN:
        gain = tl.where(column >= S, drops.prefix_gain, 1.0)[:, None]
        score *= gain
    if softcap is not None:
        score, slope = capped(score, softcap)
    mask, stride_ml, stride_ms = bias
    score = masked(
        score, mask, stride_ml, stride_ms, row[None, :], column[:, None], S, end, L, window,
        FEATURES.MASK, FEATURES.KEY_MASK, CAUSAL, FEATURES.PREFIX_IN_WINDOW, PART, BOUND,
    )  # fmt: skip
    if softcap is not None:
        weight = natural_weights(score, pivot[None, :], rest[None, :], FEATURES.EXP)  # no score is large
    else:
        weight = weights(score, pivot[None, :], rest[None, :], scale * LOG2E, FEATURES.EXP)
    if FEATURES.DROPOUT:
        drawn = draw_column(column, S, P, PART)
        keep = kept(number, row[None, :], drawn[:, None], head, ATTENTION, drops.threshold)
    grads = load_rows(dout, 1, dout_at, inside, D, BLOCK_D)  # not before the first product: registers
    if NEED_V:
        dropped = weight
        if FEATURES.DROPOUT:
            dropped = weight * (keep * drops.keep_scale)
        if FEATURES.PREFIX_DROPOUT and PART != OWN:
            dropped *= gain
        dv = tl.dot(dropped.to(grads.dtype), grads, dv, input_precision=FEATURES.PRECISION)
    if NEED_K:
        dweight = tl.dot(value, tl.trans(grads), input_precision=FEATURES.PRECISION)  # [W, M]
        if FEATURES.PREFIX_DROPOUT and PART != OWN:
            dweight *= gain
        if FEATURES.DROPOUT:
            dweight *= keep * drops.keep_scale
        taken = tl.load(delta + lse_at, mask=inside, other=0.0)
        dscore = weight * (dweight - taken[None, :])
        if softcap is not None:
            dscore *= slope
        if FEATURES.PREFIX_DROPOUT and PART != OWN:
            dscore *= gain
        dk = tl.dot(dscore.to(queries.dtype), queries, dk, input_precision=FEATURES.PRECISION)
    return dk, dv


@triton.jit
def over_queries(
    dk, dv, key, value, sources, bias, axis, draws, column, first, scale, softcap, window,
    FEATURES: tl.constexpr, BLOCK_M: tl.constexpr, W: tl.constexpr,
    QUERY_TAIL: tl.constexpr,  # width of the last tile of queries; 0: as wide as the others, masked
    CAUSAL: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """dk and dv of W keys, from `first` on, over every query of a head that sees one of them."""
    S, _, _, L = axis
    q, dout, lse, delta, stride_ql, stride_gl = sources
    bases = (q, dout, lse, delta)
    end = L
    if QUERY_TAIL:
        end = L // BLOCK_M * BLOCK_M
    start, stop = 0, L
    if window.first is not None:
        span, stop = query_tiles(window, first, W, axis, end, CAUSAL, PART, BLOCK_M)
        _, _, start, open_end, masked_tiles = span
        for i in range(0, masked_tiles):
            row = masked_tile(i, span, BLOCK_M) + tl.arange(0, BLOCK_M)
            places = (row * stride_ql, row * stride_gl, row, row < L)
            dk, dv = pair(
                dk, dv, key, value, bases, places, bias, axis, draws, row, column, scale, softcap, window,
                FEATURES, CAUSAL, NEED_K, NEED_V, PART, BOUND,
            )  # fmt: skip
    elif CAUSAL:
        start = tl.maximum(first - (S - L), 0) // BLOCK_M * BLOCK_M  # the first tile that sees a key
        seen = tl.minimum(tl.maximum(first + W - 1 - (S - L), start), L)  # the first query that sees all keys
        all_seen = tl.minimum(tl.cdiv(seen, BLOCK_M) * BLOCK_M, end)
        for row0 in range(start, all_seen, BLOCK_M):
            row = row0 + tl.arange(0, BLOCK_M)
            places = (row * stride_ql, row * stride_gl, row, row < L)
            dk, dv = pair(
                dk, dv, key, value, bases, places, bias, axis, draws, row, column, scale, softcap,
                Window(None, None, None), FEATURES, True, NEED_K, NEED_V, PART, BOUND,
            )  # fmt: skip
        start = tl.maximum(start, all_seen)
    if window.first is None:
        open_end = end
    for row0 in range(start, open_end, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        places = (row * stride_ql, row * stride_gl, row, row < L)
        dk, dv = pair(
            dk, dv, key, value, bases, places, bias, axis, draws, row, column, scale, softcap, Window(None, None, None),
            FEATURES, False, NEED_K, NEED_V, PART, BOUND,
        )  # fmt: skip
    if QUERY_TAIL:
        row = end + tl.arange(0, QUERY_TAIL)
        places = (row * stride_ql, row * stride_gl, row, row < L)
        if window.first is None or stop > end:
            dk, dv = pair(
                dk, dv, key, value, bases, places, bias, axis, draws, row, column, scale, softcap, window,
                FEATURES, CAUSAL, NEED_K, NEED_V, PART, BOUND,
            )  # fmt: skip
    return dk, dv


@triton.jit
def _columns(
    dq, given, keys, values, bias, axis, draws, dmask, row, first, scale, softcap, window,
    FEATURES: tl.constexpr, W: tl.constexpr, CAUSAL: tl.constexpr, NEED_Q: tl.constexpr, NEED_MASK: tl.constexpr,
    PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """dq [M, BLOCK_D] with what columns first .. first + W add; what they give the mask is written. Scores: [M, W]."""
    S, P, end, L = axis
    number, head, _, drops = draws
    queries, grads, lse, delta = given
    pivot, rest = lse
    column = first + tl.arange(0, W)
    key, value = load_keys(
        keys, values, axis, draws, column,
        FEATURES.D, FEATURES.BLOCK_D, FEATURES.PREFIX_DROPOUT, PART, BOUND,
    )  # fmt: skip
    score = tl.dot(queries, tl.trans(key), input_precision=FEATURES.PRECISION)
    dweight = tl.dot(grads, tl.trans(value), input_precision=FEATURES.PRECISION)
    if FEATURES.EXP == RAW:
        pivot *= LOG2E
    else:
        score *= scale
    if FEATURES.PREFIX_DROPOUT and PART != OWN:
        gain = tl.where(column >= S, drops.prefix_gain, 1.0)[None, :]
        score *= gain
        dweight *= gain
    if softcap is not None:
        score, slope = capped(score, softcap)
    mask, stride_ml, stride_ms = bias
    score = masked(
        score, mask, stride_ml, stride_ms, row[:, None], column[None, :], S, end, L, window,
        FEATURES.MASK, FEATURES.KEY_MASK, CAUSAL, FEATURES.PREFIX_IN_WINDOW, PART, BOUND,
    )  # fmt: skip
    if softcap is not None:
        weight = natural_weights(score, pivot[:, None], rest[:, None], FEATURES.EXP)  # no score is large
    else:
        weight = weights(score, pivot[:, None], rest[:, None], scale * LOG2E, FEATURES.EXP)
    if FEATURES.DROPOUT:
        drawn = draw_column(column, S, P, PART)
        keep = kept(number, row[:, None], drawn[None, :], head, ATTENTION, drops.threshold)
        dweight *= keep * drops.keep_scale
    dscore = weight * (dweight - delta[:, None])
    if NEED_MASK and PART != PREFIX:
        inside = (column < S)[None, :] & (row < L)[:, None]
        tl.store(dmask + (head * L + row)[:, None] * S + column[None, :], dscore, mask=inside)
    if NEED_Q:
        if softcap is not None:
            dscore *= slope
        if FEATURES.PREFIX_DROPOUT and PART != OWN:
            dscore *= gain
        dq = tl.dot(dscore.to(key.dtype), key, dq, input_precision=FEATURES.PRECISION)
    return dq


@triton.jit
def over_keys(
    dq, given, keys, values, bias, axis, draws, dmask, row, row0, scale, softcap, window,
    FEATURES: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, REST_LOOP: tl.constexpr, TAIL: tl.constexpr,  # as in prefix_attn_fwd
    PACKED: tl.constexpr,  # own keys end in masked tiles, as under causality
    NEED_Q: tl.constexpr, NEED_MASK: tl.constexpr,
):  # fmt: skip
    """dq of M queries, from `row0` on, over every key that one of them sees, in the order of prefix_attn_fwd."""
    S, P, end, L = axis
    own_axis = (S, P, S, L)
    open_first, open_end, own_end = 0, S // BLOCK_N * BLOCK_N, S
    if window.first is not None:
        span = key_tiles(window, row0, M, S, FEATURES.CAUSAL, BLOCK_N)
        _, _, open_first, open_end, masked_tiles = span
        for i in range(0, masked_tiles):
            first = masked_tile(i, span, BLOCK_N)
            dq = _columns(
                dq, given, keys, values, bias, own_axis, draws, dmask, row, first, scale, softcap, window,
                FEATURES, BLOCK_N, FEATURES.CAUSAL, NEED_Q, NEED_MASK, OWN, True,
            )  # fmt: skip
    elif FEATURES.CAUSAL:
        hidden = tl.maximum(row0 + S - L + 1, 0)
        open_end = tl.minimum(S, hidden) // BLOCK_N * BLOCK_N
        if not NEED_MASK:  # whose gradient is written everywhere
            own_end = tl.minimum(S, tl.maximum(row0 + M + S - L, 0))
    for first in range(open_first, open_end, BLOCK_N):
        dq = _columns(
            dq, given, keys, values, bias, own_axis, draws, dmask, row, first, scale, softcap, Window(None, None, None),
            FEATURES, BLOCK_N, False, NEED_Q, NEED_MASK, OWN, False,
        )  # fmt: skip
    first_rest = open_end
    if window.first is not None:
        first_rest = S
    elif FEATURES.CAUSAL or PACKED:
        for first in range(open_end, own_end, BLOCK_N):
            dq = _columns(
                dq, given, keys, values, bias, own_axis, draws, dmask, row, first, scale, softcap,
                Window(None, None, None), FEATURES, BLOCK_N, FEATURES.CAUSAL, NEED_Q, NEED_MASK, OWN, True,
            )  # fmt: skip
        first_rest = S
    tail = end
    if TAIL:
        tail = first_rest
        if REST_LOOP:
            tail += (end - first_rest) // BLOCK_N * BLOCK_N
    if FEATURES.PREFIX_IN_WINDOW:
        first_rest = prefix_columns(window, row0, S, end, BLOCK_N)
    if REST_LOOP:
        for first in range(first_rest, tail, BLOCK_N):
            dq = _columns(
                dq, given, keys, values, bias, axis, draws, dmask, row, first, scale, softcap,
                window if FEATURES.PREFIX_IN_WINDOW else Window(None, None, None),
                FEATURES, BLOCK_N, False, NEED_Q, NEED_MASK, REST, TAIL == 0,
            )  # fmt: skip
    if TAIL:
        if not FEATURES.PREFIX_IN_WINDOW or prefix_seen(window, row0):
            dq = _columns(
                dq, given, keys, values, bias, axis, draws, dmask, row, tail, scale, softcap,
                window if FEATURES.PREFIX_IN_WINDOW else Window(None, None, None),
                FEATURES, TAIL, False, NEED_Q, NEED_MASK, REST, True,
            )  # fmt: skip
    return dq
