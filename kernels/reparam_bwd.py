"""The gradients of the second matrix of the network that makes a prefix, and of the hidden rows behind it.

The rows' gradient is read where it lies: as rows [G, P, O] (PLAIN), or as dkv, the gradient of all keys and values.
"""

import triton
import triton.language as tl

from prefixattn.kernels.reparam_fwd import source_row

PLAIN, BLOCKED, INTERLEAVED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how columns of dy are counted


@triton.jit
def load_dy(dy, p, column, P, end, O, D: tl.constexpr, LAYOUT: tl.constexpr):
    """Rows p and columns of one network's dy, zero from `end` on: [BLOCK_P, BLOCK_O], float32."""
    if LAYOUT == PLAIN:
        where = p[:, None] * O + column[None, :]
    else:
        where = p[:, None] * D + (column // D * (P * D) + column % D)[None, :]
    return tl.load(dy + where, mask=(p < P)[:, None] & (column < end)[None, :], other=0.0).to(tl.float32)


@triton.jit
def reparam_dh(
    dy,  # [G, P, O], or dkv
    w2,  # [G, O, M]
    part,  # [parts, G, P, M]
    G,
    P,
    O,
    M,
    HEADS_D,
    rows,  # of w2 for each part
    scale,
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A part of dh = dy w2, the sum over some rows of w2, for a tile of P and one of M."""
    p_tiles, m_tiles = tl.cdiv(P, BLOCK_P), tl.cdiv(M, BLOCK_M)
    program, i = tl.program_id(0), tl.program_id(1)
    p = program % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m = program // p_tiles % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    g = (program // p_tiles // m_tiles).to(tl.int64)
    end = tl.minimum((i + 1) * rows, O)
    acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for first in range(i * rows, end, BLOCK_O):
        column = first + tl.arange(0, BLOCK_O)
        d = load_dy(dy + g * P * O, p, column, P, end, O, D, LAYOUT)
        o = source_row(column, HEADS_D, LAYOUT == INTERLEAVED)
        inside = (column < end)[:, None] & (m < M)[None, :]
        w = tl.load(w2 + g * O * M + (o[:, None] * M + m[None, :]), mask=inside, other=0.0)
        acc = tl.dot(d, w, acc, input_precision=PRECISION)
    where = p[:, None] * M + m[None, :]
    tl.store(part + (i * G + g) * P * M + where, acc * scale, mask=(p < P)[:, None] & (m < M)[None, :])


@triton.jit
def reparam_dw2(
    dy,  # dkv
    h,  # [G, P, M]
    dw2,  # [G, O, M]
    P,
    O,
    M,
    HEADS_D,
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of dw2 = dy^T h, the sum over P in steps of BLOCK_P."""
    o_tiles, m_tiles = tl.cdiv(O, BLOCK_O), tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    m = program % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program // m_tiles % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    g = (program // m_tiles // o_tiles).to(tl.int64)
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        d = load_dy(dy + g * P * O, p, column, P, O, O, D, LAYOUT)
        there = (p < P)[:, None] & (m < M)[None, :]
        hidden = tl.load(h + g * P * M + (p[:, None] * M + m[None, :]), mask=there, other=0.0)
        acc = tl.dot(tl.trans(d), hidden, acc, input_precision=PRECISION)
    o = source_row(column, HEADS_D, LAYOUT == INTERLEAVED)
    where = o[:, None] * M + m[None, :]
    tl.store(dw2 + g * O * M + where, acc, mask=(column < O)[:, None] & (m < M)[None, :])
