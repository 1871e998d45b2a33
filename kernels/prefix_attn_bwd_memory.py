"""Backward, gradient of a memory: phi(q)^T dout, summed over the samples that share it, without atomics.

A program is some rows of one head's memory, and a share of the queries, which are the rows of one tile after another
whatever sample they are of, as in prefix_attn_bwd_prefix.
"""

import triton
import triton.language as tl

from prefixattn.kernels.phi_tiles import load_chunk, phi
from prefixattn.kernels.tiles import RUN, compensated_add, load_rows, store_rows, whole_rows


@triton.jit
def prefix_attn_bwd_memory(
    q, order, starts, dout, dmemory, layout, B, H, L, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_IDS: tl.constexpr,  # `order` [B] sorts the samples by their memory, whose samples begin at `starts` [T + 1]
    PER_SAMPLE: tl.constexpr, PHI: tl.constexpr,
    COMPENSATED: tl.constexpr,  # dmemory is float32 and its inputs are: see compensated_add
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dmemory [shares, T, H, D, D]."""
    tiles = tl.cdiv(D, BLOCK_N)
    d = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    th = tl.program_id(0) // tiles
    t, h = (th // H).to(tl.int64), (th % H).to(tl.int64)
    share, shares = tl.program_id(1), tl.num_programs(1)
    first_sample, samples = 0, B
    if HAS_IDS:
        first_sample = tl.load(starts + t).to(tl.int32)
        samples = tl.load(starts + t + 1).to(tl.int32) - first_sample
    elif PER_SAMPLE:
        first_sample, samples = t.to(tl.int32), 1
    count = samples * L
    blocks = tl.cdiv(count, BLOCK_M)
    each = tl.cdiv(blocks, shares)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin, last = share * each, tl.minimum((share + 1) * each, blocks)
    base = dmemory + ((share.to(tl.int64) * T + t) * H + h) * D * D
    for block in range(begin, last):
        folded = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = folded < count
        folded = tl.minimum(folded, count - 1)
        sample, row = (first_sample + folded // L).to(tl.int64), folded % L
        if HAS_IDS:
            sample = tl.load(order + sample)
        q_at = sample * layout.q.sample + h * layout.q.head + row * layout.q.row
        queries = load_chunk(q, 1, q_at, inside, d, D)
        dout_at = sample * layout.dout.sample + h * layout.dout.head + row * layout.dout.row
        grads = load_rows(dout, 1, dout_at, inside, D, BLOCK_D)
        features = phi(queries.to(tl.float32), PHI).to(grads.dtype)
        acc = tl.dot(tl.trans(features), grads, acc, input_precision=PRECISION)
        if COMPENSATED:
            added = block - begin + 1
            if added % RUN == 0:
                acc = compensated_add(base, d, d < D, acc, added == RUN, D, BLOCK_D)
    if COMPENSATED:
        acc = whole_rows(base, d, d < D, acc, last - begin < RUN, D, BLOCK_D)
    store_rows(base, D, d, d < D, acc, D, BLOCK_D)
