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
    static constexpr int kMinBlocks = 1;
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
        const int thread = hw::opaque(hw::thread()), piece = thread % Tile<D>::kPieces;
        const bool padded = p.mask_kind != MaskKind::kNone && (p.members == 1 || p.mask.stride1 == 0);
        PA_NO_UNROLL
        for (int row = begin + thread / Tile<D>::kPieces; row < end; row += kThreads / Tile<D>::kPieces) {
            if (resident && row < axis.prefix) continue;
            bool inside = row < axis.end;
            if (padded && inside) inside = padding_bias<E>(p, b, g * p.members, row - axis.prefix) != kMinusInf;
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
        const Lanes<D> lanes;
        float c[kBlocks][4] = {};
        for (int row = 0; row < end; row += kStep) {
            uint32_t a[4];
            load_a_transposed(a, ds, row, query);
            PA_UNROLL
            for (int n = 0; n < kBlocks; n += 2)
                multiply<E>(c[n], c[n + 1], a, lanes.load_b_transposed(k, row, column + n * kColumns));
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

    // What the block does, from its place in the grid. It is made anew on each side of what needs all registers.
    struct Share {
        int g, index, begin, end;  // key head, which of the runs of samples, and those

        PA_DEVICE explicit Share(const Params &p) : g(uniform(hw::block_x())), index(uniform(hw::block_y())) {
            begin = index * p.run + (index < p.longer ? index : p.longer);
            end = begin + p.run + (index < p.longer);
        }
    };

    PA_DEVICE static void run(const Params &p) {
        Queries stage(hw::shared_begin());
        Side side(hw::warp(), kWarps);
        Cursor now = open(p, stage);
        PA_NO_UNROLL
        for (int i = 0; now.b < Share(p).end; i ^= 1) {
            weigh(p, stage, side, now, i);
            now.hide();
            now = finish(p, stage, side, now, i);
        }
        const Share mine(p);
        if (!p.sums_prefix) return;
        if (p.T == 1 && !p.direct) sum_if_last<E, kThreads>(p, 0, mine.g, 0, 0, (int)p.P, 1, Layout(p).word);
    }

    // The first step is there, the second is asked for.
    PA_DEVICE static Cursor open(const Params &p, Queries &stage) {
        const Share mine(p);
        const Layout at(p);
        const Cursor now{mine.begin, 0, 0}, next = now.after(p.members, p.steps, 0);
        if (p.sums_prefix && p.T == 1 && !one_prefix(p))
            clear_prefix<E, kThreads>(p, 0, mine.g, mine.index, 0, (int)p.P);
        ask_keys(p, at, now.b, 0, mine.g, 0, at.rows);
        stage.ask(p, 0, now.b, mine.g * p.members, 0, true);
        hw::copy_commit();
        hw::copy_wait<0>();
        stage.prepare(p, 0, Axis(p, now.b), now.b, mine.g * p.members, 0, false);
        hw::sync_block();
        if (next.b < mine.end) stage.ask(p, 1, next.b, mine.g * p.members + next.member, next.step * kQueries, true);
        hw::copy_commit();
        return now;
    }

    // The step's products for keys.
    PA_DEVICE static void weigh(const Params &p, const Queries &stage, Side &side, const Cursor &now, int i) {
        const Share mine(p);
        const Layout at(p);
        const int sample = now.b - mine.begin, h = mine.g * p.members + now.member;
        const Tile<D> k = at.tile(p, sample, 0), v = at.tile(p, sample, 1);
        const Axis axis(p, now.b);
        if (now.step == 0) side.place(p, axis, now.b, h, 0);
        const bool opens = now.member == 0 && now.step == 0;
        if (opens && sample > 0 && (p.key_buffers == 1 || p.steps * p.members == 1)) {
            hw::copy_wait<0>();
            hw::sync_block();
        }
        if (opens && p.drops.threshold) {
            drop_keys(p, k, v, axis, now.b, mine.g);
            hw::sync_block();
        }
        side.unit(p, axis, now.b, h, 0, k, v, stage, i, 0, now.step * kQueries, p.dq.data, at.ds_of(p, i));
    }

    // What comes after them: the next step's delta, the copies for the one after it, dq, and the end of a sample.
    PA_DEVICE static Cursor finish(const Params &p, Queries &stage, Side &side, const Cursor &now, int i) {
        const Share mine(p);
        const Layout at(p);
        const Cursor next = now.after(p.members, p.steps, 0), later = next.after(p.members, p.steps, 0);
        const int first_head = mine.g * p.members, sample = now.b - mine.begin;
        hw::copy_wait<0>();
        if (next.b < mine.end)
            stage.prepare(p, i ^ 1, Axis(p, next.b), next.b, first_head + next.member, next.step * kQueries, false);
        hw::sync_block();
        if (later.b < mine.end) stage.ask(p, i, later.b, first_head + later.member, later.step * kQueries, true);
        const int steps = p.steps * p.members, done = now.member * p.steps + now.step;
        const bool closes = done + 1 == steps, more = now.b + 1 < mine.end;
        if (p.key_buffers == 2 && more) {
            // a share of the next sample's in each step, to be there before its first
            const int parts = steps > 1 ? steps - 1 : 1;
            const int each = (at.rows + parts - 1) / parts, from = done * each;
            ask_keys(p, at, now.b + 1, sample + 1, mine.g, from, from + each < at.rows ? from + each : at.rows);
        }
        hw::copy_commit();
        const Axis axis(p, now.b);
        if (p.dq.data)
            queries(p, at.ds_of(p, i), at.tile(p, sample, 0), axis, now.b, first_head + now.member,
                    now.step * kQueries);
        if (p.ds_buffers == 1) hw::sync_block();
        if (closes) leave(p, side, axis, now.b, mine.g, mine.index, at.word, more);
        if (closes && more && p.key_buffers == 1) {
            hw::sync_block();
            ask_keys(p, at, now.b + 1, sample + 1, mine.g, 0, at.rows);
            hw::copy_commit();
        }
        return next;
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
                                bool more) {
        store_own(p, side, axis, b, g, 0);
        const bool keeps = one_prefix(p) && more;  // the prefix's sums, for the next sample to go on from
        if (p.sums_prefix && !keeps) {
            const int t = (int)prefix_row(p, b);
            leave_prefix(p, side, axis.prefix, {t, g, p.T == 1 ? share : b, 0, b, p.T == 1 && !one_prefix(p)});
            if (p.direct) clear_prefix<E, kThreads>(p, t, g, 0, axis.prefix, (int)p.P);
            if (p.T > 1 && !p.direct) sum_if_last<E, kThreads>(p, t, g, 0, 0, (int)p.P, 1, word);
        }
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) side.clear_tile(i, keeps ? axis.prefix : 0);
    }
};

}  // namespace prefixattn::cuda
