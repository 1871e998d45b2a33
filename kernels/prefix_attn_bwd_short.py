"""Backward of short sequences: one program computes every gradient of one key head of one sample.

Keys, queries and sums stay in the cache between the passes, there is one launch, and nothing is added up in memory.
Keeping dq of all queries in registers would save two of seven products, but spills from 128 queries on
(bench/NOTES.md).
"""

import triton
import triton.language as tl

from prefixattn.kernels.bwd_tiles import drop_both, load_given, load_keys, over_keys, over_queries
from prefixattn.kernels.memory_tiles import NO_MEMORY, memory_dq, memory_of
from prefixattn.kernels.tiles import OWN, PREFIX, load_rows, prefix_of, store_rows


@triton.jit
def _keys(
    queries, keys, values, axis, drops, targets, first, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, W: tl.constexpr,
    QUERY_TAIL: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PREFIX_DROPOUT: tl.constexpr, NEED_OWN: tl.constexpr, NEED_PREFIX: tl.constexpr,
    PRECISION: tl.constexpr, EXP: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Computes and writes the gradients of W columns, from `first` on."""
    S, P, _, _ = axis
    column = first + tl.arange(0, W)
    key, value = load_keys(keys, values, axis, drops, column, D, BLOCK_D, PREFIX_DROPOUT, PART, BOUND)
    dk, dv = tl.zeros((W, BLOCK_D), tl.float32), tl.zeros((W, BLOCK_D), tl.float32)
    sources, bias, strides = queries
    q, dout, lse, delta, stride_ql, stride_gl = sources
    mask, stride_ml, stride_ms = bias
    stride_qh, stride_gh, stride_mh, L = strides
    number, head, kv_head, threshold, keep_scale, prefix_threshold, prefix_gain = drops
    for member in range(0, GROUP):
        head_sources = (
            q + member * stride_qh, dout + member * stride_gh, lse + member * L, delta + member * L,
            stride_ql, stride_gl,
        )  # fmt: skip
        head_drops = (number, head + member, kv_head, threshold, keep_scale, prefix_threshold, prefix_gain)
        dk, dv = over_queries(
            dk, dv, key, value, head_sources, (mask + member * stride_mh, stride_ml, stride_ms), axis, head_drops,
            column, first, scale, softcap, D, BLOCK_D, BLOCK_M, W, QUERY_TAIL, MASK, KEY_MASK, CAUSAL,
            DROPOUT, PREFIX_DROPOUT, True, True, PRECISION, EXP, PART, BOUND,
        )  # fmt: skip
    if PREFIX_DROPOUT and PART != OWN:
        dk, dv = drop_both(dk, dv, axis, drops, column, BLOCK_D, PART)
    dkey, dvalue, stride_dks, stride_dvs, partial_k, partial_v = targets
    if NEED_OWN and PART != PREFIX:
        store_rows(dkey, stride_dks, column, column < S, dk * scale, D, BLOCK_D)
        store_rows(dvalue, stride_dvs, column, column < S, dv, D, BLOCK_D)
    if NEED_PREFIX and PART != OWN:
        inside = (column >= S) & (column < S + P)
        store_rows(partial_k, D, column - S, inside, dk * scale, D, BLOCK_D)
        store_rows(partial_v, D, column - S, inside, dv, D, BLOCK_D)


@triton.jit
def _queries(
    dq, stride_dql, sources, memory, keys, values, bias, axis, drops, row0, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, REST_LOOP: tl.constexpr, TAIL: tl.constexpr,
    MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PREFIX_DROPOUT: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    """Computes and writes the gradients of M queries, from `row0` on."""
    row = row0 + tl.arange(0, M)
    given = load_given(sources, row, row < axis[3], D, BLOCK_D)
    acc = over_keys(
        tl.zeros((M, BLOCK_D), tl.float32), given, keys, values, bias, axis, drops, dq, row, row0, scale, softcap,
        D, BLOCK_D, M, BLOCK_N, REST, REST_LOOP, TAIL, MASK, KEY_MASK, CAUSAL, DROPOUT, PREFIX_DROPOUT,
        True, False, PRECISION, EXP,
    )  # fmt: skip
    acc *= scale
    if PHI != NO_MEMORY:
        q, dout, _, _, stride_ql, stride_gl = sources
        acc += memory_dq(q, stride_ql, dout, stride_gl, row, row < axis[3], memory, M, D, BLOCK_D, PHI, PRECISION)
    store_rows(dq, stride_dql, row, row < axis[3], acc, D, BLOCK_D)


@triton.jit
def prefix_attn_bwd_short(
    q, k, v, prefix_k, prefix_v, mask, rows, lengths, seed, memory, out, dout, lse, dlse, delta,
    dq, dk, dv, partial_k, partial_v,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkt, stride_pkh, stride_pkp, stride_pvt, stride_pvh, stride_pvp,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_ob, stride_oh, stride_ol, stride_gb, stride_gh, stride_gl,
    stride_dqb, stride_dqh, stride_dql, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    H, L, S, P, scale, softcap, threshold, keep_scale, prefix_threshold, prefix_gain,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    QUERY_TAIL: tl.constexpr,  # width of the last tile of queries; 0: they fill whole ones
    REST: tl.constexpr, REST_LOOP: tl.constexpr, TAIL: tl.constexpr,  # as in prefix_attn_fwd
    HAS_DLSE: tl.constexpr, HAS_ROWS: tl.constexpr, PER_SAMPLE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PREFIX_DROPOUT: tl.constexpr, NEED_OWN: tl.constexpr,
    NEED_PREFIX: tl.constexpr,  # partial_k and partial_v [B, Hkv, P, D], float32
    PHI: tl.constexpr, MEMORY_ROWS: tl.constexpr,  # as in prefix_attn_fwd
    PRECISION: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    KV = H // GROUP
    b, g = (tl.program_id(0) // KV).to(tl.int64), (tl.program_id(0) % KV).to(tl.int64)
    t, length = prefix_of(b, rows, lengths, P, HAS_ROWS, PER_SAMPLE, HAS_LENGTHS)
    number = tl.zeros((), tl.int64)
    if DROPOUT or PREFIX_DROPOUT:
        number = tl.load(seed)
    first_head, kv_head = b * H + g * GROUP, b * KV + g
    q += b * stride_qb + g * GROUP * stride_qh
    out += b * stride_ob + g * GROUP * stride_oh
    dout += b * stride_gb + g * GROUP * stride_gh
    dq += b * stride_dqb + g * GROUP * stride_dqh
    mask += b * stride_mb + g * GROUP * stride_mh
    lse += first_head * L
    dlse += first_head * L
    delta += first_head * L
    for member in range(0, GROUP):
        for row0 in range(0, L, BLOCK_M):
            row = row0 + tl.arange(0, BLOCK_M)
            result = load_rows(out + member * stride_oh, stride_ol, row, row < L, D, BLOCK_D)
            grads = load_rows(dout + member * stride_gh, stride_gl, row, row < L, D, BLOCK_D)
            taken = tl.sum(result.to(tl.float32) * grads.to(tl.float32), 1)
            if HAS_DLSE:
                taken -= tl.load(dlse + member * L + row, mask=row < L, other=0.0)
            tl.store(delta + member * L + row, taken, mask=row < L)
    tl.debug_barrier()  # other threads of the program read it

    keys = (k + b * stride_kb + g * stride_kh, prefix_k + t * stride_pkt + g * stride_pkh, stride_ks, stride_pkp)
    values = (v + b * stride_vb + g * stride_vh, prefix_v + t * stride_pvt + g * stride_pvh, stride_vs, stride_pvp)
    drops = (number, first_head, kv_head, threshold, keep_scale, prefix_threshold, prefix_gain)
    targets = (
        dk + b * stride_dkb + g * stride_dkh, dv + b * stride_dvb + g * stride_dvh, stride_dks, stride_dvs,
        partial_k + kv_head * P * D, partial_v + kv_head * P * D,
    )  # fmt: skip
    sources = (q, dout, lse, delta, stride_ql, stride_gl)
    queries = (sources, (mask, stride_ml, stride_ms), (stride_qh, stride_gh, stride_mh, L))
    own_end = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        own_end = S
    own_axis, axis = (S, P, S, L), (S, P, S + length, L)
    if NEED_OWN:
        for first in range(0, own_end, BLOCK_N):
            _keys(
                queries, keys, values, own_axis, drops, targets, first, scale, softcap,
                GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_TAIL, MASK, KEY_MASK, CAUSAL, DROPOUT, PREFIX_DROPOUT,
                NEED_OWN, NEED_PREFIX, PRECISION, EXP, OWN, CAUSAL,
            )  # fmt: skip
    if NEED_PREFIX or (NEED_OWN and REST != PREFIX):
        tail = S + P
        if TAIL:
            tail = own_end
            if REST_LOOP:
                tail += (S + P - own_end) // BLOCK_N * BLOCK_N
        if REST_LOOP:
            for first in range(own_end, tail, BLOCK_N):
                _keys(
                    queries, keys, values, axis, drops, targets, first, scale, softcap,
                    GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_TAIL, MASK, KEY_MASK, False, DROPOUT, PREFIX_DROPOUT,
                    NEED_OWN, NEED_PREFIX, PRECISION, EXP, REST, HAS_LENGTHS or TAIL == 0,
                )  # fmt: skip
        if TAIL:
            _keys(
                queries, keys, values, axis, drops, targets, tail, scale, softcap,
                GROUP, D, BLOCK_D, BLOCK_M, TAIL, QUERY_TAIL, MASK, KEY_MASK, False, DROPOUT, PREFIX_DROPOUT,
                NEED_OWN, NEED_PREFIX, PRECISION, EXP, REST, True,
            )  # fmt: skip

    for member in range(0, GROUP):
        head_sources = (
            q + member * stride_qh, dout + member * stride_gh, lse + member * L, delta + member * L,
            stride_ql, stride_gl,
        )  # fmt: skip
        bias = (mask + member * stride_mh, stride_ml, stride_ms)
        head_drops = (number, first_head + member, kv_head, threshold, keep_scale, prefix_threshold, prefix_gain)
        own_memory = memory_of(memory, t, g * GROUP + member, H, D, MEMORY_ROWS)
        for row0 in range(0, L // BLOCK_M * BLOCK_M, BLOCK_M):
            _queries(
                dq + member * stride_dqh, stride_dql, head_sources, own_memory, keys, values, bias, axis, head_drops,
                row0, scale, softcap,
                D, BLOCK_D, BLOCK_M, BLOCK_N, REST, REST_LOOP, TAIL, MASK, KEY_MASK, CAUSAL, DROPOUT, PREFIX_DROPOUT,
                PHI, PRECISION, EXP,
            )  # fmt: skip
        if QUERY_TAIL:
            _queries(
                dq + member * stride_dqh, stride_dql, head_sources, own_memory, keys, values, bias, axis, head_drops,
                L // BLOCK_M * BLOCK_M, scale, softcap,
                D, BLOCK_D, QUERY_TAIL, BLOCK_N, REST, REST_LOOP, TAIL, MASK, KEY_MASK, CAUSAL, DROPOUT, PREFIX_DROPOUT,
                PHI, PRECISION, EXP,
            )  # fmt: skip
