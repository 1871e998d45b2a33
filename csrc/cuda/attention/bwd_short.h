// Backward of short axes: a block walks some samples of one key head and makes all their gradients, in one launch and
// with five products. A step of queries passes all keys; what a step gives the keys stays in registers, what it gives
// the queries needs dS of all keys at once, and goes through shared memory in 16 bits.
#pragma once
#include "cuda/attention/bwd_sums.h"

namespace prefixattn::cuda {

template <class E, int D, int kTiles>
struct BwdShort {
    using Params = BwdLaunch;
    static constexpr int kWarps = Short::kWarps, kThreads = kWarps * hw::kWarp, kQueries = Short::kQueries;
    static constexpr int kMinBlocks = kTiles * D > 64 ? 1 : 2;
    static constexpr const char *kName = "bwd_short";
    using Side = KeySide<E, D, kTiles, kQueries>;
    using Queries = Stage<E, D, kQueries, kThreads, true>;
    static_assert(kWarps == 8 && kQueries == 32, "queries() gives each warp 16 rows and D / 4 columns");

    // Shared memory: stages, a word for sum_if_last, dS, then keys and values.
    struct Layout {
        int rows;  // of keys
        hw::Shared word, ds, keys;

        PA_DEVICE explicit Layout(const Params &p)
            : rows(((int)(p.P + p.S) + kStep - 1) / kStep * kStep),
              word(hw::shared_begin() + Queries::kBytes),
              ds(word + kWordBytes),
              keys(ds + (p.dq.data ? p.ds_buffers * rows * DsTile::kRowBytes : 0)) {}
        PA_DEVICE DsTile ds_of(const Params &p, int step) const {
            return {ds + (p.ds_buffers == 2 ? step & 1 : 0) * rows * DsTile::kRowBytes};
        }
        PA_DEVICE Tile<D> tile(const Params &p, int sample, int which) const {
            return {keys + ((p.key_buffers == 2 ? sample & 1 : 0) * 2 + which) * rows * Tile<D>::kRowBytes};
        }
    };

    // Asks for rows begin .. end of a sample's keys and values. Rows past the end, and those that padding hides from
    // all queries, are zeros: hidden weights are 0, and 0 times nan is nan.
    PA_DEVICE static void ask_keys(const Params &p, const Layout &at, int b, int sample, int g, int begin, int end) {
        const Axis axis(p, b);
        const KeyRows<E> k(p, p.k, p.prefix_k, b, g), v(p, p.v, p.prefix_v, b, g);
        const Tile<D> to_k = at.tile(p, sample, 0), to_v = at.tile(p, sample, 1);
        const bool resident = one_prefix(p) && sample >= p.key_buffers;
        const int group = (int)(p.H / p.Hkv), piece = hw::thread() % Tile<D>::kPieces;
        const bool padded = p.mask_kind != MaskKind::kNone && (group == 1 || p.mask.stride1 == 0);
        PA_NO_UNROLL
        for (int row = begin + hw::thread() / Tile<D>::kPieces; row < end; row += kThreads / Tile<D>::kPieces) {
            if (resident && row < axis.prefix) continue;
            bool inside = row < axis.end;
            if (padded && inside) inside = padding_bias<E>(p, b, g * group, row - axis.prefix) != kMinusInf;
            const int from = inside ? row : 0;
            hw::copy_async16(to_k.piece(row, piece), key_row(k, axis, from) + piece * kPiece, inside);
            hw::copy_async16(to_v.piece(row, piece), key_row(v, axis, from) + piece * kPiece, inside);
        }
    }

    // dq of 16 queries and D / 4 columns a warp.
    PA_DEVICE static void queries(const Params &p, const DsTile &ds, const Tile<D> &k, const Axis &axis, int b, int h,
                                  int l0) {
        constexpr int kColumnsAWarp = D / 4, kBlocks = kColumnsAWarp / kColumns;
        const int query = (hw::warp() & 1) * kStep, column = (hw::warp() >> 1) * kColumnsAWarp, l = l0 + query;
        if (l >= (int)p.L) return;
        const int last = l + kStep < (int)p.L ? l + kStep : (int)p.L, end = axis.seen(last - 1);
        float c[kBlocks][4] = {};
        for (int row = 0; row < end; row += kStep) {
            uint32_t a[4];
            load_a_transposed(a, ds, row, query);
            PA_UNROLL
            for (int n = 0; n < kBlocks; n += 2)
                multiply<E>(c[n], c[n + 1], a, load_b_transposed(k, row, column + n * kColumns));
        }
        // pieces of 16 bytes: kBlocks of each of the quad's two rows, four a lane at a time
        PA_UNROLL
        for (int first = 0; first < 2 * kBlocks; first += 4) {
            hw::Words4 words;
            PA_UNROLL
            for (int j = 0; j < 4; ++j) {
                const int half = (first + j) / kBlocks, n = (first + j) % kBlocks;
                words.x[j] = hw::pack<E>(c[n][2 * half] * p.scale, c[n][2 * half + 1] * p.scale);
            }
            quad_transpose(words.x);
            const int mine = first + place(), row = l + group() + mine / kBlocks * 8;
            if (row < (int)p.L)
                hw::store_global((hw::Words4 *)(tensor_row<E>(p.dq, b, h, row) + column) + mine % kBlocks, words);
        }
    }

    PA_DEVICE static void run(const Params &p) {
        const int Hkv = (int)p.Hkv, members = (int)p.H / Hkv, g = hw::block_x() % Hkv, share = hw::block_x() / Hkv;
        const int begin = (int)(p.B * share / p.runs), end = (int)(p.B * (share + 1) / p.runs);
        const int steps = ((int)p.L + kQueries - 1) / kQueries, steps_a_sample = steps * members;
        const bool keeps_prefix = one_prefix(p);  // its sums, from sample to sample
        const Layout at(p);
        Queries stage(hw::shared_begin());
        Side side(hw::warp(), kWarps);

        if (p.sums_prefix && p.T == 1 && !keeps_prefix) clear_prefix<E, kThreads>(p, 0, g, share, 0, (int)p.P);
        Cursor now{begin, 0, 0};
        ask_keys(p, at, begin, 0, g, 0, at.rows);
        stage.ask(p, 0, begin, g * members, 0, true);
        hw::copy_commit();
        hw::copy_wait<0>();
        stage.prepare(p, 0, Axis(p, begin), begin, g * members, 0, false);
        hw::sync_block();
        const Cursor second = now.after(members, steps, 0);
        if (second.b < end) stage.ask(p, 1, second.b, g * members + second.member, second.step * kQueries, true);
        hw::copy_commit();

        PA_NO_UNROLL
        for (int i = 0; now.b < end; ++i) {
            const int sample = now.b - begin, in_sample = now.member * steps + now.step;
            const int h = g * members + now.member, l0 = now.step * kQueries;
            const Tile<D> k = at.tile(p, sample, 0), v = at.tile(p, sample, 1);
            const Axis axis(p, now.b);
            if (now.step == 0) side.place(p, axis, now.b, h, 0);
            if (in_sample == 0 && sample > 0 && (p.key_buffers == 1 || steps_a_sample == 1)) {
                hw::copy_wait<0>();
                hw::sync_block();
            }
            if (in_sample == 0 && p.drops.threshold) {
                drop_keys(p, k, v, axis, now.b, g);
                hw::sync_block();
            }
            const DsTile ds = at.ds_of(p, i);
            side.unit(p, axis, now.b, h, 0, k, v, stage, i & 1, 0, l0, p.dq.data, ds);
            hw::copy_wait<0>();
            const Cursor next = now.after(members, steps, 0), later = next.after(members, steps, 0);
            if (next.b < end)
                stage.prepare(p, (i + 1) & 1, Axis(p, next.b), next.b, g * members + next.member, next.step * kQueries,
                              false);
            hw::sync_block();
            if (later.b < end) stage.ask(p, i & 1, later.b, g * members + later.member, later.step * kQueries, true);
            if (p.key_buffers == 2 && now.b + 1 < end) {
                // a share of the next sample's in each step, to be there before its first
                const int parts = steps_a_sample > 1 ? steps_a_sample - 1 : 1;
                const int each = (at.rows + parts - 1) / parts, from = in_sample * each;
                ask_keys(p, at, now.b + 1, sample + 1, g, from, from + each < at.rows ? from + each : at.rows);
            }
            hw::copy_commit();
            if (p.dq.data) queries(p, ds, k, axis, now.b, h, l0);
            if (p.ds_buffers == 1) hw::sync_block();
            if (in_sample + 1 == steps_a_sample) {
                leave(p, side, axis, now.b, g, share, at.word, keeps_prefix);
                if (p.key_buffers == 1 && now.b + 1 < end) {
                    hw::sync_block();
                    ask_keys(p, at, now.b + 1, sample + 1, g, 0, at.rows);
                    hw::copy_commit();
                }
            }
            now = next;
        }
        if (!p.sums_prefix) return;
        if (keeps_prefix) leave_prefix(p, side, (int)p.P, {0, g, share, 0, 0, false});
        if (p.T == 1 && !p.direct) sum_if_last<E, kThreads>(p, 0, g, 0, 0, (int)p.P, 1, at.word);
    }

    // Zeros what dropout takes from the prefix.
    PA_DEVICE static void drop_keys(const Params &p, const Tile<D> &k, const Tile<D> &v, const Axis &axis, int b,
                                    int g) {
        const int64_t head = (int64_t)b * p.Hkv + g;
        const uint64_t seed = dropout_seed(p);
        drop_prefix<256, kThreads>(k, axis, 0, seed, p.drops.threshold, head, kDropsPrefixK);
        drop_prefix<256, kThreads>(v, axis, 0, seed, p.drops.threshold, head, kDropsPrefixV);
    }

    // A sample is done: its sums go, and make room for the next one's.
    PA_DEVICE static void leave(const Params &p, Side &side, const Axis &axis, int b, int g, int share, hw::Shared word,
                                bool keeps_prefix) {
        store_own(p, side, axis, b, g, 0);
        if (p.sums_prefix && !keeps_prefix) {
            const int t = (int)prefix_row(p, b);
            leave_prefix(p, side, axis.prefix, {t, g, p.T == 1 ? share : b, 0, b, p.T == 1});
            if (p.direct) clear_prefix<E, kThreads>(p, t, g, 0, axis.prefix, (int)p.P);
            if (p.T > 1 && !p.direct) sum_if_last<E, kThreads>(p, t, g, 0, 0, (int)p.P, 1, word);
        }
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) side.clear_tile(i, keeps_prefix ? axis.prefix : 0);
    }
};

}  // namespace prefixattn::cuda
