// Backward of one block of queries against one chunk of keys: weights from lse, then up to three products.
#pragma once
#include "cpu/attention/key_side.h"
#include "cpu/attention/query_side.h"

namespace prefixattn {
namespace PA_ISA {

template <class Storage, class Dot>
class BwdTile {
    using Ops = Operands<Storage, Dot>;
    using Queries = QuerySide<Storage, Dot>;
    using Keys = KeySide<Storage, Dot>;
    using Number = typename Ops::Number;
    static constexpr int kBegins = Dot::kTiles ? Ops::kStripAlign : 2;  // the first key is a multiple of this

  public:
    void allocate(const CpuBwdParams &p, Arena &arena, int keys) {
        D_ = (int)p.D, Dp_ = Ops::row_floats(D_);
        const int64_t size = (int64_t)(keys + (Dot::kTiles ? 0 : 2)) * kLanes;
        scores_ = arena.take<float>(size);
        dweights_ = arena.take<float>(size);
        plane_ = Ops::kPairs ? size : 0;
        weight_rows_ = arena.take<Number>(Dot::kPlanes * plane_);
        dscore_rows_ = arena.take<Number>(Dot::kPlanes * plane_);
        dscore_pairs_ = arena.take<uint32_t>(Dot::kPlanes * plane_ / 2);
        slopes_ = arena.take<float>(p.softcap > 0 ? size : 0);
        mask_ = arena.take<float>(Masker::scratch_floats(p, keys));
    }

    // dk, dv: [n][Dp] are added to, without the scale; dq: [D][width] likewise; each may be null.
    void run(const CpuBwdParams &p, const Queries &q, const Keys &keys, float *dk, float *dv, float *dq) {
        const Band band = keys.prefix ? prefix_band(p, prefix_length(p, q.b)) : own_band(p);
        const Range all = keys.prefix ? Range{0, keys.j0 + keys.n} : padded_range(p, q.b, q.h);
        const Range seen = seen_keys(band, all, q.q);
        const int64_t begin = max_of<int64_t>(0, seen.begin - keys.j0) / kBegins * kBegins;
        const int64_t end = min_of<int64_t>(keys.n, seen.end - keys.j0);
        if (begin >= end) return;
        const int r0 = (int)begin, n = (int)(end - begin), width = q.q.width;
        const Strips strips(band, q.q, keys.j0 + r0, n, Ops::kStrip, Ops::kStripAlign);

        strips.each([&](int r, int count, int skip) {
            const int64_t at_row = (int64_t)r * width + skip;
            if (q.single)
                score_one(q, keys, r0 + r, count, width, scores_ + at_row);
            else
                by_row(count, width - skip, keys.k, keys.key_tiles, r0 + r, q.queries + skip, width, scores_ + at_row);
            by_row(count, width - skip, keys.v, keys.value_tiles, r0 + r, q.douts + skip, width, dweights_ + at_row);
        });
        float factor = p.scale * keys.gain;
        if (p.softcap > 0) {
            cap_scores(scores_, (int64_t)n * width, factor, p.softcap, slopes_);
            factor = 1;
        } else if (keys.prefix ? p.prefix_in_window && factor <= 0 : has_float_mask(p) || factor <= 0) {
            // what is hidden must stay -inf
            for (int64_t i = 0; i < (int64_t)n * width; i += VL) vstore(scores_ + i, vload(scores_ + i) * vset(factor));
            factor = 1;
        }
        if (keys.prefix)
            Masker::hide(q.q, strips, n, scores_);
        else
            Masker(p, q.b, q.h, mask_).apply(q.q, strips, keys.j0 + r0, n, scores_);
        const int64_t virtual0 = keys.j0 + r0 + (keys.prefix ? 0 : p.P);
        const bool drops = p.dropout_p > 0;
        if (p.softcap > 0)
            drops ? weights<true, true>(p, q, virtual0, n, factor, keys.gain)
                  : weights<false, true>(p, q, virtual0, n, factor, keys.gain);
        else
            drops ? weights<true, false>(p, q, virtual0, n, factor, keys.gain)
                  : weights<false, false>(p, q, virtual0, n, factor, keys.gain);

        strips.each([&](int r, int count, int skip) {
            const int64_t at_row = (int64_t)r * width + skip;
            const int queries = q.q.lanes - skip, first = Ops::kPairs ? skip / 2 : skip;
            if (dk) {
                over_lanes(count, queries, weight_rows_ + at_row, scores_ + at_row, width,
                           q.dout_rows + first * q.dout_ld, q.dout_ld, q.row_plane, dv + (int64_t)(r0 + r) * Dp_);
                over_lanes(count, queries, dscore_rows_ + at_row, dweights_ + at_row, width,
                           q.query_rows + first * q.query_ld, q.query_ld, q.row_plane, dk + (int64_t)(r0 + r) * Dp_);
            }
            if (dq) {
                const float *dscores = Ops::kPairs ? (const float *)dscore_pairs_ + (int64_t)r / 2 * width
                                                   : dweights_ + (int64_t)r * width;
                over_keys(count, width - skip, keys, r0 + r, dscores + skip, width, dq + skip);
            }
        });
    }

    // dq [D][width] with slope(q) * (dout @ memory^T), for the rows of the memory that stand in `keys`.
    template <class Phi>
    void memory_dq(const Queries &q, const Keys &keys, float *dq) {
        const int width = q.q.width;
        by_row(keys.n, width, keys.v, keys.value_tiles, 0, q.douts, width, dweights_);
        for (int r = 0; r < keys.n; r += 2)
            for (int i = 0; i < width; i += VL) {
                vf x[2];
                load_query_rows<Ops>(q.queries, width, (int)keys.j0 + r, i, x[0], x[1], Ops::query_plane(D_, width));
                for (int half = 0; half < 2; ++half) {
                    float *to = dq + (keys.j0 + r + half) * width + i;
                    vstore(to,
                           vfma(Phi::slope(x[half]), vload(dweights_ + (int64_t)(r + half) * width + i), vload(to)));
                }
            }
    }

    // dmemory [n][Dp] with phi(q)^T dout of one block, packed for these n rows.
    template <class Phi>
    void memory_rows(const Queries &q, int n, float *dmemory) {
        const int width = q.q.width;
        for (int r = 0; r < n; r += 2)
            for (int i = 0; i < width; i += VL) {
                vf first, second;
                load_query_rows<Ops>(q.queries, width, r, i, first, second, Ops::query_plane(D_, width));
                put_rows(weight_rows_, scores_, (int64_t)r * width + i, width, Phi::value(first), Phi::value(second));
            }
        hide_rows(n, width);
        over_lanes(n, q.q.lanes, weight_rows_, scores_, width, q.dout_rows, q.dout_ld, q.row_plane, dmemory);
    }

  private:
    // c [rows][lanes] = rows r .. r + n of keys or values times queries or douts, transposed.
    void by_row(int n, int lanes, const typename Ops::Rows &x, const char *tiles, int r, const float *b, int ld,
                float *c) const {
        if constexpr (Dot::kTiles) {
            const TileStream columns{(const char *)b, 4 * ld, 64, 4 * kTile * ld, 4 * Ops::query_plane(D_, ld)};
            add_product<Dot>((n + kTile - 1) / kTile, lanes / kTile, (int)RowTiles<Dot>::steps(D_),
                             RowTiles<Dot>::stream(tiles, r, D_), columns, c, ld, false);
        } else {
            (void)tiles;
            gemm<Dot, true>(n, lanes, Ops::words(D_), x.by_row(r), b, ld, c, ld, false);
        }
    }

    // c [n][Dp] += weights or dscores [n][lanes] times rows of queries or douts.
    void over_lanes(int n, int lanes, const Number *half, const float *full, int width, const float *b, ptrdiff_t ldb,
                    ptrdiff_t plane, float *c) const {
        if constexpr (Dot::kTiles)
            add_product<Dot>((n + kTile - 1) / kTile, Dp_ / kTile, (lanes + 31) / 32,
                             {(const char *)half, 2 * width, 2 * kTile * width, 64, 2 * plane_},
                             {(const char *)b, 4 * ldb, 64, 4 * kTile * ldb, 4 * plane}, c, Dp_, true);
        else
            gemm<Dot, true>(n, Dp_, Ops::words(lanes), rows_of(half, full, width), b, ldb, c, Dp_, true);
    }

    // c [D][lanes] += rows r .. r + n of keys, transposed, times dscores, whose rows have a word each.
    void over_keys(int n, int lanes, const Keys &keys, int r, const float *b, int ld, float *c) const {
        if constexpr (Dot::kTiles)
            add_product<Dot>((D_ + kTile - 1) / kTile, lanes / kTile, (n + 31) / 32,
                             ColumnTiles<Dot>::stream(keys.key_columns, r, D_),
                             {(const char *)b, 4 * ld, 64, 4 * kTile * ld, 2 * plane_}, c, ld, true);
        else
            Ops::add_product(keys.columns, r, n, D_, lanes, b, ld, c, ld);
    }

    // Tiles sum over whole groups of keys: rows past n weigh nothing.
    void hide_rows(int n, int width) {
        const int64_t rows = Dot::kTiles ? (n + 31) / 32 * 32 : n, even = (n + 1) / 2 * 2;
        if (rows <= n) return;
        for (int plane = 0; plane < Dot::kPlanes; ++plane) {
            const int64_t first = plane * plane_ + n * (int64_t)width;
            std::memset(weight_rows_ + first, 0, sizeof(Number) * (rows - n) * width);
            std::memset(dscore_rows_ + first, 0, sizeof(Number) * (rows - n) * width);
            std::memset(dscore_pairs_ + plane * plane_ / 2 + even / 2 * width, 0,
                        sizeof(uint32_t) * (rows - even) / 2 * width);
        }
    }

    // Scores [count][width] of the only query, in the first lane; the others hold no query.
    void score_one(const Queries &q, const Keys &keys, int r0, int count, int width, float *scores) const {
        alignas(64) float found[VL];
        std::memset(scores, 0, sizeof(float) * count * width);
        for (int r = 0; r < count; r += VL) {
            const int n = min_of(VL, count - r);
            const char *first = keys.k.data + (r0 + r) * keys.k.stride;
            if constexpr (Ops::kPairs)
                vstore(found, dot_keys<Storage>(q.single, first, keys.k.stride, n, D_));
            else
                vstore(found, dot_keys<float>(q.single, first, keys.k.stride, n, D_));
            for (int i = 0; i < n; ++i) scores[(r + i) * width] = found[i];
        }
    }

    static vf exponential(vf x) {
        if constexpr (Dot::kTiles) return vexp2_short(x * vset(kLog2e));
        return vexp(x);
    }

    // [rows][width] as the operand whose sum runs over the lanes.
    static Operand rows_of(const Number *half, const float *full, int width) {
        return Ops::kPairs ? Operand{(const char *)half, 2 * width, 4} : Operand{(const char *)full, 4 * width, 4};
    }

    void put_rows(Number *half, float *full, int64_t x, int width, vf first, vf second) const {
        if constexpr (Ops::kPairs) return Ops::put_halves(half + x, plane_, width, first, second);
        (void)half;
        vstore(full + x, first);
        vstore(full + x + width, second);
    }

    // scores -> weights after dropout, dweights -> dscores. Keys and values lack the gain of prefix dropout, which
    // enters here, and for dv where the sample's mask is applied.
    template <bool kDrop, bool kCap>
    void weights(const CpuBwdParams &p, const Queries &q, int64_t j0, int n, float factor, float gain) {
        const int width = q.q.width;
        AttentionDropout dropout(dropout_seed(p), p.dropout_p, q.b * p.H + q.h, q.q.l0, width);
        alignas(64) float kept[2][kLanes];
        const auto element = [&](int r, int i, const float *keep, vf &weight, vf &dscore) {
            const int64_t x = (int64_t)r * width + i;
            const vf score = vrounded(vload(scores_ + x) * vset(factor)) - vload(q.pivot + i);
            const vf probability = exponential(score) * vload(q.weight + i);
            vf dweight = vload(dweights_ + x) * vset(gain);
            weight = probability;
            if (kDrop) {
                weight = weight * vload(keep + i);
                dweight = dweight * vload(keep + i);
            }
            dscore = probability * (dweight - vload(q.delta + i)) * vset(gain);
            if (kCap) dscore = dscore * vload(slopes_ + x);
        };
        hide_rows(n, width);
        for (int r = 0; r < n; r += 2) {
            const bool two = r + 1 < n;
            if (kDrop) {
                dropout.row(j0 + r, kept[0]);
                if (two) dropout.row(j0 + r + 1, kept[1]);
            }
            for (int i = 0; i < width; i += VL) {
                vf w0, s0, w1 = vzero(), s1 = vzero();
                element(r, i, kept[0], w0, s0);
                if (two) element(r + 1, i, kept[1], w1, s1);
                const int64_t x = (int64_t)r * width + i;
                if constexpr (Ops::kPairs) {
                    Ops::put_halves(weight_rows_ + x, plane_, width, w0, w1);
                    Ops::put_halves(dscore_rows_ + x, plane_, width, s0, s1);
                    Ops::put_pairs(dscore_pairs_ + (int64_t)(r / 2) * width + i, plane_ / 2, s0, s1);
                    continue;
                }
                vstore(scores_ + x, w0);
                vstore(dweights_ + x, s0);
                if (two) {
                    vstore(scores_ + x + width, w1);
                    vstore(dweights_ + x + width, s1);
                }
            }
        }
    }

    int D_, Dp_;
    float *scores_, *dweights_;           // [keys][width]
    Number *weight_rows_, *dscore_rows_;  // the same in 16 bits
    uint32_t *dscore_pairs_;              // [keys / 2][width]
    int64_t plane_;                       // numbers to the second plane of these three
    float *slopes_;                       // [keys][width], of the cap on scores
    float *mask_;
};

}  // namespace PA_ISA
}  // namespace prefixattn
