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
    static hw::Grid grid(const BwdParams &p) { return {ceil_div((int)p.S, kKeys) * (int)(p.B * p.Hkv)}; }

    PA_DEVICE static void ask_keys(const Params &p, const Tile<D> &k, const Tile<D> &v, int b, int g, int s0,
                                   int keys) {
        const int group = (int)(p.H / p.Hkv), piece = hw::thread() % Tile<D>::kPieces;
        const bool padded = p.mask_kind != MaskKind::kNone && (group == 1 || p.mask.stride1 == 0);
        PA_NO_UNROLL
        for (int row = hw::thread() / Tile<D>::kPieces; row < kKeys; row += kThreads / Tile<D>::kPieces) {
            bool inside = row < keys;
            if (padded && inside) inside = padding_bias<E>(p, b, g * group, s0 + row) != kMinusInf;
            const int from = s0 + (inside ? row : 0);
            hw::copy_async16(k.piece(row, piece), tensor_row<E>(p.k, b, g, from) + piece * kPiece, inside);
            hw::copy_async16(v.piece(row, piece), tensor_row<E>(p.v, b, g, from) + piece * kPiece, inside);
        }
    }

    PA_DEVICE static void run(const Params &p) {
        const int Hkv = (int)p.Hkv, members = (int)p.H / Hkv, pairs = (int)p.B * Hkv;
        // under causality the first keys are seen by most queries: they begin first
        const int tile = hw::block_x() / pairs, b = hw::block_x() % pairs / Hkv, g = hw::block_x() % Hkv;
        const int s0 = tile * kKeys, keys = (int)p.S - s0 < kKeys ? (int)p.S - s0 : kKeys;
        const int steps = ((int)p.L + kQueries - 1) / kQueries;
        Axis axis(p, b);
        axis.prefix = 0;
        axis.end = keys;
        axis.offset -= s0;
        const int first_query = axis.causal && axis.offset < 0 ? -axis.offset : 0;  // that sees a key
        const int first_step = first_query / kQueries;

        Queries stage(hw::shared_begin());
        const Tile<D> k{hw::shared_begin() + Queries::kBytes}, v{k.at + Tile<D>::bytes(kKeys)};
        Side side(hw::warp(), kWarps);
        ask_keys(p, k, v, b, g, s0, keys);
        Cursor now{b, 0, first_step};
        stage.ask(p, 0, b, g * members, now.step * kQueries, true);
        hw::copy_commit();
        hw::copy_wait<0>();
        stage.prepare(p, 0, axis, b, g * members, now.step * kQueries, false);
        hw::sync_block();
        const Cursor second = now.after(members, steps, first_step);
        if (second.b == b) stage.ask(p, 1, b, g * members + second.member, second.step * kQueries, true);
        hw::copy_commit();

        PA_NO_UNROLL
        for (int i = 0; now.b == b; i ^= 1) {
            const int h = g * members + now.member, l0 = now.step * kQueries;
            if (now.step == first_step) side.place(p, axis, b, h, s0);
            PA_NO_UNROLL
            for (int query = 0; query < kQueries; query += kUnit)
                if (l0 + query < (int)p.L) side.unit(p, axis, b, h, s0, k, v, stage, i, query, l0 + query, false, {});
            hw::copy_wait<0>();
            const Cursor next = now.after(members, steps, first_step), later = next.after(members, steps, first_step);
            if (next.b == b) stage.prepare(p, 1 - i, axis, b, g * members + next.member, next.step * kQueries, false);
            hw::sync_block();
            if (later.b == b) stage.ask(p, i, b, g * members + later.member, later.step * kQueries, true);
            hw::copy_commit();
            now = next;
        }
        store_own(p, side, axis, b, g, s0);
    }
};

}  // namespace prefixattn::cuda
