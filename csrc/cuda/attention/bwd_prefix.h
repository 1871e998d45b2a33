// Backward of longer axes, first pass: delta of every query, and the gradients of the prefix's keys and values, summed
// over samples. A block has some rows of the prefix of one key head and a run of the queries that see them; a warp of a
// short prefix shares its tile with others, which have other queries.
#pragma once
#include "cuda/attention/bwd_sums.h"

namespace prefixattn::cuda {

template <class E, int D>
struct BwdPrefix {
    using Params = BwdLaunch;
    using Pass = PrefixPass<D>;
    static constexpr int kWarps = Pass::kWarps, kThreads = kWarps * hw::kWarp, kQueries = Pass::kQueries;
    static constexpr int kMinBlocks = 2;
    static constexpr const char *kName = "bwd_prefix";
    using Side = KeySide<E, D, Pass::kTiles, kStep>;
    using Queries = Stage<E, D, kQueries, kThreads, true>;

    // The chunk's rows of row t of the bank, with the sample's dropout.
    PA_DEVICE static void ask_keys(const Params &p, const Tile<D> &k, const Tile<D> &v, int b, int g, int row0,
                                   int rows) {
        KeyRows<E> from_k(p, p.k, p.prefix_k, b, g), from_v(p, p.v, p.prefix_v, b, g);
        const int piece = hw::thread() % Tile<D>::kPieces;
        PA_NO_UNROLL
        for (int row = hw::thread() / Tile<D>::kPieces; row < (rows + kStep - 1) / kStep * kStep;
             row += kThreads / Tile<D>::kPieces) {
            const bool inside = row < rows;
            const int64_t from = row0 + (inside ? row : 0);
            hw::copy_async16(k.piece(row, piece), from_k.prefix + from * from_k.stride_prefix + piece * kPiece, inside);
            hw::copy_async16(v.piece(row, piece), from_v.prefix + from * from_v.stride_prefix + piece * kPiece, inside);
        }
    }

    // The chunk as an axis: every key is of the prefix, those past the sample's length are hidden.
    PA_DEVICE static Axis axis_of(const Params &p, int b, int row0, int rows) {
        Axis axis(p, b);
        const int left = axis.prefix - row0;
        axis.prefix = rows;
        axis.end = left < rows ? left : rows;
        axis.causal = false;
        return axis;
    }

    PA_DEVICE static void run(const Params &p) {
        const int g = hw::block_y(), share = hw::block_x(), members = p.members, steps = p.steps;
        const int chunk = hw::block_z(), row0 = chunk * Pass::kChunk, left = (int)p.P - row0;
        const int rows = !p.sums_prefix ? 0 : left < Pass::kChunk ? left : Pass::kChunk;
        const int steps_a_sample = steps * members;
        const int64_t all = p.B * steps_a_sample;
        const int begin = (int)(all * share / p.runs), end = (int)(all * (share + 1) / p.runs);
        const int groups = Pass::groups(p), tile_warps = kWarps / groups, member_of = hw::warp() / tile_warps;
        const bool writes_delta = p.delta && chunk == 0;

        Queries stage(hw::shared_begin());
        const hw::Shared word = hw::shared_begin() + Queries::kBytes;
        const Tile<D> k{word + kWordBytes}, v{k.at + (rows + kStep - 1) / kStep * kStep * Tile<D>::kRowBytes};
        Side side(hw::warp() % tile_warps, tile_warps);
        Cursor now{begin / steps_a_sample, begin % steps_a_sample / steps, begin % steps};
        const int first_sample = now.b;
        if (rows) ask_keys(p, k, v, now.b, g, row0, rows);
        stage.ask(p, 0, now.b, g * members + now.member, now.step * kQueries, rows > 0);
        hw::copy_commit();
        hw::copy_wait<0>();
        stage.prepare(p, 0, axis_of(p, now.b, row0, rows), now.b, g * members + now.member, now.step * kQueries,
                      writes_delta);
        hw::sync_block();
        const Cursor second = now.after(members, steps, 0);
        if (begin + 1 < end) stage.ask(p, 1, second.b, g * members + second.member, second.step * kQueries, rows > 0);
        hw::copy_commit();
        if (p.drops.threshold && rows) drop_keys(p, k, v, now.b, g, row0, rows);

        PA_NO_UNROLL
        for (int u = begin; u < end; ++u) {
            const int i = (u - begin) & 1, h = g * members + now.member, l0 = now.step * kQueries;
            const Axis axis = axis_of(p, now.b, row0, rows);
            for (int query = member_of * kStep; query < kQueries; query += groups * kStep)
                if (rows && l0 + query < (int)p.L)
                    side.unit(p, axis, now.b, h, 0, k, v, stage, i, query, l0 + query, false, {});
            hw::copy_wait<0>();
            const Cursor next = now.after(members, steps, 0), later = next.after(members, steps, 0);
            if (u + 1 < end)
                stage.prepare(p, 1 - i, axis_of(p, next.b, row0, rows), next.b, g * members + next.member,
                              next.step * kQueries, writes_delta);
            hw::sync_block();
            if (u + 2 < end) stage.ask(p, i, later.b, g * members + later.member, later.step * kQueries, rows > 0);
            hw::copy_commit();
            const bool changes = next.b != now.b || u + 1 == end;
            if (p.drops.threshold && rows && changes) {  // each sample has a mask of its own
                leave_rows(p, side, now.b, g, share * groups + member_of, row0, rows, now.b != first_sample);
                if (u + 1 < end) {
                    ask_keys(p, k, v, next.b, g, row0, rows);
                    hw::copy_commit();
                    hw::copy_wait<0>();
                    hw::sync_block();
                    drop_keys(p, k, v, next.b, g, row0, rows);
                }
            }
            now = next;
        }
        if (!rows) return;
        if (!p.drops.threshold) leave_rows(p, side, first_sample, g, share * groups + member_of, row0, rows, false);
        if (!p.direct) {
            const int pieces = p.T == 1 ? p.runs : p.runs / (int)p.B;
            sum_if_last<E, kThreads>(p, (int)prefix_row(p, first_sample), g, chunk, row0, row0 + rows, pieces, word);
        }
    }

    PA_DEVICE static void drop_keys(const Params &p, const Tile<D> &k, const Tile<D> &v, int b, int g, int row0,
                                    int rows) {
        const int64_t head = (int64_t)b * p.Hkv + g;
        const uint64_t seed = dropout_seed(p);
        Axis axis(p, b);
        axis.prefix = row0 + rows;
        drop_prefix<Pass::kChunk, kThreads>(k, axis, row0, seed, p.drops.threshold, head, kDropsPrefixK);
        drop_prefix<Pass::kChunk, kThreads>(v, axis, row0, seed, p.drops.threshold, head, kDropsPrefixV);
        hw::sync_block();
    }

    PA_DEVICE static void leave_rows(const Params &p, Side &side, int b, int g, int slot, int row0, int rows,
                                     bool adds) {
        leave_prefix(p, side, rows, {(int)prefix_row(p, b), g, slot, row0, b, adds});
        PA_UNROLL
        for (int i = 0; i < Pass::kTiles; ++i) side.clear_tile(i, 0);
    }
};

}  // namespace prefixattn::cuda
