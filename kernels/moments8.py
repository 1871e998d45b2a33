"""A tile of a moment, read and written: numbers as they are, or the codes that prefixattn/reparam/moments8.py defines.

A tile of codes is as wide as a block of numbers with one scale, so that a block's new scale is a maximum over the tile.
Of the same numbers codes are those of the definition to the bit: every step is exact or rounded once, and fused
multiplications and additions fuse exact products only.
"""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.0**-112)


@triton.jit
def coin(start, m, salt, SIGNED: tl.constexpr):
    """A number in [0, 1) for columns m of rows that start at numbers `start`, int64, of the matrix."""
    x = start.to(tl.uint32)[:, None] + m.to(tl.uint32)[None, :]
    x = x ^ (start >> 32).to(tl.uint32)[:, None] ^ salt.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    if not SIGNED:
        x = (x << 16) | (x >> 16)
    return (x >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def decoded(code, scale, SIGNED: tl.constexpr):
    """Codes [BLOCK_O, BLOCK_M], a scale for each row."""
    if SIGNED:
        k = code.to(tl.float32) - 127.0
        return k * tl.abs(k) * tl.div_rn(scale, 127.0 * 127.0)[:, None]
    k = code.to(tl.float32)
    root = k * k * tl.div_rn(scale, 255.0 * 255.0)[:, None]
    return root * root


@triton.jit
def encoded(values, chance, SIGNED: tl.constexpr):
    """The codes of values, and the scale of each row; `chance` is the coin."""
    MOST: tl.constexpr = 127.0 if SIGNED else 255.0
    size = tl.abs(values) if SIGNED else tl.sqrt_rn(values)
    scale = tl.max(size, 1)
    scale = tl.where(scale < SMALLEST, 0.0, scale)
    inverse = tl.where(scale > 0, tl.div_rn(MOST * MOST, tl.where(scale > 0, scale, 1.0)), 0.0)
    square = size * inverse[:, None]  # in units in which a code k away from zero stands for k * k
    low = tl.minimum(tl.floor(tl.sqrt_rn(square)), MOST - 1.0)
    below, gap = low * low, low + low + 1.0
    if SIGNED:
        code = low + (square - below > chance * gap).to(tl.float32)
        code = 127.0 + tl.where(values < 0, -code, code)
    else:  # of fourth powers
        code = low + ((square - below) * (square + below) > chance * (gap * (below + below + gap))).to(tl.float32)
        code = tl.where((size > 0) & (code == 0), 1.0, code)
    return code.to(tl.int32).to(tl.uint8), scale


@triton.jit
def load_moment(kept, scale, where, at, readable, rows, SIGNED: tl.constexpr):
    """A tile at `where`, float32; of codes, with the scales at `at`, one for each row that `rows` admits."""
    if kept.dtype.element_ty == tl.uint8:
        code = tl.load(kept + where, mask=readable, other=127 if SIGNED else 0)
        return decoded(code, tl.load(scale + at, mask=rows, other=0.0), SIGNED)
    return tl.load(kept + where, mask=readable, other=0.0).to(tl.float32)


@triton.jit
def store_moment(kept, scale, values, where, at, start, m, salt, writable, rows, SIGNED: tl.constexpr):
    """`values` of a tile, zero past its matrix, go where load_moment() found them."""
    if kept.dtype.element_ty == tl.uint8:
        code, new = encoded(values, coin(start, m, salt, SIGNED), SIGNED)
        tl.store(kept + where, code, mask=writable)
        tl.store(scale + at, new, mask=rows)
    else:
        tl.store(kept + where, values.to(kept.dtype.element_ty), mask=writable)
