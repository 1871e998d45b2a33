// How queries, keys, values and masks reach the matrix products, by storage type and arithmetic.
#pragma once
#include "cpu/attention/mask.h"
#include "cpu/attention/phi.h"
#include "cpu/attention/philox.h"
#include "cpu/attention/softcap.h"
#include "cpu/gemm.h"
#include "cpu/pairs.h"

namespace prefixattn {
namespace PA_ISA {

// Storage: float, bf16 or f16 in memory. Dot: Fp32 widens 16-bit storage first, SplitDot makes two planes of pairs of
// floats, the others multiply pairs as they are.
template <class Storage, class Dot>
struct Operands {
    using Number = typename Dot::Number;
    static constexpr bool kPairs = Dot::kPairs, kSplits = Dot::kPlanes == 2;
    static constexpr bool kWiden = !kPairs && sizeof(Storage) == 2;
    static constexpr int64_t kSize = sizeof(Storage);
    static constexpr int kRowAlign = kPairs ? 2 : 1;  // rows of a segment are padded to whole pairs
    // Strips on the causal diagonal, and where they begin: of whole tiles in both products.
    static constexpr int kStrip = Dot::kTiles ? 32 : 16, kStripAlign = Dot::kTiles ? 32 : kRowAlign;

    static constexpr int kLaneUnit = Dot::kTiles ? 32 : VL;  // of blocks of queries in the backward

    // Floats of a row that products write, and rows of queries as pack_queries leaves them.
    static int row_floats(int D) { return Dot::kTiles ? (D + 15) / 16 * 16 : (D + VL - 1) / VL * VL; }
    static int64_t turned_words(int D) { return Dot::kTiles ? (D + 31) / 32 * 16 : words(D); }
    // Their second plane lies so many words behind the first.
    static int64_t query_plane(int D, int width) { return kSplits ? turned_words(D) * width : 0; }
    static int64_t query_words(int D, int width) { return Dot::kPlanes * turned_words(D) * width; }

    static int words(int n) { return kPairs ? (n + 1) / 2 : n; }

    // Rows of keys or values as operand A of gemm.
    struct Rows {
        const char *data;
        ptrdiff_t stride;                                                          // bytes
        Operand by_row(int r) const { return {data + r * stride, stride, 4}; }     // A[m = row, k = d]
        Operand by_column(int r) const { return {data + r * stride, 4, stride}; }  // A[m = d, k = row], floats only
    };

    // Queries (or dout) transposed: dst[word of d][lane]. `rows` is scratch of [lanes][D].
    static void pack_queries(const char *src, ptrdiff_t stride, const QueryBlock &q, int D, float *rows, float *dst,
                             ptrdiff_t plane = 0) {
        if constexpr (kSplits) {
            bf16 *first = (bf16 *)rows, *rest = first + (int64_t)q.lanes * D;
            for (int i = 0; i < q.lanes; ++i)
                split_row((const float *)(src + i * stride), D, first + (int64_t)i * D, rest - first);
            transpose(first, 2 * D, q.lanes, words(D), dst, q.width);
            transpose(rest, 2 * D, q.lanes, words(D), dst + plane, q.width);
        } else if (kWiden) {
            for (int i = 0; i < q.lanes; ++i) widen((const Storage *)(src + i * stride), rows + (int64_t)i * D, D);
            transpose(rows, 4 * D, q.lanes, D, dst, q.width);
        } else {
            transpose(src, stride, q.lanes, words(D), dst, q.width);
        }
    }

    // A maximum of scores is taken before they are scaled, so the sign of a scale goes into the packed queries, [count]
    // words: what is left is above 0. A scale of 0 leaves queries of 0.
    static float positive_scale(float scale, float *queries, int64_t count) {
        if (scale > 0) return scale;
        uint32_t *words = (uint32_t *)queries;
        for (int64_t i = 0; i < count; ++i) words[i] = scale == 0 ? 0 : words[i] ^ (kPairs ? 0x80008000u : 0x80000000u);
        return scale == 0 ? 1 : -scale;
    }

    // Rows j0 .. j0 + n of one head's keys or values; `buffer` holds them when they cannot be read in place.
    static Rows rows(const Strided &t, int64_t i0, int64_t i1, int64_t j0, int n, int D, void *buffer) {
        const Rows in_place{at(t, i0, i1, j0, kSize), (ptrdiff_t)(t.stride2 * kSize)};
        if (!kWiden) return in_place;
        float *dst = (float *)buffer;
        for (int r = 0; r < n; ++r)
            widen((const Storage *)(in_place.data + r * in_place.stride), dst + (int64_t)r * D, D);
        return {(const char *)dst, (ptrdiff_t)(4 * D)};
    }

    // The same for prefix rows under dropout: every sample has its own copy, made here, in which what is dropped is 0;
    // the scale of what is kept is applied in fp32 to what the copy was multiplied into. draw: as KeptPrefix::row().
    static Rows dropped_prefix(const Strided &t, const KeptPrefix &kept, int64_t row, int64_t head, int64_t j0, int n,
                               int draw, int D, void *buffer) {
        constexpr bool kHalf = kPairs && !kSplits;
        const int64_t size = kHalf ? 2 : 4;
        for (int r = 0; r < n; ++r) {
            const Storage *src = (const Storage *)at(t, row, head, j0 + r, kSize);
            const uint64_t *bits = kept.row(j0 + r, draw);
            if constexpr (kHalf) {
                keep_elements((const uint16_t *)src, bits, D, (uint16_t *)buffer + (int64_t)r * D);
            } else {
                float *dst = (float *)buffer + (int64_t)r * D;
                if constexpr (kWiden) widen(src, dst, D);
                keep_elements(kWiden ? dst : (const float *)src, bits, D, dst);
            }
        }
        return {(const char *)buffer, (ptrdiff_t)(size * D)};
    }

    static Rows prefix_rows(const AttnParams &p, const Strided &t, const KeptPrefix &kept, int64_t b, int64_t head,
                            int64_t j0, int n, int draw, void *buffer) {
        const int64_t row = prefix_row(p, b);
        if (p.prefix_dropout_p > 0) return dropped_prefix(t, kept, row, head, j0, n, draw, (int)p.D, buffer);
        return rows(t, row, head, j0, n, (int)p.D, buffer);
    }

    // Floats as words of both planes, `plane` apart: pairs, and as two rows that lie `ld` apart.
    static void put_pairs(uint32_t *dst, ptrdiff_t plane, vf low, vf high) {
        if constexpr (kSplits)
            store_split_pairs(dst, plane, low, high);
        else
            store_pairs<Number>(dst, low, high);
    }
    static void put_halves(Number *dst, ptrdiff_t plane, ptrdiff_t ld, vf first, vf second) {
        if constexpr (kSplits)
            store_split_halves(dst, plane, ld, first, second);
        else
            store_halves(dst, ld, first, second);
    }

    // Rows as the summed index of a product, x^T b: floats where they lie; pairs of rows in a buffer of column_words(),
    // as [pairs][D]. Tiles have their own (panels.h).
    struct Columns {
        Rows rows;
        const uint32_t *pairs;
    };

    static int64_t column_words(int64_t n, int64_t D) { return kPairs ? D * (n / 2 + 1) : 0; }

    static Columns columns(const Rows &x, int n, int D, uint32_t *buffer) {
        if constexpr (kPairs) {
            const auto row = [&](int i) { return (const Storage *)(x.data + i * x.stride); };
            for (int r = 0; r < n; r += 2)
                interleave(row(r), r + 1 < n ? row(r + 1) : nullptr, buffer + (int64_t)(r / 2) * D, D);
        }
        return {x, buffer};
    }

    // c [D][N] += rows r .. r + n of x, transposed, times b, whose rows have a word each. r is even.
    static void add_product(const Columns &x, int r, int n, int D, int N, const float *b, ptrdiff_t ldb, float *c,
                            ptrdiff_t ldc) {
        if constexpr (kPairs)
            gemm<Dot, false>(D, N, words(n), {(const char *)(x.pairs + (int64_t)r / 2 * D), 4, 4 * (ptrdiff_t)D}, b,
                             ldb, c, ldc, true);
        else
            gemm<Dot, false>(D, N, n, x.rows.by_column(r), b, ldb, c, ldc, true);
    }
};

// One vector of rows d and d + 1 (d even) of queries as pack_queries left them.
template <class Ops>
inline void load_query_rows(const float *queries, int width, int d, int i, vf &first, vf &second, ptrdiff_t plane = 0) {
    if constexpr (Ops::kPairs) {
        const float *words = queries + (int64_t)(d / 2) * width + i;
        load_pairs<typename Ops::Number>(words, first, second);
        if constexpr (Ops::kSplits) {
            vf rest[2];
            load_pairs<typename Ops::Number>(words + plane, rest[0], rest[1]);
            first = first + rest[0], second = second + rest[1];
        }
        return;
    }
    first = vload(queries + (int64_t)d * width + i);
    second = vload(queries + (int64_t)(d + 1) * width + i);
}

}  // namespace PA_ISA
}  // namespace prefixattn
