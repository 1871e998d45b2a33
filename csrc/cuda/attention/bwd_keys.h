// Backward of longer axes, second pass: the gradients of own keys and values. A block has a tile of own keys of one key
// head and goes over the queries that see them.
#pragma once
#include "cuda/attention/bwd_sums.h"

namespace prefixattn::cuda {

template <class E, int D>
struct BwdKeys {
    using Params = BwdLaunch;
    static constexpr int kWarps = D == 64 ? 4 : 8, kThreads = kWarps * hw::kWarp;
    static constexpr int kTiles = D == 64 ? 2 : 1, kKeys = kWarps * kTiles * kStep;
    static constexpr int kQueries = D == 64 ? 64 : 32, kUnit = 32;
    static constexpr int kMinBlocks = D == 64 ? 2 : 1;
    static constexpr const char *kName = "bwd_keys";
    using Side = KeySide<E, D, kTiles, kUnit>;
    using Queries = Stage<E, D, kQueries, kThreads, false>;

    static int shared_bytes() { return Queries::kBytes + 2 * Tile<D>::bytes(kKeys); }
    static hw::Grid grid(const BwdParams &p) { return {(int)p.B, (int)p.Hkv, ceil_div((int)p.S, kKeys)}; }

    PA_DEVICE static void ask_keys(const Params &p, const Tile<D> &k, const Tile<D> &v, int b, int g, int s0,
                                   int keys) {
        const int piece = hw::thread() % Tile<D>::kPieces;
        const bool padded = p.mask_kind != MaskKind::kNone && (p.members == 1 || p.mask.stride1 == 0);
        PA_NO_UNROLL
        for (int row = hw::thread() / Tile<D>::kPieces; row < kKeys; row += kThreads / Tile<D>::kPieces) {
            bool inside = row < keys;
            if (padded && inside) inside = padding_bias<E>(p, b, g * p.members, s0 + row) != kMinusInf;
            const int from = s0 + (inside ? row : 0);
            hw::copy_async16(k.piece(row, piece), tensor_row<E>(p.k, b, g, from) + piece * kPiece, inside);
            hw::copy_async16(v.piece(row, piece), tensor_row<E>(p.v, b, g, from) + piece * kPiece, inside);
        }
    }

    // What the block does, from its place in the grid; made anew where all registers were needed in between. Under
    // causality the first keys are seen by most queries: they begin first.
    struct Share {
        int b, g, s0, keys, first_step;
        Axis axis;

        PA_DEVICE explicit Share(const Params &p)
            : b(uniform(hw::block_x())), g(uniform(hw::block_y())), s0(uniform(hw::block_z()) * kKeys), axis(p, b) {
            keys = (int)p.S - s0 < kKeys ? (int)p.S - s0 : kKeys;
            axis.prefix = 0;
            axis.end = keys;
            axis.offset -= s0;
            first_step = axis.causal && axis.offset < 0 ? -axis.offset / kQueries : 0;  // that sees a key
        }
        PA_DEVICE Cursor after(const Params &p, const Cursor &now) const {
            return now.after(p.members, ((int)p.L + kQueries - 1) / kQueries, first_step);
        }
    };
    static PA_DEVICE Tile<D> tile(int which) {
        return {hw::shared_begin() + (Queries::kBytes + which * Tile<D>::bytes(kKeys))};
    }

    PA_DEVICE static void run(const Params &p) {
        Queries stage(hw::shared_begin());
        Side side(hw::warp(), kWarps);
        Cursor now = open(p, stage);
        const int sample = now.b;
        PA_NO_UNROLL
        for (int i = 0; now.b == sample; i ^= 1) {
            weigh(p, stage, side, now, i);
            now.hide();
            now = finish(p, stage, now, i);
        }
        const Share mine(p);
        store_own(p, side, mine.axis, mine.b, mine.g, mine.s0);
    }

    // The first step is there, the second is asked for.
    PA_DEVICE static Cursor open(const Params &p, Queries &stage) {
        const Share mine(p);
        const Cursor now{mine.b, 0, mine.first_step}, next = mine.after(p, now);
        const int first_head = mine.g * p.members;
        ask_keys(p, tile(0), tile(1), mine.b, mine.g, mine.s0, mine.keys);
        stage.ask(p, 0, mine.b, first_head, now.step * kQueries, true);
        hw::copy_commit();
        hw::copy_wait<0>();
        stage.prepare(p, 0, mine.axis, mine.b, first_head, now.step * kQueries, false);
        hw::sync_block();
        if (next.b == mine.b) stage.ask(p, 1, mine.b, first_head + next.member, next.step * kQueries, true);
        hw::copy_commit();
        return now;
    }

    PA_DEVICE static void weigh(const Params &p, const Queries &stage, Side &side, const Cursor &now, int i) {
        const Share mine(p);
        const int h = mine.g * p.members + now.member, l0 = now.step * kQueries;
        if (now.step == mine.first_step) side.place(p, mine.axis, mine.b, h, mine.s0);
        PA_NO_UNROLL
        for (int query = 0; query < kQueries; query += kUnit)
            if (l0 + query < (int)p.L)
                side.unit(p, mine.axis, mine.b, h, mine.s0, tile(0), tile(1), stage, i, query, l0 + query, false, {});
    }

    PA_DEVICE static Cursor finish(const Params &p, Queries &stage, const Cursor &now, int i) {
        const Share mine(p);
        const Cursor next = mine.after(p, now), later = mine.after(p, next);
        const int first_head = mine.g * p.members;
        hw::copy_wait<0>();
        if (next.b == mine.b)
            stage.prepare(p, i ^ 1, mine.axis, mine.b, first_head + next.member, next.step * kQueries, false);
        hw::sync_block();
        if (later.b == mine.b) stage.ask(p, i, mine.b, first_head + later.member, later.step * kQueries, true);
        hw::copy_commit();
        return next;
    }
};

}  // namespace prefixattn::cuda
