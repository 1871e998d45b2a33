"""What the prefix-attention kernels share: tiles of the virtual key axis, masks, softmax weights and Philox.

A sample's keys are one axis of S + length columns: its own keys, then its prefix, each read where it lies. Only the
tile that holds the end of the one and the start of the other chooses an address for each row, so a prefix that fits
into the padding of the last tile of own keys costs no tile.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # of nine bits: n times it is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)
SMALL_TANH = tl.constexpr(0.3025)  # the square of 0.55
HIDDEN = tl.constexpr(-1e37)  # a mask value from here down hides its key as -inf does
MINUS_INF = tl.constexpr(float("-inf"))
OWN, PREFIX, SPLIT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the part of the key axis that a tile lies in
RAW, NATURAL, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # see weights
RUN = tl.constexpr(8)  # tiles whose sums are added in one chain, in float32: see compensated_add
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ATTENTION, PREFIX_K, PREFIX_V = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds of draws, as in philox.py


@triton.jit
def head_of(x, strides, b, h):
    """Base of one head of a sample."""
    return x + b * strides.sample + h * strides.head


@triton.jit
def load_rows(base, stride, row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of q, out or dout, zero where `inside` [M] is False: [M, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    return tl.load(base + row[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, stride, row, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    tl.store(base + row[:, None] * stride + d[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(
    own,  # base of the sample's own keys or values, one head
    prefix,  # base of its prefix's
    stride_own,
    stride_prefix,
    column,  # [W]
    S,
    end,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BOUND: tl.constexpr,  # columns may lie at or past `end`: those are zero
):
    """Keys or values of the virtual axis: [W, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    if PART == OWN:
        rows = own + column * stride_own
    elif PART == PREFIX:
        rows = prefix + (column - S) * stride_prefix
    else:
        rows = tl.where(column < S, own + column * stride_own, prefix + (column - S) * stride_prefix)
    address = rows[:, None] + d[None, :]
    if BOUND:
        mask = (column < end)[:, None]
        if BLOCK_D != D:
            mask = mask & (d < D)[None, :]
        return tl.load(address, mask=mask, other=0.0)
    if BLOCK_D != D:
        return tl.load(address, mask=(d < D)[None, :], other=0.0)
    return tl.load(address)


@triton.jit
def kept(seed, row, column, head, KIND: tl.constexpr, threshold):
    """1 where an element survives dropout, else 0: word column % 4 of counter (column // 4, row, head, KIND).

    As in philox.py; `row`, `column` and `head` broadcast; `threshold` is floor(p * 2**32). An integer and no bool,
    because Triton moves the result into the layout of a product's operand, which it cannot do with single bits.
    """
    zero = row * 0 + column * 0 + head * 0
    c0, c1 = (column // 4 + zero).to(tl.uint32), (row + zero).to(tl.uint32)
    c2, c3 = (head + zero).to(tl.uint32), (zero + KIND).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    word = column % 4
    drawn = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return 1 + ((drawn.to(tl.int64) - threshold) >> 63).to(tl.int32)  # the sign of the difference is the answer


@triton.jit
def drop_prefix(
    tile, seed, column, S, kv_head, KIND: tl.constexpr, threshold, BLOCK_D: tl.constexpr, PART: tl.constexpr
):
    """Prefix dropout on keys or values [W, BLOCK_D] (zeros; the gain is applied to what they are multiplied into)."""
    keep = kept(seed, (column - S)[:, None], tl.arange(0, BLOCK_D)[None, :], kv_head, KIND, threshold)
    if PART == SPLIT:
        keep = tl.maximum(keep, tl.minimum(tl.maximum(S - column, 0), 1)[:, None])  # 1 at own keys
    return tile * keep.to(tile.dtype)


@triton.jit
def draw_column(column, S, P, PART: tl.constexpr):
    """The column of attention dropout's counter, which numbers prefix rows first."""
    if PART == OWN:
        return column + P
    if PART == PREFIX:
        return column - S
    return tl.where(column < S, column + P, column - S)


@triton.jit
def capped(score, softcap):
    """softcap * tanh(score / softcap), and its derivative.

    1 - exp loses what is small: a score far below its cap would keep the cap's last bits only, so there tanh is a
    polynomial, x + x^3 P(x^2), with a relative error of 4e-8.
    """
    x = score * (1.0 / softcap)
    square = x * x
    small = x + x * square * (-0.33332947 + square * (0.13320725 + square * (-0.05267181 + square * 0.01643758)))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))  # at most 1: nothing overflows
    part = e / (1.0 + e)
    large = 1.0 - 2.0 * part  # rounded once where it is near 1
    tanh = tl.where(square < SMALL_TANH, small, tl.where(x < 0.0, -large, large))  # a nan stays
    # near the cap, 1 - tanh^2 is what rounding left
    return softcap * tanh, tl.where(square < SMALL_TANH, 1.0 - tanh * tanh, 4.0 * part * (1.0 - part))


@triton.jit
def masked(
    score,  # [M, W] or its transpose, as row and column broadcast
    mask,  # base of the sample's and head's mask
    stride_l,
    stride_s,
    row,  # [M, 1] or [1, M]
    column,  # [1, W] or [W, 1]
    S,
    end,
    L,
    window,  # no window where it hides nothing of the tile
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,  # the mask is the same for every query
    CAUSAL: tl.constexpr,
    PREFIX_IN_WINDOW: tl.constexpr,
    PART: tl.constexpr,
    BOUND: tl.constexpr,
):
    """Scores with the mask added, and -inf at each key that the query does not see."""
    if PART != PREFIX:
        if MASK != NO_MASK:
            inside = column < tl.minimum(S, end)
            where = mask + column.to(tl.int64) * stride_s
            if not KEY_MASK:
                inside = inside & (row < L)
                where = where + row.to(tl.int64) * stride_l
            value = tl.load(where, mask=inside, other=0)
            if MASK == BOOL_MASK:
                seen = value != 0
                if PART == SPLIT:
                    seen = seen | (column >= S)
                score = tl.where(seen, score, MINUS_INF)
            else:
                value = value.to(tl.float32)
                score = tl.where(value <= HIDDEN, MINUS_INF, score + value)
        if CAUSAL:
            seen = column <= row + (S - L)
            if PART == SPLIT:
                seen = seen | (column >= S)
            score = tl.where(seen, score, MINUS_INF)
    if window.first is not None:
        score = windowed(score, window, row, column, S, end, PREFIX_IN_WINDOW, PART)
    if BOUND:
        score = tl.where(column < end, score, MINUS_INF)
    return score


@triton.jit
def windowed(score, window, row, column, S, end, PREFIX_IN_WINDOW: tl.constexpr, PART: tl.constexpr):
    """Scores with -inf where a sliding window hides the key; the right bound never hides a row of the prefix."""
    position = row + window.first
    if window.left is not None:
        at = column
        if PART == PREFIX:
            at = column - end
        elif PART == SPLIT and PREFIX_IN_WINDOW:
            at = tl.where(column < S, column, column - end)
        seen = at >= position - window.left
        if PART == SPLIT and not PREFIX_IN_WINDOW:
            seen = seen | (column >= S)
        score = tl.where(seen, score, MINUS_INF)
    if PART != PREFIX and window.right is not None:
        seen = column <= position + window.right
        if PART == SPLIT:
            seen = seen | (column >= S)
        score = tl.where(seen, score, MINUS_INF)
    return score


@triton.jit
def natural_weights(score, pivot, rest, EXP: tl.constexpr):
    """exp(score - pivot - rest), where `rest` is what rounding left of the pivot.

    EXACT: the last bits too. Both score - pivot and its product with log2(e) round to a part of their size, so the
    whole powers of two are taken out of the pivot first, where that is exact.
    """
    x = score - pivot
    if EXP == EXACT:
        n = tl.floor(tl.where(x < -200.0, -200.0, x) * LOG2E + 0.5)  # exp is zero from -104 on; a nan stays
        return tl.exp2(n) * tl.exp2((score + (-pivot - n * LN2_HIGH) - (n * LN2_LOW + rest)) * LOG2E)
    return tl.exp2(x * LOG2E)


@triton.jit
def below_top(score, top, factor, EXP: tl.constexpr):
    """exp(score - top) in the forward, where `top` is the largest score so far.

    RAW: both lack the scale, and factor = scale * log2(e) meets their difference, which is 0 at the largest. Otherwise
    both are in natural units: a large bias, added in units of log2, would round differently than lse does.
    """
    if EXP == RAW:
        return tl.exp2((score - top) * factor)
    return natural_weights(score, top, 0.0, EXP)


@triton.jit
def weights(score, pivot, rest, factor, EXP: tl.constexpr):
    """exp(score - lse) in the backward, at most 1; with RAW scores lack the scale and pivot is in units of log2.

    Past 2**31 what is left of a score and of lse, rounded differently, would be more than an exponent holds.
    """
    if EXP == RAW:
        return tl.exp2(at_most(score * factor - pivot, 0.0))
    return natural_weights(at_most(score, pivot), pivot, rest, EXP)


@triton.jit
def at_most(x, most):
    """The smaller one; a nan stays."""
    return tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def compensated_add(total, row, inside, rest, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds `rest` [M, BLOCK_D] to rows of `total`, float32, which hold nothing yet if `first`.

    Returns what that rounds away, the rest to go on from: a long sum is kept in two floats, and only one in registers.
    """
    before = tl.where(first, 0.0, load_rows(total, D, row, inside, D, BLOCK_D))
    after = before + rest
    from_rest = after - before
    store_rows(total, D, row, inside, after, D, BLOCK_D)
    tl.debug_barrier()  # other threads of the program read it
    return (before - (after - from_rest)) + (rest - from_rest)


@triton.jit
def whole_rows(total, row, inside, rest, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The whole sum, [M, BLOCK_D]."""
    return rest + tl.where(first, 0.0, load_rows(total, D, row, inside, D, BLOCK_D))


@triton.jit
def load_lse(lse, row, inside):
    """[M] in float32, and what that leaves of float64.

    inf and 0 where a query has no key or is none itself, so that its weights are exp(-inf).
    """
    value = tl.load(lse + row, mask=inside, other=float("inf"))
    value = tl.where(value == MINUS_INF, float("inf"), value)
    pivot = value.to(tl.float32)
    finite = pivot != float("inf")
    rest = tl.where(finite, value, 0.0) - tl.where(finite, pivot, 0.0)
    return pivot, rest.to(tl.float32)


@triton.jit
def prefix_of(b, prefix_ids, lengths, P, HAS_IDS: tl.constexpr, PER_SAMPLE: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Which of the prefixes [T, Hkv, P, D] sample `b` uses, and how much of it."""
    t = b * 0
    if HAS_IDS:
        t = tl.load(prefix_ids + b)
    elif PER_SAMPLE:
        t = b
    length = P
    if HAS_LENGTHS:
        length = tl.load(lengths + b).to(tl.int32)
    return t, length
