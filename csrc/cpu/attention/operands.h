// How queries, keys, values and masks reach the matrix products, by storage type and arithmetic.
#pragma once
#include "cpu/attention/mask.h"
#include "cpu/attention/phi.h"
#include "cpu/attention/philox.h"
#include "cpu/attention/softcap.h"
#include "cpu/gemm.h"

namespace prefixattn {
namespace PA_ISA {

// Storage: float, bf16 or f16 in memory. Dot: Fp32 widens 16-bit storage first, Bf16Dot multiplies pairs as they are.
template <class Storage, class Dot>
struct Operands {
#if defined(PA_BF16DOT)
    static constexpr bool kPairs = __is_same(Dot, Bf16Dot);
#else
    static constexpr bool kPairs = false;
#endif
    static constexpr bool kWiden = !kPairs && sizeof(Storage) == 2;
    static constexpr int64_t kSize = sizeof(Storage);
    static constexpr int kRowAlign = kPairs ? 2 : 1;  // rows of a segment are padded to whole pairs

    static int words(int n) { return kPairs ? (n + 1) / 2 : n; }

    // Rows of keys or values as operand A of gemm.
    struct Rows {
        const char *data;
        ptrdiff_t stride;                                                          // bytes
        Operand by_row(int r) const { return {data + r * stride, stride, 4}; }     // A[m = row, k = d]
        Operand by_column(int r) const { return {data + r * stride, 4, stride}; }  // A[m = d, k = row], floats only
    };

    // Queries (or dout) transposed: dst[word of d][lane].
    static void pack_queries(const char *src, ptrdiff_t stride, const QueryBlock &q, int D, float *rows, float *dst) {
        if (kWiden) {
            for (int i = 0; i < q.lanes; ++i) widen((const Storage *)(src + i * stride), rows + (int64_t)i * D, D);
            transpose(rows, 4 * D, q.lanes, D, dst, q.width);
        } else {
            transpose(src, stride, q.lanes, words(D), dst, q.width);
        }
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
        const int64_t size = kPairs ? 2 : 4;
        for (int r = 0; r < n; ++r) {
            const Storage *src = (const Storage *)at(t, row, head, j0 + r, kSize);
            const uint64_t *bits = kept.row(j0 + r, draw);
            if constexpr (kPairs) {
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

    // dst[r / 2][d] = (row r, row r + 1): rows become the summed index of a product in pairs.
    static void pair_rows(const Rows &x, int n, int D, uint32_t *dst) {
        for (int r = 0; r < n; r += 2)
            interleave((const bf16 *)(x.data + r * x.stride),
                       r + 1 < n ? (const bf16 *)(x.data + (r + 1) * x.stride) : nullptr, dst + (int64_t)(r / 2) * D,
                       D);
    }
};

#if defined(PA_BF16DOT)
inline void load_pairs(const float *src, vf &low, vf &high) {
    const __m512i both = (__m512i)vload(src);
    low = (vf)_mm512_slli_epi32(both, 16);
    high = (vf)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
}

// Two rows of floats to two rows of bfloat16, `ld` apart.
inline void store_halves(bf16 *dst, ptrdiff_t ld, vf first, vf second) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm256_storeu_si256((__m256i *)dst, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i *)(dst + ld), _mm512_extracti64x4_epi64(both, 1));
}

// Two rows of floats to one row of pairs.
inline void store_pairs(uint32_t *dst, vf low, vf high) {
    alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#endif

// One vector of rows d and d + 1 (d even) of queries as pack_queries left them.
template <class Ops>
inline void load_query_rows(const float *queries, int width, int d, int i, vf &first, vf &second) {
#if defined(PA_BF16DOT)
    if (Ops::kPairs) return load_pairs(queries + (int64_t)(d / 2) * width + i, first, second);
#endif
    first = vload(queries + (int64_t)d * width + i);
    second = vload(queries + (int64_t)(d + 1) * width + i);
}

}  // namespace PA_ISA
}  // namespace prefixattn
