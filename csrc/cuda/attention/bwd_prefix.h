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

    // What the block does, from its place in the grid; made anew where all registers were needed in between.
    struct Share {
        int run, g, chunk, row0, rows;  // rows of the chunk; 0: only delta is wanted

        PA_DEVICE explicit Share(const Params &p)
            : run(uniform(hw::block_x())), g(uniform(hw::block_y())), chunk(uniform(hw::block_z())) {
            row0 = chunk * Pass::kChunk;
            const int left = (int)p.P - row0;
            rows = !p.sums_prefix ? 0 : left < Pass::kChunk ? left : Pass::kChunk;
        }
        // Steps are numbered over samples, heads of the group and queries.
        PA_DEVICE int first_step(const Params &p, int run) const {
            return (int)(p.B * p.members * p.steps * run / p.runs);
        }
        PA_DEVICE int first_sample(const Params &p) const { return first_step(p, run) / (p.members * p.steps); }
        PA_DEVICE int slot(const Params &p) const { return run * Pass::groups(p) + warp_group(p); }
        PA_DEVICE Tile<D> tile(int which) const {
            const int bytes = (rows + kStep - 1) / kStep * kStep * Tile<D>::kRowBytes;
            return {hw::shared_begin() + (Queries::kBytes + kWordBytes + which * bytes)};
        }
    };
    PA_DEVICE static int tile_warps(const Params &p) { return kWarps / Pass::groups(p); }
    PA_DEVICE static int warp_group(const Params &p) { return uniform(hw::warp()) / tile_warps(p); }

    PA_DEVICE static void run(const Params &p) {
        Queries stage(hw::shared_begin());
        Side side(hw::warp() % tile_warps(p), tile_warps(p));
        int left;
        Cursor now = open(p, stage, left);
        PA_NO_UNROLL
        for (int i = 0; left > 0; --left, i ^= 1) {
            weigh(p, stage, side, now, i);
            now.hide();
            now = finish(p, stage, side, now, i, left);
        }
        const Share mine(p);
        if (p.direct || !mine.rows) return;
        const int blocks = p.T == 1 ? p.runs : p.runs / (int)p.B, t = (int)prefix_row(p, mine.first_sample(p));
        sum_if_last<E, kThreads>(p, t, mine.g, mine.chunk, mine.row0, mine.row0 + mine.rows, blocks,
                                 hw::shared_begin() + Queries::kBytes);
    }

    // The first step is there, the second is asked for; `left` are the block's.
    PA_DEVICE static Cursor open(const Params &p, Queries &stage, int &left) {
        const Share mine(p);
        const int begin = mine.first_step(p, mine.run), in_sample = begin % (p.members * p.steps);
        left = mine.first_step(p, mine.run + 1) - begin;
        const Cursor now{begin / (p.members * p.steps), in_sample / p.steps, in_sample % p.steps};
        const Cursor next = now.after(p.members, p.steps, 0);
        if (mine.rows) ask_keys(p, mine.tile(0), mine.tile(1), now.b, mine.g, mine.row0, mine.rows);
        ask(p, stage, mine, now, 0);
        hw::copy_commit();
        hw::copy_wait<0>();
        prepare(p, stage, mine, now, 0);
        hw::sync_block();
        if (left > 1) ask(p, stage, mine, next, 1);
        hw::copy_commit();
        if (p.drops.threshold && mine.rows) drop_keys(p, mine, now.b);
        return now;
    }

    PA_DEVICE static void ask(const Params &p, Queries &stage, const Share &mine, const Cursor &at, int i) {
        stage.ask(p, i, at.b, mine.g * p.members + at.member, at.step * kQueries, mine.rows > 0);
    }
    PA_DEVICE static void prepare(const Params &p, Queries &stage, const Share &mine, const Cursor &at, int i) {
        stage.prepare(p, i, axis_of(p, at.b, mine.row0, mine.rows), at.b, mine.g * p.members + at.member,
                      at.step * kQueries, p.delta && mine.chunk == 0);
    }

    PA_DEVICE static void weigh(const Params &p, const Queries &stage, Side &side, const Cursor &now, int i) {
        const Share mine(p);
        if (!mine.rows) return;
        const Axis axis = axis_of(p, now.b, mine.row0, mine.rows);
        const int l0 = now.step * kQueries, h = mine.g * p.members + now.member;
        PA_NO_UNROLL
        for (int query = warp_group(p) * kStep; query < kQueries; query += Pass::groups(p) * kStep)
            if (l0 + query < (int)p.L)
                side.unit(p, axis, now.b, h, 0, mine.tile(0), mine.tile(1), stage, i, query, l0 + query, false, {});
    }

    PA_DEVICE static Cursor finish(const Params &p, Queries &stage, Side &side, const Cursor &now, int i, int left) {
        const Share mine(p);
        const Cursor next = now.after(p.members, p.steps, 0), later = next.after(p.members, p.steps, 0);
        hw::copy_wait<0>();
        if (left > 1) prepare(p, stage, mine, next, i ^ 1);
        hw::sync_block();
        if (left > 2) ask(p, stage, mine, later, i);
        hw::copy_commit();
        const bool drops = p.drops.threshold;  // a mask of its own for each sample
        if (!mine.rows || !(left == 1 || (drops && next.b != now.b))) return next;
        leave_prefix(p, side, mine.rows,
                     {(int)prefix_row(p, now.b), mine.g, mine.slot(p), mine.row0, now.b,
                      drops && now.b != mine.first_sample(p)});
        PA_UNROLL
        for (int j = 0; j < Pass::kTiles; ++j) side.clear_tile(j, 0);
        if (left == 1) return next;
        ask_keys(p, mine.tile(0), mine.tile(1), next.b, mine.g, mine.row0, mine.rows);
        hw::copy_commit();
        hw::copy_wait<0>();
        hw::sync_block();
        drop_keys(p, mine, next.b);
        return next;
    }

    PA_DEVICE static void drop_keys(const Params &p, const Share &mine, int b) {
        const int64_t head = (int64_t)b * p.Hkv + mine.g;
        const uint64_t seed = dropout_seed(p);
        Axis axis(p, b);
        axis.prefix = mine.row0 + mine.rows;
        drop_prefix<Pass::kChunk, kThreads>(mine.tile(0), axis, mine.row0, seed, p.drops.threshold, head,
                                            kDropsPrefixK);
        drop_prefix<Pass::kChunk, kThreads>(mine.tile(1), axis, mine.row0, seed, p.drops.threshold, head,
                                            kDropsPrefixV);
        hw::sync_block();
    }
};

}  // namespace prefixattn::cuda
