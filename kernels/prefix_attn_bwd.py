"""Backward of long sequences: delta; the gradients of own keys and values; those of queries and of a float mask.

Weights are recomputed from lse. Every sum runs in a fixed order: there are no atomics.
"""

import triton
import triton.language as tl

from prefixattn.kernels.bwd_tiles import load_given, load_keys, over_keys, over_queries
from prefixattn.kernels.memory_tiles import NO_MEMORY, memory_dq, memory_of
from prefixattn.kernels.tiles import OWN, load_rows, prefix_of, store_rows


@triton.jit
def prefix_attn_bwd_delta(
    out, dout, dlse, delta, stride_ob, stride_oh, stride_ol, stride_gb, stride_gh, stride_gl, H, L,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta [B, H, L]: what the softmax's normalisation takes back."""
    blocks = tl.cdiv(L, BLOCK_M)
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < L
    o = load_rows(out + b * stride_ob + h * stride_oh, stride_ol, row, inside, D, BLOCK_D).to(tl.float32)
    g = load_rows(dout + b * stride_gb + h * stride_gh, stride_gl, row, inside, D, BLOCK_D).to(tl.float32)
    total = tl.sum(o * g, 1)
    at = (b * H + h) * L + row
    if HAS_DLSE:
        total -= tl.load(dlse + at, mask=inside, other=0.0)
    tl.store(delta + at, total, mask=inside)


@triton.jit
def prefix_attn_bwd_keys(
    q, k, v, mask, seed, dout, lse, delta, dk, dv,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_gb, stride_gh, stride_gl,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    H, L, S, P, scale, softcap, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, PRECISION: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    """A program is one tile of own keys of one key head; it goes over the queries of the head's group."""
    tiles = tl.cdiv(S, BLOCK_N)
    tile, bg = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    KV = H // GROUP
    b, g = (bg // KV).to(tl.int64), (bg % KV).to(tl.int64)
    number = tl.zeros((), tl.int64)
    if DROPOUT:
        number = tl.load(seed)
    first = tile * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    axis = (S, P, S, L)
    keys = (k + b * stride_kb + g * stride_kh, k, stride_ks, stride_ks)
    values = (v + b * stride_vb + g * stride_vh, v, stride_vs, stride_vs)
    drops = (number, b * H, b * KV + g, threshold, keep_scale, threshold, keep_scale)
    key, value = load_keys(keys, values, axis, drops, column, D, BLOCK_D, False, OWN, True)
    dkeys, dvalues = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, GROUP):
        h = g * GROUP + member
        head = b * H + h
        sources = (
            q + b * stride_qb + h * stride_qh, dout + b * stride_gb + h * stride_gh, lse + head * L, delta + head * L,
            stride_ql, stride_gl,
        )  # fmt: skip
        bias = (mask + b * stride_mb + h * stride_mh, stride_ml, stride_ms)
        drops = (number, head, b * KV + g, threshold, keep_scale, threshold, keep_scale)
        dkeys, dvalues = over_queries(
            dkeys, dvalues, key, value, sources, bias, axis, drops, column, first, scale, softcap,
            D, BLOCK_D, BLOCK_M, BLOCK_N, 0, MASK, KEY_MASK, CAUSAL, DROPOUT, False, NEED_K, NEED_V,
            PRECISION, EXP, OWN, False,
        )  # fmt: skip
    if NEED_K:
        store_rows(dk + b * stride_dkb + g * stride_dkh, stride_dks, column, column < S, dkeys * scale, D, BLOCK_D)
    if NEED_V:
        store_rows(dv + b * stride_dvb + g * stride_dvh, stride_dvs, column, column < S, dvalues, D, BLOCK_D)


@triton.jit
def prefix_attn_bwd_queries(
    q, k, v, prefix_k, prefix_v, mask, rows, lengths, seed, memory, dout, lse, delta, dq, dmask,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkt, stride_pkh, stride_pkp, stride_pvt, stride_pvh, stride_pvp,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_gb, stride_gh, stride_gl, stride_dqb, stride_dqh, stride_dql,
    B, H, L, S, P, scale, softcap, threshold, keep_scale, prefix_threshold, prefix_gain,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, REST_LOOP: tl.constexpr, TAIL: tl.constexpr,  # as in prefix_attn_fwd
    HAS_ROWS: tl.constexpr, PER_SAMPLE: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_MASK: tl.constexpr,  # dmask [B, H, L, S], float32, is written at every column
    PHI: tl.constexpr, MEMORY_ROWS: tl.constexpr,  # as in prefix_attn_fwd
    PRECISION: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    """A program is one block of queries of one head; it goes over the keys as prefix_attn_fwd does."""
    blocks = tl.cdiv(L, BLOCK_M)
    if CAUSAL:
        block, bh = blocks - 1 - tl.program_id(0) // (B * H), tl.program_id(0) % (B * H)
    else:
        block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // GROUP
    t, length = prefix_of(b, rows, lengths, P, HAS_ROWS, PER_SAMPLE, HAS_LENGTHS)
    number = tl.zeros((), tl.int64)
    if DROPOUT or PREFIX_DROPOUT:
        number = tl.load(seed)
    head, kv_head = b * H + h, b * (H // GROUP) + g
    row0 = block * BLOCK_M
    row = row0 + tl.arange(0, BLOCK_M)
    sources = (
        q + b * stride_qb + h * stride_qh, dout + b * stride_gb + h * stride_gh, lse + head * L, delta + head * L,
        stride_ql, stride_gl,
    )  # fmt: skip
    given = load_given(sources, row, row < L, D, BLOCK_D)
    keys = (k + b * stride_kb + g * stride_kh, prefix_k + t * stride_pkt + g * stride_pkh, stride_ks, stride_pkp)
    values = (v + b * stride_vb + g * stride_vh, prefix_v + t * stride_pvt + g * stride_pvh, stride_vs, stride_pvp)
    bias = (mask + b * stride_mb + h * stride_mh, stride_ml, stride_ms)
    drops = (number, head, kv_head, threshold, keep_scale, prefix_threshold, prefix_gain)
    dqueries = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    dqueries = over_keys(
        dqueries, given, keys, values, bias, (S, P, S + length, L), drops, dmask, row, row0, scale, softcap,
        D, BLOCK_D, BLOCK_M, BLOCK_N, REST, REST_LOOP, TAIL, MASK, KEY_MASK, CAUSAL, DROPOUT, PREFIX_DROPOUT,
        NEED_Q, NEED_MASK, PRECISION, EXP,
    )  # fmt: skip
    if NEED_Q:
        dqueries *= scale
        if PHI != NO_MEMORY:
            dqueries += memory_dq(
                q + b * stride_qb + h * stride_qh, stride_ql, dout + b * stride_gb + h * stride_gh, stride_gl,
                row, row < L, memory_of(memory, t, h, H, D, MEMORY_ROWS), BLOCK_M, D, BLOCK_D, PHI, PRECISION,
            )  # fmt: skip
        store_rows(dq + b * stride_dqb + h * stride_dqh, stride_dql, row, row < L, dqueries, D, BLOCK_D)
