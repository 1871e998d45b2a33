// Backward of one block of queries against one chunk of keys: weights from lse, then up to three products.
#pragma once
#include "cpu/attention/columns.h"
#include "cpu/attention/dot.h"

namespace prefixattn {
namespace PA_ISA {

// Everything a block of queries brings along: q and dout transposed and by rows, lse and delta.
template <class Storage, class Dot>
class QuerySide {
    using Ops = Operands<Storage, Dot>;

  public:
    QueryBlock q{};
    int64_t b = -1, h = -1, block = -1;   // what is packed here
    float *queries, *douts;               // [words(D)][width]
    const float *query_rows, *dout_rows;  // [words(lanes)][ld], summed over in dK and dV
    ptrdiff_t query_ld, dout_ld;
    // [width] each. A weight is exp(score - pivot) * weight: with a pivot near the scores, not at lse, the difference
    // keeps its last bits. Where a query has no key, or a lane no query, pivot is inf, so that the weight is 0 whatever
    // a mask adds to the score.
    float *pivot, *weight, *delta;
    float *single;  // [D], the query as floats, where the forward is decode.h's; else null

    void allocate(const BwdParams &p, Arena &arena) {
        D_ = (int)p.D, Dp_ = (D_ + VL - 1) / VL * VL;
        queries = arena.take<float>((int64_t)Ops::words(D_) * kLanes);
        douts = arena.take<float>((int64_t)Ops::words(D_) * kLanes);
        in_place_ = sizeof(Storage) == 4 && Dp_ == D_;
        const int64_t copy = in_place_ ? 0 : (int64_t)Ops::words(kLanes) * Dp_;
        query_copy_ = arena.take<float>(copy);
        dout_copy_ = arena.take<float>(copy);
        pivot = arena.take<float>(kLanes);
        weight = arena.take<float>(kLanes);
        delta = arena.take<float>(kLanes);
        single = one_query(p) ? arena.take<float>(D_) : nullptr;
    }

    void pack(const BwdParams &p, int64_t b_new, int64_t h_new, int64_t block_new, float *rows) {
        if (b == b_new && h == h_new && block == block_new) return;
        b = b_new, h = h_new, block = block_new;
        q = query_block(p.L, block);
        turn(p.q, rows, 0, D_, queries);
        if (single) widen((const Storage *)at(p.q, b, h, 0, Ops::kSize), single, D_);
        by_rows(p.q, query_copy_, &query_rows, &query_ld);
        turn(p.dout, rows, 0, D_, douts);
        by_rows(p.dout, dout_copy_, &dout_rows, &dout_ld);
        const int64_t row0 = (b * p.H + h) * p.L + q.l0;
        const float log_keys = (float)__builtin_log((double)(p.P + p.S));
        const auto *lse = (const Lse<Storage> *)p.lse + row0;
        for (int i = 0; i < q.width; ++i) {
            const bool some = i < q.lanes && lse[i] != kMinusInf;
            pivot[i] = some ? (float)(lse[i] - log_keys) : -kMinusInf;
            weight[i] = some ? (float)__builtin_exp((double)pivot[i] - lse[i]) : 0;
            delta[i] = 0;
        }
        for (int i = 0; i < q.lanes; ++i) {
            float out[kMaxHeadDim], dout[kMaxHeadDim];
            widen((const Storage *)at(p.out, b, h, q.l0 + i, Ops::kSize), out, D_);
            widen((const Storage *)at(p.dout, b, h, q.l0 + i, Ops::kSize), dout, D_);
            const double sum = exact_dot(out, dout, D_);  // the softmax's gradient is what it leaves of dout @ values
            delta[i] = (float)(p.dlse ? sum - p.dlse[row0 + i] : sum);
        }
    }

    // What the gradient of memory rows d0 .. d0 + n reads: those of the queries, transposed, and dout by rows.
    void pack_for_memory(const BwdParams &p, int64_t b_new, int64_t h_new, int64_t block_new, float *rows, int d0,
                         int n) {
        b = b_new, h = h_new, block = block_new;
        q = query_block(p.L, block);
        turn(p.q, rows, d0, n, queries);
        by_rows(p.dout, dout_copy_, &dout_rows, &dout_ld);
        block = -1;  // the rest is another block's
    }

  private:
    void turn(const Strided &t, float *rows, int d0, int n, float *transposed) {
        const char *src = at(t, b, h, q.l0, Ops::kSize) + d0 * Ops::kSize;
        Ops::pack_queries(src, t.stride2 * Ops::kSize, q, n, rows, transposed);
    }

    void by_rows(const Strided &t, float *copy, const float **found, ptrdiff_t *ld) {
        const char *src = at(t, b, h, q.l0, Ops::kSize);
        const ptrdiff_t stride = t.stride2 * Ops::kSize;
        *found = in_place_ ? (const float *)src : copy;
        *ld = in_place_ ? t.stride2 : Dp_;
        if (in_place_) return;
        for (int i = 0; i < q.lanes; i += Ops::kRowAlign) {
            const Storage *row = (const Storage *)(src + i * stride);
            float *dst = copy + (int64_t)(i / Ops::kRowAlign) * Dp_;
            if constexpr (Ops::kPairs)
                interleave(row, i + 1 < q.lanes ? (const Storage *)(src + (i + 1) * stride) : nullptr, (uint32_t *)dst,
                           D_);
            else
                widen(row, dst, D_);
            for (int d = D_; d < Dp_; ++d) dst[d] = 0;
        }
    }

    int D_, Dp_;
    bool in_place_;
    float *query_copy_, *dout_copy_;
};

// A chunk of one head's keys and values: prefix rows or own keys, never both.
template <class Storage, class Dot>
class KeySide {
    using Ops = Operands<Storage, Dot>;
    using Rows = typename Ops::Rows;
    using Columns = typename Ops::Columns;

  public:
    const PrefixColumns<Storage, Dot> *shared = nullptr;  // prefix_k's
    Rows k{}, v{};
    Columns columns{};  // of keys, for dQ
    int64_t j0 = 0;     // prefix row or own key
    int n = 0;
    bool prefix = false;
    float gain = 1;   // what prefix dropout multiplies kept elements by
    KeptPrefix kept;  // and which it keeps

    void allocate(const BwdParams &p, Arena &arena, int keys) {
        const bool copies = Ops::kWiden || p.prefix_dropout_p > 0;
        k_copy_ = arena.take<float>(copies ? keys * p.D : 0);
        v_copy_ = arena.take<float>(copies ? keys * p.D : 0);
        columns_ = arena.take<uint32_t>(Ops::column_words(keys, p.D));
        if (p.prefix_dropout_p > 0) kept.allocate(arena, keys, p.D);
    }

    void load(const BwdParams &p, int64_t b, int64_t g, bool is_prefix, int64_t first, int count, bool with_dq) {
        j0 = first, n = count, prefix = is_prefix;
        const int D = (int)p.D;
        gain = prefix ? prefix_gain(p.prefix_dropout_p) : 1;
        if (prefix) {
            if (p.prefix_dropout_p > 0) kept.draw(dropout_seed(p), p.prefix_dropout_p, b * p.Hkv + g, j0, n, j0 + n);
            k = Ops::prefix_rows(p, p.prefix_k, kept, b, g, j0, n, kDropsPrefixK, k_copy_);
            v = Ops::prefix_rows(p, p.prefix_v, kept, b, g, j0, n, kDropsPrefixV, v_copy_);
        } else {
            k = Ops::rows(p.k, b, g, j0, n, D, k_copy_);
            v = Ops::rows(p.v, b, g, j0, n, D, v_copy_);
        }
        if (!with_dq) return;
        columns =
            prefix && shared->has(j0, n) ? shared->rows(prefix_row(p, b), g, j0) : Ops::columns(k, n, D, columns_);
    }

    // Memory rows d0 .. d0 + count in the place of values.
    void load_memory(const BwdParams &p, int64_t b, int64_t h, int d0, int count) {
        j0 = d0, n = count;
        v = Ops::rows(p.memory, memory_row(p, b), h, d0, count, (int)p.D, v_copy_);
    }

  private:
    float *k_copy_, *v_copy_;
    uint32_t *columns_;
};

template <class Storage, class Dot>
class BwdTile {
    using Ops = Operands<Storage, Dot>;
    using Queries = QuerySide<Storage, Dot>;
    using Keys = KeySide<Storage, Dot>;
    static constexpr int kBegins = Dot::kTiles ? Ops::kStripAlign : 2;  // the first key is a multiple of this

  public:
    void allocate(const BwdParams &p, Arena &arena, int keys) {
        D_ = (int)p.D, Dp_ = (D_ + VL - 1) / VL * VL;
        const int64_t size = (int64_t)(keys + 2) * kLanes;
        scores_ = arena.take<float>(size);
        dweights_ = arena.take<float>(size);
        weight_rows_ = arena.take<Storage>(Ops::kPairs ? size : 0);
        dscore_rows_ = arena.take<Storage>(Ops::kPairs ? size : 0);
        dscore_pairs_ = arena.take<uint32_t>(Ops::kPairs ? size / 2 : 0);
        slopes_ = arena.take<float>(p.softcap > 0 ? size : 0);
        mask_ = arena.take<float>(Masker::scratch_floats(p, keys));
    }

    // dk, dv: [n][Dp] are added to, without the scale; dq: [D][width] likewise; each may be null.
    void run(const BwdParams &p, const Queries &q, const Keys &keys, float *dk, float *dv, float *dq) {
        Range rows{0, keys.n};
        if (!keys.prefix) {
            const Range seen = visible_keys(p, padded_range(p, q.b, q.h), q.q);
            rows.begin = max_of<int64_t>(0, seen.begin - keys.j0) / kBegins * kBegins;
            rows.end = min_of<int64_t>(keys.n, seen.end - keys.j0);
        }
        if (rows.begin >= rows.end) return;
        const int r0 = (int)rows.begin, n = (int)(rows.end - rows.begin), width = q.q.width;
        const Strips strips(p.causal && !keys.prefix, causal_offset(p), q.q, keys.j0 + r0, n, Ops::kStrip,
                            Ops::kStripAlign);

        strips.each([&](int r, int count, int skip) {
            const int64_t at_row = (int64_t)r * width + skip;
            if (q.single)
                score_one(q, keys, r0 + r, count, scores_ + at_row);
            else
                gemm<Dot, true>(count, width - skip, Ops::words(D_), keys.k.by_row(r0 + r), q.queries + skip, width,
                                scores_ + at_row, width, false);
            gemm<Dot, true>(count, width - skip, Ops::words(D_), keys.v.by_row(r0 + r), q.douts + skip, width,
                            dweights_ + at_row, width, false);
        });
        float factor = p.scale * keys.gain;
        if (p.softcap > 0) {
            cap_scores(scores_, (int64_t)n * width, factor, p.softcap, slopes_);
            factor = 1;
        } else if (!keys.prefix && (has_float_mask(p) || factor <= 0)) {  // what a mask hides must stay -inf
            for (int64_t i = 0; i < (int64_t)n * width; i += VL) vstore(scores_ + i, vload(scores_ + i) * vset(factor));
            factor = 1;
        }
        if (!keys.prefix) Masker(p, q.b, q.h, mask_).apply(q.q, strips, keys.j0 + r0, n, scores_);
        const int64_t virtual0 = keys.prefix ? keys.j0 : p.P + keys.j0 + r0;
        const bool drops = p.dropout_p > 0;
        if (p.softcap > 0)
            drops ? weights<true, true>(p, q, virtual0, n, factor, keys.gain)
                  : weights<false, true>(p, q, virtual0, n, factor, keys.gain);
        else
            drops ? weights<true, false>(p, q, virtual0, n, factor, keys.gain)
                  : weights<false, false>(p, q, virtual0, n, factor, keys.gain);

        strips.each([&](int r, int count, int skip) {
            const int64_t at_row = (int64_t)r * width + skip;
            const int queries = Ops::words(q.q.lanes - skip), first = Ops::kPairs ? skip / 2 : skip;
            if (dk) {
                gemm<Dot, true>(count, Dp_, queries, rows_of(weight_rows_ + at_row, scores_ + at_row, width),
                                q.dout_rows + first * q.dout_ld, q.dout_ld, dv + (int64_t)(r0 + r) * Dp_, Dp_, true);
                gemm<Dot, true>(count, Dp_, queries, rows_of(dscore_rows_ + at_row, dweights_ + at_row, width),
                                q.query_rows + first * q.query_ld, q.query_ld, dk + (int64_t)(r0 + r) * Dp_, Dp_, true);
            }
            if (dq) {
                const float *dscores = Ops::kPairs ? (const float *)dscore_pairs_ + (int64_t)r / 2 * width
                                                   : dweights_ + (int64_t)r * width;
                Ops::add_product(keys.columns, r0 + r, count, D_, width - skip, dscores + skip, width, dq + skip,
                                 width);
            }
        });
    }

    // dq [D][width] with slope(q) * (dout @ memory^T), for the rows of the memory that stand in `keys`.
    template <class Phi>
    void memory_dq(const Queries &q, const Keys &keys, float *dq) {
        const int width = q.q.width;
        gemm<Dot, true>(keys.n, width, Ops::words(D_), keys.v.by_row(0), q.douts, width, dweights_, width, false);
        for (int r = 0; r < keys.n; r += 2)
            for (int i = 0; i < width; i += VL) {
                vf x[2];
                load_query_rows<Ops>(q.queries, width, (int)keys.j0 + r, i, x[0], x[1]);
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
                load_query_rows<Ops>(q.queries, width, r, i, first, second);
                put_rows(weight_rows_, scores_, (int64_t)r * width + i, width, Phi::value(first), Phi::value(second));
            }
        gemm<Dot, true>(n, Dp_, Ops::words(q.q.lanes), rows_of(weight_rows_, scores_, width), q.dout_rows, q.dout_ld,
                        dmemory, Dp_, true);
    }

  private:
    // Scores [count][VL] of the only query, in the first lane; the others hold no query.
    void score_one(const Queries &q, const Keys &keys, int r0, int count, float *scores) const {
        alignas(64) float found[VL];
        std::memset(scores, 0, sizeof(float) * count * VL);
        for (int r = 0; r < count; r += VL) {
            const int n = min_of(VL, count - r);
            const char *first = keys.k.data + (r0 + r) * keys.k.stride;
            if constexpr (Ops::kPairs)
                vstore(found, dot_keys<Storage>(q.single, first, keys.k.stride, n, D_));
            else
                vstore(found, dot_keys<float>(q.single, first, keys.k.stride, n, D_));
            for (int i = 0; i < n; ++i) scores[(r + i) * VL] = found[i];
        }
    }

    // [rows][width] as the operand whose sum runs over the lanes.
    static Operand rows_of(const Storage *half, const float *full, int width) {
        return Ops::kPairs ? Operand{(const char *)half, 2 * width, 4} : Operand{(const char *)full, 4 * width, 4};
    }

    static void put_rows(Storage *half, float *full, int64_t x, int width, vf first, vf second) {
        if constexpr (Ops::kPairs) return store_halves(half + x, width, first, second);
        (void)half;
        vstore(full + x, first);
        vstore(full + x + width, second);
    }

    // scores -> weights after dropout, dweights -> dscores. Keys and values lack the gain of prefix dropout, which
    // enters here, and for dv where the sample's mask is applied.
    template <bool kDrop, bool kCap>
    void weights(const BwdParams &p, const Queries &q, int64_t j0, int n, float factor, float gain) {
        const int width = q.q.width;
        AttentionDropout dropout(dropout_seed(p), p.dropout_p, q.b * p.H + q.h, q.q.l0, width);
        alignas(64) float kept[2][kLanes];
        const auto element = [&](int r, int i, const float *keep, vf &weight, vf &dscore) {
            const int64_t x = (int64_t)r * width + i;
            const vf probability =
                vexp(vrounded(vload(scores_ + x) * vset(factor)) - vload(q.pivot + i)) * vload(q.weight + i);
            vf dweight = vload(dweights_ + x) * vset(gain);
            weight = probability;
            if (kDrop) {
                weight = weight * vload(keep + i);
                dweight = dweight * vload(keep + i);
            }
            dscore = probability * (dweight - vload(q.delta + i)) * vset(gain);
            if (kCap) dscore = dscore * vload(slopes_ + x);
        };
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
                    store_halves(weight_rows_ + x, width, w0, w1);
                    store_halves(dscore_rows_ + x, width, s0, s1);
                    store_pairs<Storage>(dscore_pairs_ + (int64_t)(r / 2) * width + i, s0, s1);
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
    float *scores_, *dweights_;            // [keys][width]
    Storage *weight_rows_, *dscore_rows_;  // the same in 16 bits
    uint32_t *dscore_pairs_;               // [keys / 2][width]
    float *slopes_;                        // [keys][width], of the cap on scores
    float *mask_;
};

}  // namespace PA_ISA
}  // namespace prefixattn
