"""Backward, gradients of the prefix: summed over the samples that share it, without atomics or a partial sum a sample.

A program is one tile of one prefix's keys of one head, and a share of the queries that see them. The queries of all
samples are the rows of one tile after another, so that neither short samples nor ends of samples waste rows; only
prefix dropout, which gives each sample keys of its own, keeps the tiles of samples apart.

So it is with packed sequences, whose queries are one axis, in the order of their prefixes. Prefix dropout, and a window
that hides the prefix from later queries, need tiles by sequence: there each is as long as the longest.
"""

import triton
import triton.language as tl

from prefixattn.kernels.arguments import Window
from prefixattn.kernels.bwd_tiles import drop_both, load_keys, pair
from prefixattn.kernels.sequences import sequence
from prefixattn.kernels.tiles import EXACT, PREFIX, RUN, compensated_add, head_of, load_rows, store_rows, whole_rows
from prefixattn.kernels.window_tiles import NOWHERE


@triton.jit
def prefix_attn_bwd_prefix(
    q, prefix_k, prefix_v,
    order, starts,  # [B], sorts the samples by their prefix, and where those of each begin [T + 1]
    lengths, seed, out, dout, lse, dlse, delta, dprefix_k, dprefix_v,
    layout, B, H, L, P, T, scale, softcap, drops,
    window,  # no window if it hides nothing of the prefix
    packed,
    rows,  # None: tiles by sequence
    FEATURES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DELTA: tl.constexpr,  # compute delta [B, H, L] here, and write it, instead of reading it
    HAS_DLSE: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """dprefix_k, dprefix_v [shares, T, Hkv, P, D]."""
    D: tl.constexpr = FEATURES.D
    BLOCK_D: tl.constexpr = FEATURES.BLOCK_D
    LEADS: tl.constexpr = packed is not None and window.first is not None  # each sequence has a position of query 0
    KV = H // GROUP
    column_tiles = tl.cdiv(P, BLOCK_N)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tg = tl.program_id(0) // column_tiles
    t, g = (tg // KV).to(tl.int64), (tg % KV).to(tl.int64)
    share, shares = tl.program_id(1), tl.num_programs(1)
    number = tl.zeros((), tl.int64)
    if FEATURES.DROPOUT or FEATURES.PREFIX_DROPOUT:
        number = tl.load(seed)
    first_sample, samples = 0, B
    if FEATURES.HAS_IDS:
        first_sample = tl.load(starts + t).to(tl.int32)
        samples = tl.load(starts + t + 1).to(tl.int32) - first_sample
    elif FEATURES.PER_SAMPLE:
        first_sample, samples = t.to(tl.int32), 1
    queries = L  # of each sample and head: the first ones, which see the tile
    blocks = tl.cdiv(queries, BLOCK_M)
    count = samples * GROUP * queries  # rows: over samples in order, heads of the group, queries
    tiles = tl.cdiv(count, BLOCK_M)
    if FEATURES.PREFIX_DROPOUT:
        tiles = samples * GROUP * blocks  # a tile stays within a sample and a head
    if rows is not None:
        first_place = tl.load(rows.bounds + first_sample)
        count = (tl.load(rows.bounds + first_sample + samples) - first_place).to(tl.int32) * GROUP
        tiles = tl.cdiv(count, BLOCK_M)
    first_column = tl.program_id(0) % column_tiles * BLOCK_N
    nearest = tl.minimum(first_column + BLOCK_N - P, 0)  # where the tile ends, at most: row i lies at i - the length
    longest = P  # what lies past the length of every sample must not be read: zero times nan is nan
    if FEATURES.HAS_LENGTHS or LEADS:
        longest = P * 0
        nearest = P * 0 - NOWHERE
        for first in range(0, samples, 64):
            i = first + tl.arange(0, 64)
            at = first_sample + i
            if FEATURES.HAS_IDS:
                at = tl.load(order + at, mask=i < samples, other=0)
            if FEATURES.HAS_LENGTHS:
                found = tl.load(lengths + at, mask=i < samples, other=0)
            else:
                found = tl.where(i < samples, P, 0)
            longest = tl.maximum(longest, tl.max(found, 0).to(tl.int32))
            if window.first is not None:
                found = found.to(tl.int32)
                some = found > first_column
                ends = tl.minimum(first_column + BLOCK_N - found, 0)
                if LEADS:
                    at = tl.where(i < samples, at, 0)
                    _, own_queries = sequence(packed.queries, at)
                    _, own_keys = sequence(packed.keys, at)
                    ends -= own_keys - own_queries
                ends = tl.where(some, ends, -NOWHERE)
                nearest = tl.maximum(nearest, tl.max(ends, 0))
    if window.first is not None:
        queries = tl.minimum(tl.maximum(nearest + window.left - window.first, 0), L)
        blocks = tl.cdiv(queries, BLOCK_M)
        count = samples * GROUP * queries
        tiles = tl.cdiv(count, BLOCK_M)
        if FEATURES.PREFIX_DROPOUT:
            tiles = samples * GROUP * blocks
    axis = (0, P, longest, L)
    keys = (prefix_k, head_of(prefix_k, layout.prefix_k, t, g), layout.prefix_k.row, layout.prefix_k.row)
    values = (prefix_v, head_of(prefix_v, layout.prefix_v, t, g), layout.prefix_v.row, layout.prefix_v.row)
    key, value = load_keys(keys, values, axis, (), column, D, BLOCK_D, False, PREFIX, True)
    dkeys, dvalues = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    each = tl.cdiv(tiles, shares)
    begin, last = share * each, tl.minimum((share + 1) * each, tiles)
    base = ((share.to(tl.int64) * T + t) * KV + g) * P * D
    for tile in range(begin, last):
        if FEATURES.PREFIX_DROPOUT:
            row = tile % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
            member, sample = tile // blocks % GROUP, (first_sample + tile // blocks // GROUP).to(tl.int64)
            inside = row < queries
            if FEATURES.HAS_IDS:
                sample = tl.load(order + sample)
            head = g * GROUP + member
            kv_head = sample * KV + g
        elif rows is not None:
            folded = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = folded < count
            folded = tl.minimum(folded, count - 1)
            place = first_place + folded // GROUP
            sample = tl.load(rows.owners + place)  # [M]
            row = (place - tl.load(rows.bounds + sample)).to(tl.int32)
            if FEATURES.HAS_IDS:
                sample = tl.load(order + sample)
            head = g * GROUP + folded % GROUP  # [M]
            kv_head = t * 0
        else:
            folded = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = folded < count
            folded = tl.minimum(folded, count - 1)
            row = folded % queries
            sample = (first_sample + folded // queries // GROUP).to(tl.int64)  # [M]
            if FEATURES.HAS_IDS:
                sample = tl.load(order + sample)
            head = g * GROUP + folded // queries % GROUP  # [M]
            kv_head = t * 0
        start = sample
        at = (sample * H + head) * L + row
        if packed is not None:
            start, own_queries = sequence(packed.queries, sample)
            if rows is None:
                inside = inside & (row < own_queries)
            at = head * packed.total + start + row
        dout_at = start * layout.dout.sample + head * layout.dout.head + row * layout.dout.row
        if DELTA:
            out_at = start * layout.out.sample + head * layout.out.head + row * layout.out.row
            result = load_rows(out, 1, out_at, inside, D, BLOCK_D).to(tl.float32)
            taken = tl.sum(result * load_rows(dout, 1, dout_at, inside, D, BLOCK_D).to(tl.float32), 1)
            if HAS_DLSE:
                taken -= tl.load(dlse + at, mask=inside, other=0.0)
            tl.store(delta + at, taken, mask=inside)
            tl.debug_barrier()  # other threads of the program read it
        seen_key, seen_value, more_k, more_v = key, value, dkeys, dvalues
        counter = sample * H + head
        if FEATURES.DROPOUT and not FEATURES.PREFIX_DROPOUT:
            counter = counter[None, :]
        draws = (number, counter, kv_head, drops)
        if FEATURES.PREFIX_DROPOUT:
            seen_key, seen_value = drop_both(key, value, axis, draws, column, BLOCK_D, PREFIX)
            more_k, more_v = tl.zeros_like(dkeys), tl.zeros_like(dvalues)
        end = P
        if FEATURES.HAS_LENGTHS:
            length = tl.load(lengths + sample).to(tl.int32)
            if not FEATURES.PREFIX_DROPOUT:
                length = length[None, :]
            end = length
        seen_from = window
        if LEADS:
            _, own_keys = sequence(packed.keys, sample)
            if not FEATURES.PREFIX_DROPOUT:
                own_queries, own_keys = own_queries[None, :], own_keys[None, :]
            seen_from = Window(window.left, window.right, own_keys - own_queries)
        places = (start * layout.q.sample + head * layout.q.head + row * layout.q.row, dout_at, at, inside)
        more_k, more_v = pair(
            more_k, more_v, seen_key, seen_value, (q, dout, lse, delta), places, (q, 0, 0),
            (0, P, end, L), draws, row, column, scale, softcap, seen_from,
            FEATURES, False, NEED_K, NEED_V, PREFIX, True,
        )  # fmt: skip
        if FEATURES.PREFIX_DROPOUT:
            more_k, more_v = drop_both(more_k, more_v, axis, draws, column, BLOCK_D, PREFIX)
            dkeys, dvalues = dkeys + more_k, dvalues + more_v
        else:
            dkeys, dvalues = more_k, more_v
        if FEATURES.EXP == EXACT:
            added = tile - begin + 1
            if added % RUN == 0:
                if NEED_K:
                    dkeys = compensated_add(dprefix_k + base, column, column < P, dkeys, added == RUN, D, BLOCK_D)
                if NEED_V:
                    dvalues = compensated_add(dprefix_v + base, column, column < P, dvalues, added == RUN, D, BLOCK_D)

    if FEATURES.EXP == EXACT:
        none = last - begin < RUN
        if NEED_K:
            dkeys = whole_rows(dprefix_k + base, column, column < P, dkeys, none, D, BLOCK_D)
        if NEED_V:
            dvalues = whole_rows(dprefix_v + base, column, column < P, dvalues, none, D, BLOCK_D)
    if NEED_K:
        store_rows(dprefix_k + base, D, column, column < P, dkeys * scale, D, BLOCK_D)
    if NEED_V:
        store_rows(dprefix_v + base, D, column, column < P, dvalues, D, BLOCK_D)


@triton.jit
def prefix_attn_bwd_reduce(
    partial_k, partial_v, dprefix_k, dprefix_v, prefix_ids, stride_n, stride_t, count, numel,
    HAS_IDS: tl.constexpr,  # partial n is of prefix prefix_ids[n]; otherwise all are of every prefix, by stride_t
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """dprefix [T, numel] from `count` partial sums, float32, added in their order; for float32 in float64."""
    SUM: tl.constexpr = tl.float64 if dprefix_k.dtype.element_ty == tl.float32 else tl.float32
    blocks = tl.cdiv(numel, BLOCK)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    dk, dv = tl.zeros((BLOCK,), SUM), tl.zeros((BLOCK,), SUM)
    for first in range(0, count, SLICES):
        n = first + tl.arange(0, SLICES)
        mine = n < count
        if HAS_IDS:
            mine = mine & (tl.load(prefix_ids + n, mask=mine, other=-1) == t)
        where = (n.to(tl.int64) * stride_n + t * stride_t)[:, None] + at[None, :]
        inside = mine[:, None] & (at < numel)[None, :]
        if NEED_K:
            dk += tl.sum(tl.load(partial_k + where, mask=inside, other=0.0).to(SUM), 0)
        if NEED_V:
            dv += tl.sum(tl.load(partial_v + where, mask=inside, other=0.0).to(SUM), 0)
    if NEED_K:
        tl.store(dprefix_k + t * numel + at, dk.to(dprefix_k.dtype.element_ty), mask=at < numel)
    if NEED_V:
        tl.store(dprefix_v + t * numel + at, dv.to(dprefix_v.dtype.element_ty), mask=at < numel)
