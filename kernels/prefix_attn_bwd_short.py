"""Backward of short sequences: one program computes every gradient of one key head of one sample.

Keys, queries and sums stay in the cache between the passes, there is one launch, and nothing is added up in memory.
Keeping dq of all queries in registers would save two of seven products, but spills from 128 queries on
(bench/NOTES.md).
"""

import triton
import triton.language as tl

from prefixattn.kernels.arguments import Window
from prefixattn.kernels.bwd_tiles import drop_both, load_given, load_keys, over_keys, over_queries
from prefixattn.kernels.phi_tiles import NO_MEMORY, memory_dq, memory_of
from prefixattn.kernels.tiles import OWN, PREFIX, head_of, load_rows, prefix_of, store_rows


@triton.jit
def _keys(
    queries, keys, values, axis, draws, targets, first, scale, softcap, window,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, W: tl.constexpr, QUERY_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, NEED_OWN: tl.constexpr, NEED_PREFIX: tl.constexpr, PART: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Computes and writes the gradients of W columns, from `first` on."""
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    S, P, _, _ = axis
    column = first + tl.arange(0, W)
    key, value = load_keys(keys, values, axis, draws, column, D, BLOCK_D, FEATURES.PREFIX_DROPOUT, PART, BOUND)
    dk, dv = tl.zeros((W, BLOCK_D), tl.float32), tl.zeros((W, BLOCK_D), tl.float32)
    sources, bias, strides = queries
    q, dout, lse, delta, stride_ql, stride_gl = sources
    mask, stride_ml, stride_ms = bias
    stride_qh, stride_gh, stride_mh, L = strides
    number, head, kv_head, drops = draws
    for member in range(0, GROUP):
        head_sources = (
            q + member * stride_qh, dout + member * stride_gh, lse + member * L, delta + member * L,
            stride_ql, stride_gl,
        )  # fmt: skip
        head_draws = (number, head + member, kv_head, drops)
        dk, dv = over_queries(
            dk, dv, key, value, head_sources, (mask + member * stride_mh, stride_ml, stride_ms), axis, head_draws,
            column, first, scale, softcap, window, FEATURES, BLOCK_M, W, QUERY_TAIL, CAUSAL, True, True, PART, BOUND,
        )  # fmt: skip
    if FEATURES.PREFIX_DROPOUT and PART != OWN:
        dk, dv = drop_both(dk, dv, axis, draws, column, BLOCK_D, PART)
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
    dq, stride_dql, sources, memory, keys, values, bias, axis, draws, row0, scale, softcap, window,
    FEATURES: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, REST_LOOP: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Computes and writes the gradients of M queries, from `row0` on."""
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    row = row0 + tl.arange(0, M)
    given = load_given(sources, row, row < axis[3], D, BLOCK_D)
    acc = over_keys(
        tl.zeros((M, BLOCK_D), tl.float32), given, keys, values, bias, axis, draws, dq, row, row0, scale, softcap,
        window,
        FEATURES, M, BLOCK_N, REST, REST_LOOP, TAIL, False, True, False,
    )  # fmt: skip
    acc *= scale
    if FEATURES.PHI != NO_MEMORY:
        q, dout, _, _, stride_ql, stride_gl = sources
        acc += memory_dq(q, stride_ql, dout, stride_gl, row, row < axis[3], memory, FEATURES, M)
    store_rows(dq, stride_dql, row, row < axis[3], acc, D, BLOCK_D)


@triton.jit
def prefix_attn_bwd_short(
    q, k, v, prefix_k, prefix_v, mask, prefix_ids, lengths, seed, memory, out, dout, lse, dlse, delta,
    dq, dk, dv, partial_k, partial_v,
    layout, H, L, S, P, scale, softcap, drops, window,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    QUERY_TAIL: tl.constexpr,  # width of the last tile of queries; 0: they fill whole ones
    REST: tl.constexpr, REST_LOOP: tl.constexpr, TAIL: tl.constexpr,  # as in prefix_attn_fwd
    HAS_DLSE: tl.constexpr, NEED_OWN: tl.constexpr,
    NEED_PREFIX: tl.constexpr,  # partial_k and partial_v [B, Hkv, P, D], float32
):  # fmt: skip
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    KV = H // GROUP
    b, g = (tl.program_id(0) // KV).to(tl.int64), (tl.program_id(0) % KV).to(tl.int64)
    t, length = prefix_of(b, prefix_ids, lengths, P, FEATURES.HAS_IDS, FEATURES.PER_SAMPLE, FEATURES.HAS_LENGTHS)
    number = tl.zeros((), tl.int64)
    if FEATURES.DROPOUT or FEATURES.PREFIX_DROPOUT:
        number = tl.load(seed)
    first_head, kv_head = b * H + g * GROUP, b * KV + g
    q = head_of(q, layout.q, b, g * GROUP)
    out = head_of(out, layout.out, b, g * GROUP)
    dout = head_of(dout, layout.dout, b, g * GROUP)
    dq = head_of(dq, layout.dq, b, g * GROUP)
    mask = head_of(mask, layout.mask, b, g * GROUP)
    lse += first_head * L
    dlse += first_head * L
    delta += first_head * L
    for member in range(0, GROUP):
        for row0 in range(0, L, BLOCK_M):
            row = row0 + tl.arange(0, BLOCK_M)
            result = load_rows(out + member * layout.out.head, layout.out.row, row, row < L, D, BLOCK_D)
            grads = load_rows(dout + member * layout.dout.head, layout.dout.row, row, row < L, D, BLOCK_D)
            taken = tl.sum(result.to(tl.float32) * grads.to(tl.float32), 1)
            if HAS_DLSE:
                taken -= tl.load(dlse + member * L + row, mask=row < L, other=0.0)
            tl.store(delta + member * L + row, taken, mask=row < L)
    tl.debug_barrier()  # other threads of the program read it

    keys = (head_of(k, layout.k, b, g), head_of(prefix_k, layout.prefix_k, t, g), layout.k.row, layout.prefix_k.row)
    values = (head_of(v, layout.v, b, g), head_of(prefix_v, layout.prefix_v, t, g), layout.v.row, layout.prefix_v.row)
    draws = (number, first_head, kv_head, drops)
    targets = (
        head_of(dk, layout.dk, b, g), head_of(dv, layout.dv, b, g), layout.dk.row, layout.dv.row,
        partial_k + kv_head * P * D, partial_v + kv_head * P * D,
    )  # fmt: skip
    sources = (q, dout, lse, delta, layout.q.row, layout.dout.row)
    bias = (mask, layout.mask.row, layout.mask.column)
    queries = (sources, bias, (layout.q.head, layout.dout.head, layout.mask.head, L))
    own_end = S // BLOCK_N * BLOCK_N
    if FEATURES.CAUSAL or window.first is not None:
        own_end = S
    own_axis, axis = (S, P, S, L), (S, P, S + length, L)
    if NEED_OWN:
        for first in range(0, own_end, BLOCK_N):
            _keys(
                queries, keys, values, own_axis, draws, targets, first, scale, softcap, window,
                FEATURES, GROUP, BLOCK_M, BLOCK_N, QUERY_TAIL, FEATURES.CAUSAL, NEED_OWN, NEED_PREFIX,
                OWN, FEATURES.CAUSAL or window.first is not None,
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
                    queries, keys, values, axis, draws, targets, first, scale, softcap,
                    window if FEATURES.PREFIX_IN_WINDOW else Window(None, None, None),
                    FEATURES, GROUP, BLOCK_M, BLOCK_N, QUERY_TAIL, False, NEED_OWN, NEED_PREFIX,
                    REST, FEATURES.HAS_LENGTHS or TAIL == 0,
                )  # fmt: skip
        if TAIL:
            _keys(
                queries, keys, values, axis, draws, targets, tail, scale, softcap,
                window if FEATURES.PREFIX_IN_WINDOW else Window(None, None, None),
                FEATURES, GROUP, BLOCK_M, TAIL, QUERY_TAIL, False, NEED_OWN, NEED_PREFIX, REST, True,
            )  # fmt: skip

    for member in range(0, GROUP):
        head_sources = (
            q + member * layout.q.head, dout + member * layout.dout.head, lse + member * L, delta + member * L,
            layout.q.row, layout.dout.row,
        )  # fmt: skip
        head_bias = (mask + member * layout.mask.head, layout.mask.row, layout.mask.column)
        head_draws = (number, first_head + member, kv_head, drops)
        own_memory = memory_of(memory, t, g * GROUP + member, H, D, FEATURES.MEMORY_PER_PREFIX)
        for row0 in range(0, L // BLOCK_M * BLOCK_M, BLOCK_M):
            _queries(
                dq + member * layout.dq.head, layout.dq.row, head_sources, own_memory, keys, values, head_bias, axis,
                head_draws, row0, scale, softcap, window,
                FEATURES, BLOCK_M, BLOCK_N, REST, REST_LOOP, TAIL,
            )  # fmt: skip
        if QUERY_TAIL:
            _queries(
                dq + member * layout.dq.head, layout.dq.row, head_sources, own_memory, keys, values, head_bias, axis,
                head_draws, L // BLOCK_M * BLOCK_M, scale, softcap, window,
                FEATURES, QUERY_TAIL, BLOCK_N, REST, REST_LOOP, TAIL,
            )  # fmt: skip
