// Forward of short sequences: all keys and values of a sample and key head lie in shared memory, and a warp has the
// scores of 16 queries with every key in registers, so that nothing is rescaled.
//
// A warp takes 16 queries at a time, and finds them in global memory as fragments: shared memory holds keys and values
// alone, 53,248 bytes for 208 keys of 64 elements, three blocks on an sm_80.
//
// Four warps: a ViT's 197 queries are 13 tiles, and take four rounds. Seven warps would take two, but one block of them
// fills the registers of a multiprocessor, and nothing would compute while its keys arrive.
#pragma once
#include "cuda/attention/softmax.h"

namespace prefixattn::cuda {

// kKeys: columns in registers, a multiple of 16. kPlain: all of them are computed, which leaves the compiler one block
// of products to order, and nothing but the end, which lies in the last 16, hides a key. Else as many as 16 queries see
// are computed, in steps of 16, and there may be lengths, causality, a mask and prefix dropout.
template <class E, int D, int kKeys, bool kPlain>
struct FwdShort {
    using Params = FwdLaunch;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * hw::kWarp;
    // with registers for three blocks the scores of 208 keys still fit
    static constexpr int kMinBlocks = kKeys <= 208 && D == 64 ? 3 : 2;
    static constexpr const char *kName = kPlain ? "fwd_short_plain" : "fwd_short";
    static constexpr int kGroups = kKeys / kStep;
    static constexpr int kPart = 64;  // columns of the values that are summed at a time

    static int shared_bytes(const Params &p) {
        return 2 * Tile<D>::bytes(kKeys) + (p.mask_kind == MaskKind::kNone ? 0 : Bias::bytes(kKeys));
    }

    PA_DEVICE static void run(const Params &p) {
        const Tile<D> keys{hw::shared_begin()}, values{keys.at + Tile<D>::bytes(kKeys)};
        const Bias bias{values.at + Tile<D>::bytes(kKeys), !kPlain && p.mask_kind != MaskKind::kNone};
        const int b = hw::block_y(), h = hw::block_x() * p.heads, g = h / p.group;
        const Axis axis = kPlain ? Axis::of_all(p) : Axis(p, b);
        if (bias.there) {
            fill_bias(p, axis, bias, b, h);
            hw::sync_block();
        }
        copy_keys<kKeys, kThreads>(keys, KeyRows<E>(p, p.k, p.prefix_k, b, g), axis, 0, bias);
        hw::copy_commit();
        copy_keys<kKeys, kThreads>(values, KeyRows<E>(p, p.v, p.prefix_v, b, g), axis, 0, bias);
        hw::copy_commit();

        Unit unit(p);
        RowPieces<D> pieces = {};
        if (unit.there(p)) pieces = queries_of(p, unit.queries(p, axis, b));
        const int64_t head = b * p.Hkv + g;
        arrive<1>(p, axis, keys, head, kDropsPrefixK);
        if (!unit.there(p)) return arrive<0>(p, axis, values, head, kDropsPrefixV);  // the others wait for every warp
        PA_NO_UNROLL
        while (unit.there(p)) {
            const Queries q = unit.queries(p, axis, b);
            const int groups = kPlain ? kGroups : (q.seen + kStep - 1) / kStep;
            float s[2 * kGroups][4], top[2] = {kMinusInf, kMinusInf};
            multiply_keys(s, top, pieces, keys, groups, p, axis, bias, q);
            Pivot pivot[2] = {pivot_of(quad_max(top[0]), p.scores.factor), pivot_of(quad_max(top[1]), p.scores.factor)};
            if (hw::any(is_large(pivot[0]) || is_large(pivot[1]))) {
                PA_UNROLL
                for (int n = 0; n < 2 * kGroups; ++n)
                    if (n < 2 * groups) subtract_top(s[n], pivot);
                pivot[0].shift = pivot[1].shift = 0.f;
            }
            if (unit.is_first(p)) arrive<0>(p, axis, values, head, kDropsPrefixV);
            float sum[2] = {0.f, 0.f}, mass[2] = {0.f, 0.f}, inverse[2];
            if (p.mass) add_mass<kGroups>(mass, s, pivot, p.scores.factor, axis.prefix);
            const int again = hw::opaque(b);  // so that no address is kept in registers through the products
            if constexpr (kPlain) {
                uint32_t w[kGroups][4];
                weights(w, sum, s, pivot, p.scores.factor);
                finish_sums(p, unit.queries(p, axis, again), pivot, sum, mass, inverse);
                PA_UNROLL
                for (int d = 0; d < D; d += kPart) {
                    float o[kPart / kColumns][4];
                    multiply_values(o, w, values, d);
                    const Queries done = unit.queries(p, axis, hw::opaque(b));
                    if (d + kPart == D) {
                        unit.advance(p);
                        if (unit.there(p)) pieces = queries_of(p, unit.queries(p, axis, again));
                    }
                    store_rows<E, kPart>(done.template in<E>(p.out) + d, p.out.stride2, done.rows, o, inverse);
                }
            } else {
                float o[D / kColumns][4];
                multiply_values(o, sum, s, pivot, values, groups, p, axis);
                const Queries done = unit.queries(p, axis, again);
                unit.advance(p);
                if (unit.there(p)) pieces = queries_of(p, unit.queries(p, axis, again));
                finish_sums(p, done, pivot, sum, mass, inverse);
                store_rows<E, D>(done.template in<E>(p.out), p.out.stride2, done.rows, o, inverse);
            }
        }
    }

  private:
    PA_DEVICE static int tiles(const Params &p) { return ((int)p.L + kStep - 1) / kStep; }

    // 16 queries of a head. Those of all heads of a block are numbered on; a warp takes one in kWarps.
    struct Unit {
        int at, h;

        PA_DEVICE explicit Unit(const Params &p) : h(hw::block_x() * p.heads) {
            // which warp has a unit more than others changes from block to block, because a warp's number chooses
            // among the four schedulers of a multiprocessor
            const int turn = hw::warp() + hw::block_x() + hw::block_y() + hw::block_z();
            at = hw::block_z() * p.units + (turn & (kWarps - 1));
            settle(p);
        }
        PA_DEVICE bool there(const Params &p) const {
            return at < (hw::block_z() + 1) * p.units && h < (hw::block_x() + 1) * p.heads;
        }
        PA_DEVICE bool is_first(const Params &p) const { return at < hw::block_z() * p.units + kWarps; }
        PA_DEVICE void advance(const Params &p) {
            at += kWarps;
            settle(p);
        }
        PA_DEVICE Queries queries(const Params &p, const Axis &axis, int b) const {
            return {p, axis, b, h, (at - (h - hw::block_x() * p.heads) * tiles(p)) * kStep};
        }

      private:
        PA_DEVICE void settle(const Params &p) {
            PA_NO_UNROLL
            while (at >= (h + 1 - hw::block_x() * p.heads) * tiles(p)) ++h;
        }
    };
    PA_DEVICE static RowPieces<D> queries_of(const Params &p, const Queries &q) {
        return load_rows<D>(q.template in<const E>(p.q), p.q.stride2, q.rows);
    }

    PA_DEVICE static void fill_bias(const Params &p, const Axis &axis, const Bias &bias, int b, int h) {
        PA_NO_UNROLL
        for (int column = hw::thread(); column < kKeys; column += kThreads)
            hw::store_shared(bias.at + 4 * column, mask_at<E>(p, axis, b, h, column));
    }

    // Waits for the copies of all threads but the last kPending groups of each.
    template <int kPending>
    PA_DEVICE static void arrive(const Params &p, const Axis &axis, const Tile<D> &tile, int64_t head, int draw) {
        hw::copy_wait<kPending>();
        hw::sync_block();
        if (kPlain || p.drops.threshold == 0) return;
        drop_prefix<kKeys, kThreads>(tile, axis, 0, dropout_seed(p), p.drops.threshold, head, draw);
        hw::sync_block();
    }

    // Scores, and the largest of a lane's by row.
    PA_DEVICE static void multiply_keys(float (&s)[2 * kGroups][4], float (&top)[2], RowPieces<D> &pieces,
                                        const Tile<D> &keys, int groups, const Params &p, const Axis &axis,
                                        const Bias &bias, const Queries &q) {
        uint32_t a[D / kStep][4];
        rows_as_a<D>(a, pieces);
        PA_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            if (g >= groups) continue;
            clear(s[2 * g]);
            clear(s[2 * g + 1]);
            PA_UNROLL
            for (int k = 0; k < D / kStep; ++k)
                multiply<E>(s[2 * g], s[2 * g + 1], a[k], load_b(keys, g * kStep, k * kStep));
            if (!kPlain) adjust(s[2 * g], s[2 * g + 1], g * kStep, g * kStep, p, axis, bias);
            if (kPlain ? g == kGroups - 1 : (g + 1) * kStep > q.full) hide(s[2 * g], s[2 * g + 1], g * kStep, q.limit);
            raise(top, s[2 * g], s[2 * g + 1]);
        }
    }

    // Scores become weights, and fragments.
    PA_DEVICE static void weights(uint32_t (&w)[kGroups][4], float (&sum)[2], float (&s)[2 * kGroups][4],
                                  const Pivot (&pivot)[2], float factor) {
        PA_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            weigh(s[2 * g], s[2 * g + 1], pivot, factor, sum);
            as_a<E>(w[g], s[2 * g], s[2 * g + 1]);
            PA_UNROLL
            for (int i = 0; i < 4; ++i) w[g][i] = hw::opaque(w[g][i]);  // rounded here, not where they are used
        }
    }
    // Which meet columns d .. d + kPart of the values.
    PA_DEVICE static void multiply_values(float (&o)[kPart / kColumns][4], const uint32_t (&w)[kGroups][4],
                                          const Tile<D> &values, int d) {
        PA_UNROLL
        for (int n = 0; n < kPart / kColumns; ++n) clear(o[n]);
        PA_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            PA_UNROLL
            for (int n = 0; n < kPart / kColumns; n += 2)
                multiply<E>(o[n], o[n + 1], w[g], load_b_transposed(values, g * kStep, d + n * kColumns));
        }
    }

    // Both at once, 16 keys after 16: where there are conditions, an array of weights would cost more registers.
    PA_DEVICE static void multiply_values(float (&o)[D / kColumns][4], float (&sum)[2], float (&s)[2 * kGroups][4],
                                          const Pivot (&pivot)[2], const Tile<D> &values, int groups, const Params &p,
                                          const Axis &axis) {
        const int gained = p.drops.threshold ? axis.prefix : 0;
        PA_UNROLL
        for (int n = 0; n < D / kColumns; ++n) clear(o[n]);
        PA_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            if (g >= groups) continue;
            weigh(s[2 * g], s[2 * g + 1], pivot, p.scores.factor, sum);
            if (g * kStep < gained) scale_scores(s[2 * g], s[2 * g + 1], g * kStep, gained, 1.f, p.drops.gain);
            uint32_t w[4];
            as_a<E>(w, s[2 * g], s[2 * g + 1]);
            PA_UNROLL
            for (int n = 0; n < D / kColumns; n += 2)
                multiply<E>(o[n], o[n + 1], w, load_b_transposed(values, g * kStep, n * kColumns));
        }
    }
};

}  // namespace prefixattn::cuda
