// Floats to and from pairs of 16-bit numbers: the words that bf16 and f16 products multiply.
#pragma once
#include "cpu/pack.h"

namespace prefixattn {
namespace PA_ISA {

// A vector of words to both numbers of each.
template <class T>
inline void load_pairs(const float *src, vf &low, vf &high) {
    float x[VL], y[VL];
    for (int i = 0; i < VL; ++i) {
        const uint32_t word = float_to_bits(src[i]);
        x[i] = to_float(T{(uint16_t)word});
        y[i] = to_float(T{(uint16_t)(word >> 16)});
    }
    low = vload(x), high = vload(y);
}

// Two rows of floats to two rows of T, `ld` apart.
template <class T>
inline void store_halves(T *dst, ptrdiff_t ld, vf first, vf second) {
    float x[VL], y[VL];
    vstore(x, first), vstore(y, second);
    for (int i = 0; i < VL; ++i) from_float(x[i], dst + i), from_float(y[i], dst + ld + i);
}

// Two rows of floats to one row of pairs.
template <class T>
inline void store_pairs(uint32_t *dst, vf low, vf high) {
    T halves[2][VL];
    store_halves(halves[0], VL, low, high);
    for (int i = 0; i < VL; ++i) dst[i] = halves[0][i].bits | (uint32_t)halves[1][i].bits << 16;
}

#if defined(PA_BF16DOT)
template <>
inline void load_pairs<bf16>(const float *src, vf &low, vf &high) {
    const __m512i both = (__m512i)vload(src);
    low = (vf)_mm512_slli_epi32(both, 16);
    high = (vf)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
}

template <>
inline void store_halves(bf16 *dst, ptrdiff_t ld, vf first, vf second) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm256_storeu_si256((__m256i *)dst, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i *)(dst + ld), _mm512_extracti64x4_epi64(both, 1));
}

template <>
inline void store_pairs<bf16>(uint32_t *dst, vf low, vf high) {
    alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#endif

#if defined(PA_AVX512)
inline __m256i to_half(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <>
inline void load_pairs<f16>(const float *src, vf &low, vf &high) {
    const __m512i both = (__m512i)vload(src);
    low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
    high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
}

template <>
inline void store_halves(f16 *dst, ptrdiff_t ld, vf first, vf second) {
    _mm256_storeu_si256((__m256i *)dst, to_half(first));
    _mm256_storeu_si256((__m256i *)(dst + ld), to_half(second));
}

template <>
inline void store_pairs<f16>(uint32_t *dst, vf low, vf high) {
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_half(high)), 16);
    _mm512_storeu_si512(dst, _mm512_or_si512(_mm512_cvtepu16_epi32(to_half(low)), upper));
}
#endif

// float32 in two planes of bfloat16: what a number rounds to, and the rest, exact before it is rounded itself. Where
// the first is infinite or nan the rest is nan, and so is a product.
inline vf bf16_of(vf x) {
    const vu u = (vu)x;
    return (vf)((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000);
}

inline void store_split_halves(bf16 *dst, ptrdiff_t plane, ptrdiff_t ld, vf first, vf second) {
    const vf a = bf16_of(first), b = bf16_of(second);
    store_halves(dst, ld, a, b);
    store_halves(dst + plane, ld, first - a, second - b);
}

inline void store_split_pairs(uint32_t *dst, ptrdiff_t plane, vf low, vf high) {
    const vf a = bf16_of(low), b = bf16_of(high);
    store_pairs<bf16>(dst, a, b);
    store_pairs<bf16>(dst + plane, low - a, high - b);
}

// Of two rows n <= 16 numbers to 16 pairs, which are zeros behind them. A null `high` is a row of zeros.
inline void split_pairs(const float *low, const float *high, int n, uint32_t *dst, ptrdiff_t plane) {
    alignas(64) float rows[2][16] = {};
    std::memcpy(rows[0], low, sizeof(float) * n);
    if (high) std::memcpy(rows[1], high, sizeof(float) * n);
    for (int i = 0; i < 16; i += VL) store_split_pairs(dst + i, plane, vload(rows[0] + i), vload(rows[1] + i));
}

// n is a multiple of 8.
inline void split_row(const float *src, int n, bf16 *dst, ptrdiff_t plane) {
    for (int i = 0; i < n; i += 8) {
        float rest[8];
        narrow(src + i, dst + i, 8);
        widen(dst + i, rest, 8);
        for (int j = 0; j < 8; ++j) rest[j] = src[i + j] - rest[j];
        narrow(rest, dst + plane + i, 8);
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
