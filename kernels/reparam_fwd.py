"""The network that makes a prefix, forward: its hidden rows, then all keys and values, for all networks at once.

Columns of the second product are counted in the order of kv, (layer, key or value, head, d): a tile of them is
then stored in one piece for each p, and an interleaved matrix, whose keys and values alternate, is only read by other
rows, each of which lies in one piece either way.
"""

import triton
import triton.language as tl

NONE, TANH, RELU, GELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def tanh(z):
    """To a unit or two in the last place everywhere: 1 - 2 / (exp(2 z) + 1) has an error of 1, not of z, near 0."""
    size = tl.abs(z)
    size = tl.where(size > 20.0, 20.0, size)  # where it is one, and nothing overflows; a nan stays
    square = size * size  # the polynomial: (tanh(z) / z - 1) / z**2 up to z = 0.6, fitted to 3e-9
    series = -0.0059058564 * square + 0.020805374
    series = ((series * square - 0.05378668) * square + 0.13331959) * square - 0.333333
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, size * (square * series) + size, far) * tl.where(z < 0.0, -1.0, 1.0)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == TANH:
        return tanh(z)
    if ACTIVATION == RELU:
        return tl.where(z < 0.0, 0.0, z)  # a nan stays
    if ACTIVATION == GELU:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def source_row(column, HEADS_D, INTERLEAVED: tl.constexpr):
    """The row of w2, counted within its network, that makes a column; HEADS_D = Hkv D."""
    if INTERLEAVED:
        layer = column // (2 * HEADS_D)
        within = column - layer * 2 * HEADS_D
        key_or_value = within // HEADS_D
        return (layer * HEADS_D + within - key_or_value * HEADS_D) * 2 + key_or_value
    return column


@triton.jit
def reparam_hidden(
    x,  # [G, P, E]
    w1,  # [G, M, E]
    b1,  # [G, M]
    z,  # [G, P, M]
    h,  # [G, P, M]
    P,
    E,
    M,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = x w1^T + b1 and h = act(z), a tile of rows and columns of one network for each program."""
    p_tiles, m_tiles = tl.cdiv(P, BLOCK_P), tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    p = program % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m = program // p_tiles % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    g = (program // p_tiles // m_tiles).to(tl.int64)
    rows = x + g * P * E + p[:, None] * E
    columns = w1 + g * M * E + m[None, :] * E
    acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for k0 in range(0, E, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(rows + k[None, :], mask=(p < P)[:, None] & (k < E)[None, :], other=0.0)
        b = tl.load(columns + k[:, None], mask=(m < M)[None, :] & (k < E)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(b1 + g * M + m, mask=m < M, other=0.0)[None, :]
    inside = (p < P)[:, None] & (m < M)[None, :]
    where = p[:, None] * M + m[None, :]
    tl.store(z + g * P * M + where, acc, mask=inside)
    tl.store(h + g * P * M + where, activated(acc, ACTIVATION), mask=inside)


@triton.jit
def reparam_kv(
    h,  # [G, P, M]
    w2,  # [G, O, M]
    b2,  # [G, O]
    kv,  # [G O / D, P, D]
    P,
    O,
    M,
    HEADS_D,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """kv = h w2^T + b2 where the attention reads it. Programs that share rows of w2 follow one another."""
    p_tiles, o_tiles = tl.cdiv(P, BLOCK_P), tl.cdiv(O, BLOCK_O)
    program = tl.program_id(0)
    p = program % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    column = program // p_tiles % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    g = (program // p_tiles // o_tiles).to(tl.int64)
    o = source_row(column, HEADS_D, INTERLEAVED)
    weights = w2 + g * O * M + o[:, None] * M
    rows = h + g * P * M + p[None, :] * M
    acc = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for k0 in range(0, M, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(weights + k[None, :], mask=(column < O)[:, None] & (k < M)[None, :], other=0.0)
        b = tl.load(rows + k[:, None], mask=(p < P)[None, :] & (k < M)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(b2 + g * O + o, mask=column < O, other=0.0)[:, None]
    where = (column // D * (P * D) + column % D)[:, None] + p[None, :] * D
    inside = (column < O)[:, None] & (p < P)[None, :]
    tl.store(kv + g * O * P + where, acc.to(kv.dtype.element_ty), mask=inside)
