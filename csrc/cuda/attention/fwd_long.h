// Forward of longer sequences: an online softmax over tiles of 64 keys, prefix first.
//
// Keys and values arrive as units, keys of a tile and then its values, in a ring of slots. A unit is met by one wait
// and one barrier: behind it every warp is done with the unit before, whose slot is filled anew at once.
#pragma once
#include "cuda/attention/softmax.h"

namespace prefixattn::cuda {

// kRowTiles: of 16 queries, that a warp has. Each fragment of keys and values meets them all, so more of them halve
// what is read from shared memory, which binds before the tensor cores do.
template <class E, int D, int kRowTiles>
struct FwdLong {
    using Params = FwdLaunch;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * hw::kWarp;
    static constexpr int kMinBlocks = 2;
    static constexpr const char *kName = "fwd_long";
    static constexpr int kWarpRows = kRowTiles * kStep, kRows = kWarps * kWarpRows;  // queries
    static constexpr int kKeys = kRowTiles * D <= 128 ? 64 : 32, kGroups = kKeys / kStep;
    static constexpr int kSlots = 4;
    static constexpr bool kHold = kRowTiles * D <= 128;  // queries stay in registers, else in shared memory
    static constexpr int kBiases = 4;                    // tiles of padding that are kept

    static int shared_bytes(const Params &p) {
        return kSlots * Tile<D>::bytes(kKeys) + (kHold ? 0 : Tile<D>::bytes(kRows)) +
               (p.mask_kind == MaskKind::kNone ? 0 : kBiases * Bias::bytes(kKeys));
    }
    static int64_t blocks(const Params &p) { return (p.L + kRows - 1) / kRows; }

    PA_DEVICE static void run(const Params &p) {
        const Block at(p);
        Ring ring(p, at);
        Rows rows(p, at);
        ring.start();
        PA_NO_UNROLL
        for (int tile = 0; tile < at.tiles; ++tile) {
            float s[kRowTiles][2 * kGroups][4];
            const Tile<D> keys = ring.next_keys(tile);
            rows.multiply_keys(s, keys, tile * kKeys, ring.bias(tile));
            rows.soften(s, tile * kKeys);
            const Tile<D> values = ring.next_values(tile);
            rows.multiply_values(s, values, tile * kKeys);
        }
        rows.finish();
    }

  private:
    // Which queries and keys a block has.
    struct Block {
        int b, h, g, l0;
        int row;  // of the prefixes
        Axis axis;
        int end, tiles;  // columns that some query sees

        PA_DEVICE explicit Block(const Params &p) : Block(p, place_of(p)) {}

        PA_DEVICE KeyRows<E> rows(const Params &p, bool of_values) const {
            return {of_values ? p.v : p.k, of_values ? p.prefix_v : p.prefix_k, b, row, g};
        }

      private:
        struct Place {
            int rows, head;
        };
        PA_DEVICE static Place place_of(const Params &p) {
            const int heads = (int)p.B * (int)p.H, x = hw::block_x();
            // heavy blocks first, so that light ones fill the gaps
            if (p.causal) return {p.parts - 1 - x / heads, x % heads};
            return {x % p.parts, x / p.parts};  // those of one head side by side: they read the same keys
        }
        PA_DEVICE Block(const Params &p, Place at)
            : b(at.head / (int)p.H),
              h(at.head % (int)p.H),
              g(h / p.group),
              l0(at.rows * kRows),
              row((int)prefix_row(p, b)),
              axis(p, b) {
            const int last = l0 + kRows < (int)p.L ? l0 + kRows : (int)p.L;
            end = axis.seen(last - 1);
            tiles = (end + kKeys - 1) / kKeys;
        }
    };

    // Keys and values on their way. Unit 2 t is keys of tile t, unit 2 t + 1 its values.
    struct Ring {
        const Params &p;
        const Block &at;
        const E *const keys, *const values;  // own ones
        int slot = 0;                        // of the next unit
        float coming = 0.f;                  // a column's bias, of the tile that comes after those that are kept

        PA_DEVICE Ring(const Params &p_, const Block &at_)
            : p(p_), at(at_), keys(at.rows(p, false).own), values(at.rows(p, true).own) {}

        PA_DEVICE static Tile<D> tile_in(int slot) { return {hw::shared_begin() + slot * Tile<D>::bytes(kKeys)}; }
        PA_DEVICE static hw::Shared after() { return hw::shared_begin() + kSlots * Tile<D>::bytes(kKeys); }
        PA_DEVICE Bias bias(int tile) const {
            const hw::Shared begin = after() + (kHold ? 0 : Tile<D>::bytes(kRows));
            return {begin + tile % kBiases * Bias::bytes(kKeys), p.mask_kind != MaskKind::kNone};
        }

        PA_DEVICE void start() {
            if (bias(0).there) {
                look(0);
                keep(0);
                look(1);
                keep(1);
                look(2);
                hw::sync_block();
            }
            PA_UNROLL
            for (int i = 0; i < kSlots - 1; ++i) ask(i / 2, i % 2, i);
        }

        PA_DEVICE Tile<D> next_keys(int tile) { return next<false>(tile); }
        PA_DEVICE Tile<D> next_values(int tile) { return next<true>(tile); }

      private:
        template <bool kValues>
        PA_DEVICE Tile<D> next(int tile) {
            hw::copy_wait<kSlots - 2>();
            hw::sync_block();
            constexpr int kAhead = kSlots - 1 + kValues;  // units, from keys of this tile on
            ask(tile + kAhead / 2, kAhead % 2, slot == 0 ? kSlots - 1 : slot - 1);
            if (!kValues && bias(0).there) {
                keep(tile + 2);
                look(tile + 3);
            }
            const Tile<D> here = tile_in(slot);
            if (p.drops.threshold && tile * kKeys < at.axis.prefix) {
                drop_prefix<kKeys, kThreads>(here, at.axis, tile * kKeys, dropout_seed(p), p.drops.threshold,
                                             at.b * p.Hkv + at.g, kValues ? kDropsPrefixV : kDropsPrefixK);
                hw::sync_block();
            }
            slot = slot + 1 == kSlots ? 0 : slot + 1;
            return here;
        }
        // Past the last tile for nothing, so that waits count on.
        PA_DEVICE void ask(int tile, bool of_values, int to) {
            if (tile < at.tiles) {
                const int first = tile * kKeys;
                if (first >= at.axis.prefix && first + kKeys <= at.axis.end && !bias(tile).there)
                    copy_own(tile_in(to), of_values ? values : keys, of_values ? p.v.stride2 : p.k.stride2, first);
                else
                    copy_keys<kKeys, kThreads>(tile_in(to), at.rows(p, of_values), at.axis, first, bias(tile));
            }
            hw::copy_commit();
        }
        // As copy_keys, of a tile that is own keys alone.
        PA_DEVICE void copy_own(const Tile<D> &to, const E *own, int64_t stride, int first) const {
            constexpr int kPieces = Tile<D>::kPieces, kRowsAtOnce = kThreads / kPieces;
            static_assert(kRowsAtOnce % 8 == 0, "the swizzle of a thread's rows is one");
            const int piece = hw::thread() % kPieces, row = hw::thread() / kPieces;
            const E *from = row_at(own, first - at.axis.prefix + row, stride) + piece * kPiece;
            const hw::Shared there = to.piece(row, piece);
            PA_UNROLL
            for (int i = 0; i < kKeys / kRowsAtOnce; ++i)
                hw::copy_async16(there + i * kRowsAtOnce * Tile<D>::kRowBytes, row_at(from, i * kRowsAtOnce, stride),
                                 true);
        }
        PA_DEVICE void look(int tile) {
            if (hw::thread() < kKeys) coming = mask_at<E>(p, at.axis, at.b, at.h, tile * kKeys + hw::thread());
        }
        PA_DEVICE void keep(int tile) const {
            if (hw::thread() < kKeys) hw::store_shared(bias(tile).at + 4 * hw::thread(), coming);
        }
    };

    // A warp's queries.
    struct Rows {
        const Params &p;
        const Block &at;
        int l0;
        uint32_t q[kHold ? kRowTiles : 1][kHold ? D / kStep : 1][4];
        float o[kRowTiles][D / kColumns][4];
        float top[kRowTiles][2], sum[kRowTiles][2], mass[kRowTiles][2];
        bool large = false;  // whether a query's shift is

        PA_DEVICE Rows(const Params &p_, const Block &at_) : p(p_), at(at_), l0(at.l0 + hw::warp() * kWarpRows) {
            PA_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                top[m][0] = top[m][1] = kMinusInf;
                sum[m][0] = sum[m][1] = mass[m][0] = mass[m][1] = 0.f;
                PA_UNROLL
                for (int n = 0; n < D / kColumns; ++n) clear(o[m][n]);
                const Queries of = queries(m);
                RowPieces<D> pieces = load_rows<D>(of.template in<const E>(p.q), p.q.stride2, of.rows);
                if constexpr (kHold)
                    rows_as_a<D>(q[m], pieces);
                else  // the barrier of the ring's first unit comes before they are read
                    store_pieces(shared_rows(), hw::warp() * kWarpRows + m * kStep, pieces);
            }
        }

        // The scores of a tile; in 16 columns that none of 16 queries sees they are -inf.
        PA_DEVICE void multiply_keys(float (&s)[kRowTiles][2 * kGroups][4], const Tile<D> &keys, int first,
                                     const Bias &bias) {
            if (all_see(first + kKeys))
                scores<true>(s, keys, first, bias);
            else
                scores<false>(s, keys, first, bias);
        }

        // Scores become weights, and what is known so far is scaled to them.
        PA_DEVICE void soften(float (&s)[kRowTiles][2 * kGroups][4], int first) {
            float high[kRowTiles][2];
            bool rose = false;
            PA_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                high[m][0] = top[m][0], high[m][1] = top[m][1];
                PA_UNROLL
                for (int g = 0; g < kGroups; ++g) raise(high[m], s[m][2 * g], s[m][2 * g + 1]);
                high[m][0] = quad_max(high[m][0]), high[m][1] = quad_max(high[m][1]);
                rose = rose || high[m][0] > top[m][0] || high[m][1] > top[m][1];
            }
            if (hw::any(rose)) rescale(high);  // else each factor is 1
            PA_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                Pivot pivot[2] = {pivot_of(top[m][0], p.scores.factor), pivot_of(top[m][1], p.scores.factor)};
                if (large) {
                    PA_UNROLL
                    for (int n = 0; n < 2 * kGroups; ++n) subtract_top(s[m][n], pivot);
                    pivot[0].shift = pivot[1].shift = 0.f;
                }
                PA_UNROLL
                for (int g = 0; g < kGroups; ++g) weigh(s[m][2 * g], s[m][2 * g + 1], pivot, p.scores.factor, sum[m]);
            }
            if (first >= at.axis.prefix) return;
            if (p.mass) {
                PA_UNROLL
                for (int m = 0; m < kRowTiles; ++m) add_weights<kGroups>(mass[m], s[m], at.axis.prefix - first);
            }
            if (p.drops.threshold) {
                PA_UNROLL
                for (int m = 0; m < kRowTiles; ++m) {
                    PA_UNROLL
                    for (int g = 0; g < kGroups; ++g)
                        scale_scores(s[m][2 * g], s[m][2 * g + 1], first + g * kStep, at.axis.prefix, 1.f,
                                     p.drops.gain);
                }
            }
        }

        PA_DEVICE void multiply_values(const float (&s)[kRowTiles][2 * kGroups][4], const Tile<D> &values, int first) {
            if (first + kKeys <= seen())
                add_values<true>(s, values, first);
            else
                add_values<false>(s, values, first);
        }

        PA_DEVICE void finish() const {
            PA_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                const Pivot pivot[2] = {pivot_of(top[m][0], 0.f), pivot_of(top[m][1], 0.f)};
                const Queries of = queries(m);
                float inverse[2];
                finish_sums(p, of, pivot, sum[m], mass[m], inverse);
                store_rows<E, D>(of.template in<E>(p.out), p.out.stride2, of.rows, o[m], inverse);
            }
        }

      private:
        PA_DEVICE Queries queries(int m) const { return {p, at.axis, at.b, at.h, l0 + m * kStep}; }
        PA_DEVICE static Tile<D> shared_rows() { return {Ring::after()}; }
        // Columns from here on are seen by none of the warp's queries, of which there may be none.
        PA_DEVICE int seen() const {
            const int last = l0 + kWarpRows < (int)p.L ? l0 + kWarpRows : (int)p.L;
            return l0 < last ? at.axis.seen(last - 1) : 0;
        }
        PA_DEVICE bool all_see(int end) const { return l0 < (int)p.L && end <= at.axis.seen(l0); }

        PA_DEVICE void rescale(const float (&high)[kRowTiles][2]) {
            bool any_large = false;
            PA_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                float factor[2];
                PA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const Pivot pivot = pivot_of(high[m][half], p.scores.factor);
                    any_large = any_large || is_large(pivot);
                    factor[half] = hw::exp2((top[m][half] - pivot.top) * p.scores.factor);
                    top[m][half] = high[m][half];
                    sum[m][half] *= factor[half];
                    mass[m][half] *= factor[half];
                }
                PA_UNROLL
                for (int n = 0; n < D / kColumns; ++n) {
                    PA_UNROLL
                    for (int i = 0; i < 4; ++i) o[m][n][i] *= factor[i >> 1];
                }
            }
            large = hw::any(any_large);
        }

        template <bool kWhole>
        PA_DEVICE void scores(float (&s)[kRowTiles][2 * kGroups][4], const Tile<D> &keys, int first, const Bias &bias) {
            PA_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                PA_UNROLL
                for (int n = 0; n < 2 * kGroups; ++n) clear(s[m][n]);
            }
            PA_UNROLL
            for (int k = 0; k < D / kStep; ++k) {
                uint32_t a[kRowTiles][4];
                PA_UNROLL
                for (int m = 0; m < kRowTiles; ++m) load_queries(a[m], m, k);
                PA_UNROLL
                for (int g = 0; g < kGroups; ++g) {
                    if (!kWhole && first + g * kStep >= seen()) continue;
                    const TwoB b = load_b(keys, g * kStep, k * kStep);
                    PA_UNROLL
                    for (int m = 0; m < kRowTiles; ++m) multiply<E>(s[m][2 * g], s[m][2 * g + 1], a[m], b);
                }
            }
            PA_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                PA_UNROLL
                for (int g = 0; g < kGroups; ++g) {
                    float (&left)[4] = s[m][2 * g], (&right)[4] = s[m][2 * g + 1];
                    adjust(left, right, first + g * kStep, g * kStep, p, at.axis, bias);
                    if constexpr (!kWhole) {
                        const int l = l0 + m * kStep;
                        const int limit[2] = {at.axis.seen(l + row_of(0)), at.axis.seen(l + row_of(2))};
                        hide(left, right, first + g * kStep, limit);
                    }
                }
            }
        }

        template <bool kWhole>
        PA_DEVICE void add_values(const float (&s)[kRowTiles][2 * kGroups][4], const Tile<D> &values, int first) {
            PA_UNROLL
            for (int g = 0; g < kGroups; ++g) {
                if (!kWhole && first + g * kStep >= seen()) continue;
                uint32_t w[kRowTiles][4];
                PA_UNROLL
                for (int m = 0; m < kRowTiles; ++m) as_a<E>(w[m], s[m][2 * g], s[m][2 * g + 1]);
                PA_UNROLL
                for (int n = 0; n < D / kColumns; n += 2) {
                    const TwoB b = load_b_transposed(values, g * kStep, n * kColumns);
                    PA_UNROLL
                    for (int m = 0; m < kRowTiles; ++m) multiply<E>(o[m][n], o[m][n + 1], w[m], b);
                }
            }
        }

        PA_DEVICE void load_queries(uint32_t (&a)[4], int m, int k) const {
            if constexpr (kHold) {
                PA_UNROLL
                for (int i = 0; i < 4; ++i) a[i] = q[m][k][i];
            } else {
                load_a(a, shared_rows(), hw::warp() * kWarpRows + m * kStep, k * kStep);
            }
        }
    };
};

}  // namespace prefixattn::cuda
