"""What the kernels do with a memory: phi(q) @ memory added to out, and its share of the gradient of q.

phi is computed in float32 and is then, as softmax's weights are, an operand in the inputs' type of a product that is
summed in float32. The queries of a finished tile are read again, a chunk of the sum at a time.
"""

import triton
import triton.language as tl

from prefixattn.kernels.tiles import load_rows

NO_MEMORY, NONE, ELU, GELU, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
CHUNK = tl.constexpr(32)  # elements of the head summed over at a time


@triton.jit
def phi(x, PHI: tl.constexpr):
    if PHI == ELU:
        return tl.where(x > 0.0, x, tl.exp(x) - 1.0)
    if PHI == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if PHI == RELU:
        return tl.where(x < 0.0, 0.0, x)  # a nan stays
    return x


@triton.jit
def times_slope(x, grad, PHI: tl.constexpr):
    """The gradient of x from that of phi(x)."""
    if PHI == ELU:
        return grad * tl.where(x > 0.0, 1.0, tl.exp(x))
    if PHI == GELU:
        return grad * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
    if PHI == RELU:
        return tl.where(x > 0.0, grad, 0.0)
    return grad


@triton.jit
def memory_of(memory, t, h, H, D: tl.constexpr, MEMORY_PER_PREFIX: tl.constexpr):
    """Base of the memory [D, D] of head h, for samples that use prefix t."""
    if MEMORY_PER_PREFIX:
        return memory + (t * H + h) * D * D
    return memory + h * D * D


@triton.jit
def load_chunk(base, stride, row, inside, d, D: tl.constexpr):
    """Elements d of rows, zero outside."""
    return tl.load(base + row[:, None] * stride + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def add_memory(acc, q, stride_ql, row, inside, memory, FEATURES: tl.constexpr):
    """acc [M, BLOCK_D] with phi(q) @ memory."""
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    width: tl.constexpr = CHUNK if CHUNK < BLOCK_D else BLOCK_D  # Triton 3.4's min makes no constant
    for first in range(0, BLOCK_D, width):
        d = first + tl.arange(0, width)
        features = phi(load_chunk(q, stride_ql, row, inside, d, D).to(tl.float32), FEATURES.PHI)
        rows = load_rows(memory, D, d, d < D, D, BLOCK_D)
        acc = tl.dot(features.to(rows.dtype), rows, acc, input_precision=FEATURES.PRECISION)
    return acc


@triton.jit
def memory_dq(q, stride_ql, dout, stride_gl, row, inside, memory, FEATURES: tl.constexpr, M: tl.constexpr):
    """The gradient of q through the memory, phi'(q) * (dout @ memory^T): [M, BLOCK_D]."""
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    width: tl.constexpr = CHUNK if CHUNK < BLOCK_D else BLOCK_D  # Triton 3.4's min makes no constant
    at = tl.arange(0, BLOCK_D)
    dfeatures = tl.zeros((M, BLOCK_D), tl.float32)
    for first in range(0, BLOCK_D, width):
        d = first + tl.arange(0, width)
        grads = load_chunk(dout, stride_gl, row, inside, d, D)
        columns = load_chunk(memory, D, at, at < D, d, D)  # [BLOCK_D, width]
        dfeatures = tl.dot(grads, tl.trans(columns), dfeatures, input_precision=FEATURES.PRECISION)
    return times_slope(load_rows(q, stride_ql, row, inside, D, BLOCK_D).to(tl.float32), dfeatures, FEATURES.PHI)
