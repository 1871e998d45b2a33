"""Which tiles a sliding window leaves: tiles that it hides as a whole are not visited, and only its edges are masked.

`window` is a Window of arguments.py. Positions are columns of own keys; row i of a prefix lies at i - its length.
"""

import triton
import triton.language as tl

from prefixattn.kernels.tiles import OWN, PREFIX

NOWHERE = tl.constexpr(2**30)


@triton.jit
def _span(begin, all_from, all_to, stop, BLOCK: tl.constexpr):
    """Tiles that meet begin .. stop: the first, how many masked ones are ahead of the open ones, where these begin and
    end, how many are masked in all. In an open one, between all_from and all_to, nothing is hidden.
    """
    first = tl.maximum(begin, 0) // BLOCK * BLOCK
    last = tl.cdiv(stop, BLOCK) * BLOCK
    open_first = tl.minimum(tl.cdiv(tl.maximum(all_from, 0), BLOCK) * BLOCK, last)
    open_end = tl.maximum(tl.minimum(tl.maximum(all_to, 0), last) // BLOCK * BLOCK, open_first)
    ahead = (open_first - first) // BLOCK
    return first, ahead, open_first, open_end, ahead + tl.cdiv(stop - open_end, BLOCK)


@triton.jit
def masked_tile(i, span, BLOCK: tl.constexpr):
    """Where masked tile i begins: those at both edges are one loop, whose code is compiled once."""
    first, ahead, _, open_end, _ = span
    return tl.where(i < ahead, first + i * BLOCK, open_end + (i - ahead) * BLOCK)


@triton.jit
def key_tiles(window, row0, M: tl.constexpr, S, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of own keys that one of M queries from `row0` on sees."""
    at = row0 + window.first
    right = window.right
    if CAUSAL:
        right = 0
    begin, all_from = 0, 0
    if window.left is not None:
        begin, all_from = at - window.left, tl.minimum(at + M, S) - 1 - window.left
    stop, all_to = S, S
    if right is not None:
        stop, all_to = tl.minimum(tl.maximum(at + M + right, 0), S), tl.minimum(at + 1 + right, S)
    return _span(begin, all_from, all_to, stop, BLOCK)


@triton.jit
def query_tiles(
    window, first, W: tl.constexpr, axis, end, CAUSAL: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr
):
    """Tiles of the queries ahead of `end` that see one of W columns from `first` on, and the first query past all."""
    _, _, last, L = axis
    right = window.right
    if CAUSAL:
        right = 0
    origin = window.first  # what is taken from a column for the row of the query at its position
    if PART == PREFIX:
        origin += last
    begin, all_from = 0, 0
    column, past = first - origin, tl.minimum(first + W, last) - origin
    if PART == OWN and right is not None:
        begin, all_from = column - right, past - 1 - right
    stop, all_to = L, tl.cdiv(end, BLOCK) * BLOCK
    if window.left is not None:
        stop, all_to = past + window.left, column + window.left + 1
    return _span(begin, all_from, all_to, tl.minimum(tl.maximum(stop, 0), end), BLOCK), stop


@triton.jit
def prefix_seen(window, row0):
    """Whether the query at `row0`, which sees most of the prefix, sees any of it."""
    return row0 + window.first < window.left


@triton.jit
def prefix_columns(window, row0, S, end, BLOCK: tl.constexpr):
    """Where the prefix's tiles begin that a query from `row0` on sees: `end` if there are none."""
    hidden = tl.maximum(end - S + row0 + window.first - window.left, 0) // BLOCK * BLOCK
    return tl.where(prefix_seen(window, row0), S + hidden, end)
