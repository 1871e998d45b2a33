// What a block of queries brings to the tiles of the backward.
#pragma once
#include "cpu/attention/dot.h"
#include "cpu/attention/operands.h"

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
    ptrdiff_t row_plane;  // to the second plane of these rows
    // [width] each. A weight is exp(score - pivot) * weight: with a pivot near the scores, not at lse, the difference
    // keeps its last bits. Where a query has no key, or a lane no query, pivot is inf, so that the weight is 0 whatever
    // a mask adds to the score.
    float *pivot, *weight, *delta;
    float *single;  // [D], the query as floats, where the forward is decode.h's; else null

    void allocate(const CpuBwdParams &p, Arena &arena) {
        D_ = (int)p.D, Dp_ = Ops::row_floats(D_);
        queries = arena.take<float>(Ops::query_words(D_, kLanes));
        douts = arena.take<float>(Ops::query_words(D_, kLanes));
        in_place_ = !Ops::kPairs && sizeof(Storage) == 4 && Dp_ == D_;
        row_plane = Ops::kSplits ? (ptrdiff_t)Ops::words(kLanes) * Dp_ : 0;
        const int64_t copy = in_place_ ? 0 : (int64_t)Dot::kPlanes * Ops::words(kLanes) * Dp_;
        query_copy_ = arena.take<float>(copy);
        dout_copy_ = arena.take<float>(copy);
        pivot = arena.take<float>(kLanes);
        weight = arena.take<float>(kLanes);
        delta = arena.take<float>(kLanes);
        single = one_query(p) ? arena.take<float>(D_) : nullptr;
    }

    void pack(const CpuBwdParams &p, int64_t b_new, int64_t h_new, int64_t block_new, float *rows) {
        if (b == b_new && h == h_new && block == block_new) return;
        b = b_new, h = h_new, block = block_new;
        q = query_block(p.L, block, Ops::kLaneUnit);
        turn(p.q, rows, 0, D_, queries);
        if (single) widen((const Storage *)at(p.q, b, h, 0, Ops::kSize), single, D_);
        by_rows(p.q, query_copy_, &query_rows, &query_ld);
        turn(p.dout, rows, 0, D_, douts);
        by_rows(p.dout, dout_copy_, &dout_rows, &dout_ld);
        const int64_t row0 = first_row(p, b, h) + q.l0;
        const float log_keys = (float)__builtin_log((double)(p.P + p.S));
        const auto *lse = (const Lse<Storage> *)p.lse + row0;
        for (int i = 0; i < q.width; ++i) {
            const bool some = i < q.lanes && lse[i] != kMinusInf;
            pivot[i] = some ? (float)(lse[i] - log_keys) : -kMinusInf;
            const double rest = some ? (double)pivot[i] - lse[i] : kMinusInf;
            weight[i] = kWide ? (float)__builtin_exp(rest) : (float)rest;
            delta[i] = 0;
        }
        for (int i = 0; i < q.width && !kWide; i += VL) vstore(weight + i, vexp(vload(weight + i)));
        for (int i = 0; i < q.lanes; ++i) {
            const Storage *out = (const Storage *)at(p.out, b, h, q.l0 + i, Ops::kSize);
            const Storage *dout = (const Storage *)at(p.dout, b, h, q.l0 + i, Ops::kSize);
            const double sum = dot(out, dout);  // the softmax's gradient is what it leaves of dout @ values
            delta[i] = (float)(p.dlse ? sum - p.dlse[row0 + i] : sum);
        }
    }

    // What the gradient of memory rows d0 .. d0 + n reads: those of the queries, transposed, and dout by rows.
    void pack_for_memory(const CpuBwdParams &p, int64_t b_new, int64_t h_new, int64_t block_new, float *rows, int d0,
                         int n) {
        b = b_new, h = h_new, block = block_new;
        q = query_block(p.L, block, Ops::kLaneUnit);
        turn(p.q, rows, d0, n, queries);
        by_rows(p.dout, dout_copy_, &dout_rows, &dout_ld);
        block = -1;  // the rest is another block's
    }

  private:
    static constexpr bool kWide = sizeof(Storage) == 4;  // what 16 bits round away anyway needs no double

    double dot(const Storage *x, const Storage *y) const {
        alignas(64) float a[kMaxHeadDim], b[kMaxHeadDim];
        widen(x, a, D_), widen(y, b, D_);
        if (kWide) return exact_dot(a, b, D_);
        for (int d = D_; d < (D_ + VL - 1) / VL * VL; ++d) a[d] = b[d] = 0;
        vf sum = vzero();
        for (int d = 0; d < D_; d += VL) sum = vfma(vload(a + d), vload(b + d), sum);
        return vsum(sum);
    }

    void turn(const Strided &t, float *rows, int d0, int n, float *transposed) {
        const char *src = at(t, b, h, q.l0, Ops::kSize) + d0 * Ops::kSize;
        if (Dot::kTiles && (q.lanes < q.width || D_ % 32))
            std::memset(transposed, 0, sizeof(float) * Ops::query_words(D_, q.width));
        Ops::pack_queries(src, t.stride2 * Ops::kSize, q, n, rows, transposed, Ops::query_plane(D_, q.width));
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
            const Storage *next = i + 1 < q.lanes ? (const Storage *)(src + (i + 1) * stride) : nullptr;
            if constexpr (Ops::kSplits)
                for (int d = 0; d < D_; d += 16)
                    split_pairs(row + d, next ? next + d : nullptr, min_of(16, D_ - d), (uint32_t *)dst + d, row_plane);
            else if constexpr (Ops::kPairs)
                interleave(row, next, (uint32_t *)dst, D_);
            else
                widen(row, dst, D_);
            for (int d = D_; d < Dp_; ++d) dst[d] = 0;
        }
        const int filled = Ops::words(q.lanes), all = Ops::words(q.width);
        if (!Dot::kTiles) return;
        for (int plane = 0; plane < Dot::kPlanes; ++plane)
            std::memset(copy + plane * row_plane + (int64_t)filled * Dp_, 0, sizeof(float) * (all - filled) * Dp_);
    }

    int D_, Dp_;
    bool in_place_;
    float *query_copy_, *dout_copy_;
};

}  // namespace PA_ISA
}  // namespace prefixattn
