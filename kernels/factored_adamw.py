"""One sweep over a matrix whose gradient is known by its factors, dy^T h: AdamW, or SGD with momentum.

A program has some columns of one network's matrix and some of its rows, goes down the rows a tile at a time, and reads
and writes each tile of the matrix and of its moments once. The gradient of a tile is a product of what it has of dy and
h; nobody stores it. Before the tile changes it is multiplied by dy, which in the end makes the program's part of dh.

Rows are counted as columns of dy are, which is read where it lies: an interleaved matrix gives a tile every second row.
"""

import triton
import triton.language as tl

from prefixattn.kernels.moments8 import load_moment, store_moment
from prefixattn.kernels.reparam_bwd import INTERLEAVED, load_dy
from prefixattn.kernels.reparam_fwd import source_row


@triton.jit
def load_hidden(h, p, m, P, M):
    """Rows p and columns m of one network's h: [BLOCK_P, BLOCK_M]."""
    return tl.load(h + p[:, None] * M + m[None, :], mask=(p < P)[:, None] & (m < M)[None, :], other=0.0)


@triton.jit
def start(WANT_DH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):
    """What dh is added to; a stand-in where nobody wants it."""
    if WANT_DH:
        acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((1, 1), tl.float32)
    return acc


@triton.jit
def factors(
    dy,  # [P, O], or the part of dkv, of one network
    h,  # [P, M]
    w,  # [BLOCK_O, BLOCK_M]
    acc,  # [BLOCK_P, BLOCK_M]
    column,
    m,
    P,
    end,
    O,
    M,
    scale,
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    ONCE: tl.constexpr,  # BLOCK_P rows are one step
    WANT_DH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEP_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_DH: tl.constexpr,
):
    """The gradient of a tile of w, and the sum for dh with the tile's share added."""
    if ONCE:
        d = load_dy(dy, tl.arange(0, BLOCK_P), column, P, end, O, D, LAYOUT)
        g = tl.dot(tl.trans(d), load_hidden(h, tl.arange(0, BLOCK_P), m, P, M), input_precision=PRECISION)
        if WANT_DH:
            acc = tl.dot(d, w, acc, input_precision=PRECISION_DH)
    else:
        g = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        for p0 in range(0, P, STEP_P):
            p = p0 + tl.arange(0, STEP_P)
            d = load_dy(dy, p, column, P, end, O, D, LAYOUT)
            g = tl.dot(tl.trans(d), load_hidden(h, p, m, P, M), g, input_precision=PRECISION)
        if WANT_DH:
            d = load_dy(dy, tl.arange(0, BLOCK_P), column, P, end, O, D, LAYOUT)
            acc = tl.dot(d, w, acc, input_precision=PRECISION_DH)
    return g * scale, acc


@triton.jit
def store_share(part, acc, i, g, m, G, P, M, BLOCK_P: tl.constexpr):
    """The program's part of dh."""
    p = tl.arange(0, BLOCK_P)
    base = part + (i * G + g) * P * M
    tl.store(base + (p[:, None] * M + m[None, :]), acc, mask=(p < P)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["salt"])
def factored_adamw(
    w2,  # [G, O, M]
    exp_avg,  # [G, O, M]
    exp_avg_sq,  # [G, O, M]
    exp_avg_scale,  # [G, O, blocks], if exp_avg are codes; then BLOCK_M is a whole block, as for exp_avg_sq
    exp_avg_sq_scale,  # [G, O, blocks], if exp_avg_sq are codes
    h,  # [G, P, M]
    dy,  # [G, P, O], or dkv
    part,  # [parts, G, P, M]
    G,
    P,
    O,
    M,
    HEADS_D,
    rows,  # of w2 for each program
    scale,
    decay,  # 1 - lr * weight_decay
    rest1,  # 1 - beta1
    beta2,
    rest2,
    eps,
    step_size,  # lr / (1 - beta1 ** step)
    root,  # sqrt(1 - beta2 ** step)
    salt,  # of the coins of this step, int32
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    WANT_DH: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEP_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_DH: tl.constexpr,
):
    m_tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    g = (tl.program_id(0) // m_tiles).to(tl.int64)
    i = tl.program_id(1)
    end = tl.minimum((i + 1) * rows, O)
    w2 += g * O * M
    exp_avg += g * O * M
    exp_avg_sq += g * O * M
    exp_avg_scale += g * O * m_tiles
    exp_avg_sq_scale += g * O * m_tiles
    h += g * P * M
    dy += g * P * O
    acc = start(WANT_DH, BLOCK_P, BLOCK_M)
    for first in tl.range(i * rows, end, BLOCK_O, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK_O)
        row = source_row(column, HEADS_D, LAYOUT == INTERLEAVED)
        where = row[:, None] * M + m[None, :]
        scale_at = row * m_tiles + tl.program_id(0) % m_tiles
        readable = (column < end)[:, None] & (m < M)[None, :]
        w = tl.load(w2 + where, mask=readable, other=0.0)
        average = load_moment(exp_avg, exp_avg_scale, where, scale_at, readable, column < end, True)
        square = load_moment(exp_avg_sq, exp_avg_sq_scale, where, scale_at, readable, column < end, False)
        grad, acc = factors(
            *(dy, h, w, acc, column, m, P, end, O, M, scale, D, LAYOUT, ONCE, WANT_DH),
            *(BLOCK_P, STEP_P, BLOCK_O, BLOCK_M, PRECISION, PRECISION_DH),
        )
        average += rest1 * (grad - average)
        square = square * beta2 + rest2 * grad * grad
        w = w * decay - step_size * tl.div_rn(average, tl.div_rn(tl.sqrt_rn(square), root) + eps)
        tl.store(w2 + where, w, mask=readable)
        place, rows_there = (g * O + row) * M, column < end
        store_moment(exp_avg, exp_avg_scale, average, where, scale_at, place, m, salt, readable, rows_there, True)
        store_moment(exp_avg_sq, exp_avg_sq_scale, square, where, scale_at, place, m, salt, readable, rows_there, False)
    if WANT_DH:
        store_share(part, acc * scale, i, g, m, G, P, M, BLOCK_P)


@triton.jit
def factored_sgd(
    w2,  # [G, O, M]
    buffer,  # [G, O, M], if MOMENTUM
    h,  # [G, P, M]
    dy,  # [G, P, O], or dkv
    part,  # [parts, G, P, M]
    G,
    P,
    O,
    M,
    HEADS_D,
    rows,  # of w2 for each program
    scale,
    lr,
    momentum,
    rest,  # 1 - dampening
    weight_decay,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,  # the buffer holds nothing yet
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    WANT_DH: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEP_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_DH: tl.constexpr,
):
    m_tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    g = (tl.program_id(0) // m_tiles).to(tl.int64)
    i = tl.program_id(1)
    end = tl.minimum((i + 1) * rows, O)
    w2 += g * O * M
    buffer += g * O * M
    h += g * P * M
    dy += g * P * O
    acc = start(WANT_DH, BLOCK_P, BLOCK_M)
    for first in tl.range(i * rows, end, BLOCK_O, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK_O)
        where = source_row(column, HEADS_D, LAYOUT == INTERLEAVED)[:, None] * M + m[None, :]
        readable = (column < end)[:, None] & (m < M)[None, :]
        w = tl.load(w2 + where, mask=readable, other=0.0)
        step, acc = factors(
            *(dy, h, w, acc, column, m, P, end, O, M, scale, D, LAYOUT, ONCE, WANT_DH),
            *(BLOCK_P, STEP_P, BLOCK_O, BLOCK_M, PRECISION, PRECISION_DH),
        )
        step += weight_decay * w
        if MOMENTUM:
            moved = step
            if not FIRST:
                moved = momentum * tl.load(buffer + where, mask=readable, other=0.0).to(tl.float32) + rest * step
            tl.store(buffer + where, moved.to(buffer.dtype.element_ty), mask=readable)
            step = step + momentum * moved if NESTEROV else moved
        tl.store(w2 + where, w - lr * step, mask=readable)
    if WANT_DH:
        store_share(part, acc * scale, i, g, m, G, P, M, BLOCK_P)
