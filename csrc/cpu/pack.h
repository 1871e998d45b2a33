// Conversions between storage types and floats, transposes of 4-byte words, and the arena that scratch is taken from.
#pragma once
#include "cpu/vec.h"

namespace prefixattn {
namespace PA_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

inline bool is_power_of_2(float x) { return x > 0 && !(float_to_bits(x) & 0x7fffff); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
inline float to_float(f16 x) {
    const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = (uint32_t)(x.bits & 0x7fff) << 13;
    // exponents 1 .. 30 move by 112; a multiplication does it and normalises subnormals as well
    const float magnitude = rest >= 0x0f800000 ? bits_to_float(rest + 0x70000000) : bits_to_float(rest) * 0x1p112f;
    return bits_to_float(float_to_bits(magnitude) | sign);
}
inline void from_float(float x, float *y) { *y = x; }
inline void from_float(float x, bf16 *y) {  // to nearest even
    const uint32_t u = float_to_bits(x);
    y->bits =
        (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float x, f16 *y) {  // to nearest even
    const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    uint32_t h;
    if (a > 0x7f800000) {
        h = 0x7e00;
    } else if (a >= 0x477ff000) {  // rounds to 65536 or more
        h = 0x7c00;
    } else if (a < 0x38800000) {  // subnormal in half: adding 0.5 leaves the rounded fraction in the low bits
        h = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000;
    } else {
        h = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    }
    y->bits = (uint16_t)(h | sign);
}

// n is a multiple of 8.
template <class T>
inline void widen(const T *src, float *dst, int n) {
    for (int i = 0; i < n; ++i) dst[i] = to_float(src[i]);
}
template <class T>
inline void narrow(const float *src, T *dst, int n) {
    for (int i = 0; i < n; ++i) from_float(src[i], dst + i);
}
#if defined(PA_AVX512) || defined(PA_AVX2)
template <>
inline void widen(const f16 *src, float *dst, int n) {
    for (int i = 0; i < n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
}
template <>
inline void narrow(const float *src, f16 *dst, int n) {
    for (int i = 0; i < n; i += 8)
        _mm_storeu_si128((__m128i *)(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
}
#endif

#if defined(PA_AVX512)
inline __m256i to_bf16(__m512 x) {  // as from_float: the instruction would make denormal numbers zeros
    const __m512i u = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
template <>
inline void narrow(const float *src, bf16 *dst, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(dst + i), to_bf16(_mm512_loadu_ps(src + i)));
    if (i < n)
        _mm_storeu_si128((__m128i *)(dst + i),
                         _mm256_castsi256_si128(to_bf16(_mm512_castps256_ps512(_mm256_loadu_ps(src + i)))));
}
#endif

// A vector of floats from storage.
inline vf vload_as(const float *p) { return vload(p); }
#if defined(PA_AVX512)
inline vf vload_as(const bf16 *p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
inline vf vload_as(const f16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
#elif defined(PA_AVX2)
inline vf vload_as(const bf16 *p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
inline vf vload_as(const f16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#else
template <class T>
inline vf vload_as(const T *p) {
    return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
#endif

// dst[i] = (low[i], high[i]); a null high is zeros. n is a multiple of 8.
template <class T>
inline void interleave(const T *low, const T *high, uint32_t *dst, int n) {
#if defined(PA_AVX512)
    for (int i = 0; i < n; i += 16) {
        const __mmask16 present = (__mmask16)(n - i < 16 ? 0xff : 0xffff);
        const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, low + i));
        const __m512i second =
            high ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, high + i)) : _mm512_setzero_si512();
        _mm512_mask_storeu_epi32(dst + i, present, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
#else
    if (high)
        for (int i = 0; i < n; ++i) dst[i] = low[i].bits | (uint32_t)high[i].bits << 16;
    else
        for (int i = 0; i < n; ++i) dst[i] = low[i].bits;
#endif
}

#if defined(PA_AVX512)
// dst[c * ld + r] = src[r][c] for one block of rows <= 16, cols <= 16; lanes past rows become 0.
inline void transpose_block(const char *src, ptrdiff_t stride, int rows, int cols, float *dst, ptrdiff_t ld) {
    const __mmask16 present = (__mmask16)((1u << cols) - 1);
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i)
        r[i] = i < rows ? _mm512_maskz_loadu_epi32(present, src + i * stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // r[4 * i + c]: columns c, c + 4, c + 8, c + 12 of rows 4 i .. 4 i + 3
        r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i even_lo = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        const __m512i even_hi = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i odd_lo = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i odd_hi = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(even_lo, even_hi, 0x88);
        t[c + 8] = _mm512_shuffle_i32x4(even_lo, even_hi, 0xdd);
        t[c + 4] = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd);
    }
    for (int i = 0; i < cols; ++i) _mm512_storeu_si512(dst + i * ld, t[i]);
}
constexpr int kTransposeBlock = 16;
#else
inline void transpose_block(const char *src, ptrdiff_t stride, int rows, int cols, float *dst, ptrdiff_t ld) {
    for (int c = 0; c < cols; ++c)
        for (int i = 0; i < VL; ++i) {
            float word = 0;
            if (i < rows) std::memcpy(&word, src + i * stride + 4 * c, 4);
            dst[c * ld + i] = word;
        }
}
constexpr int kTransposeBlock = VL;
#endif

// dst[c * ld + r] = src[r][c] for 4-byte words; src rows are `stride` bytes apart. Lanes from rows up to the next
// multiple of the vector length are zeroed, so dst rows must have room for them.
inline void transpose(const void *src, ptrdiff_t stride, int rows, int cols, float *dst, ptrdiff_t ld) {
    constexpr int kB = kTransposeBlock;
    for (int r = 0; r < rows; r += kB)
        for (int c = 0; c < cols; c += kB)
            transpose_block((const char *)src + r * stride + 4 * c, stride, rows - r < kB ? rows - r : kB,
                            cols - c < kB ? cols - c : kB, dst + c * ld + r, ld);
}

// Hands out 64-byte aligned pieces of one buffer. A counting one hands out nothing, and says how large a buffer must
// be.
class Arena {
  public:
    explicit Arena(void *buffer) : buffer_((char *)buffer) {
        if (!buffer) __builtin_trap();  // thread_scratch() throws before: no scratch must not pass for counting
    }
    static Arena counting() { return Arena(); }
    template <class T>
    T *take(int64_t n) {
        T *piece = counts_ ? nullptr : (T *)(buffer_ + used_);
        used_ += (n * (int64_t)sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    int64_t used() const { return used_; }

  private:
    Arena() : counts_(true) {}
    char *buffer_ = nullptr;
    bool counts_ = false;
    int64_t used_ = 0;
};

}  // namespace PA_ISA
}  // namespace prefixattn
