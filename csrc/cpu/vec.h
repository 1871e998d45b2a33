// One float vector type per instruction set. Included only from files <op>/<isa>.cpp, which define PA_ISA (a
// namespace) and one of PA_AVX512, PA_AVX2 or neither. No templates of the standard library below this line: an
// instance compiled for AVX-512 could otherwise be the one the linker keeps for everybody.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(PA_AVX512) || defined(PA_AVX2)
#include <immintrin.h>
#endif

#include "api/limits.h"

namespace prefixattn {
namespace PA_ISA {

#if defined(PA_AVX512)
constexpr int VL = 16;     // floats in a vector
constexpr int kMaxNV = 4;  // vectors in a row of a register tile
typedef __m512 vf;
inline vf vload(const float *p) { return _mm512_loadu_ps(p); }
inline void vstore(float *p, vf x) { _mm512_storeu_ps(p, x); }
inline vf vset(float x) { return _mm512_set1_ps(x); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// the second operand if either is nan
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
// a where x > 0, b elsewhere
inline vf vpositive(vf x, vf a, vf b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), b, a);
}
inline vf vround(vf x) { return _mm512_roundscale_ps(x, 0); }
inline vf vsqrt(vf x) { return _mm512_sqrt_ps(x); }
inline float vsum(vf x) { return _mm512_reduce_add_ps(x); }
inline vf vscale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }  // x * 2^n, n integral
#elif defined(PA_AVX2)
constexpr int VL = 8;
constexpr int kMaxNV = 2;
typedef __m256 vf;
inline vf vload(const float *p) { return _mm256_loadu_ps(p); }
inline void vstore(float *p, vf x) { _mm256_storeu_ps(p, x); }
inline vf vset(float x) { return _mm256_set1_ps(x); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf vpositive(vf x, vf a, vf b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}
inline vf vround(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vsqrt(vf x) { return _mm256_sqrt_ps(x); }
inline float vsum(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline vf vscale2(vf x, vf n) {  // n >= -126: the caller's exponents are clamped
    return x * (vf)_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
}
#else
constexpr int VL = 4;
constexpr int kMaxNV = 2;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
inline vf vload(const float *p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void vstore(float *p, vf x) { std::memcpy(p, &x, sizeof x); }
inline vf vset(float x) { return vf{x, x, x, x}; }
inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vpositive(vf x, vf a, vf b) { return x > vset(0.f) ? a : b; }
inline vf vround(vf x) {  // |x| < 2^22 here; adding and taking away 1.5 * 2^23 rounds to the nearest integer
    const vf magic = vset(12582912.f);
    return (x + magic) - magic;
}
inline vf vsqrt(vf x) {
    return vf{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
}
inline float vsum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline vf vscale2(vf x, vf n) {
    vi e = (__builtin_convertvector(n, vi) + 127) << 23;
    vf s;
    std::memcpy(&s, &e, sizeof s);
    return x * s;
}
#endif

// Whether some lane of x is not y.
inline bool vany_other(vf x, float y) {
#if defined(PA_AVX512)
    return _mm512_cmp_ps_mask(x, _mm512_set1_ps(y), _CMP_NEQ_UQ);
#elif defined(PA_AVX2)
    return _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_set1_ps(y), _CMP_NEQ_UQ));
#else
    bool other = false;
    for (int i = 0; i < VL; ++i) other |= x[i] != y;
    return other;
#endif
}

typedef uint32_t vu __attribute__((vector_size(4 * VL)));

inline vu vcount(uint32_t first) {  // first, first + 1, ...
    vu x{};
    for (int i = 0; i < VL; ++i) x[i] = first + (uint32_t)i;
    return x;
}

// Both halves of x * m, the bits of lanes that are at least a threshold, and x where a bit is set, 0 elsewhere.
#if defined(PA_AVX512)
inline void vmul_wide(vu x, uint32_t m, vu &high, vu &low) {
    const __m512i factor = _mm512_set1_epi64((long long)m);
    const __m512i even = _mm512_mul_epu32((__m512i)x, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factor);
    high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
inline uint32_t vat_least(vu x, uint32_t threshold) {
    return _mm512_cmpge_epu32_mask((__m512i)x, _mm512_set1_epi32((int)threshold));
}
inline vf vkeep(vf x, uint64_t bits) { return _mm512_maskz_mov_ps((__mmask16)bits, x); }
#elif defined(PA_AVX2)
inline void vmul_wide(vu x, uint32_t m, vu &high, vu &low) {
    const __m256i factor = _mm256_set1_epi64x((long long)m);
    const __m256i even = _mm256_mul_epu32((__m256i)x, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
    high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
inline uint32_t vat_least(vu x, uint32_t threshold) {
    const __m256i t = _mm256_set1_epi32((int)threshold);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)x, t), (__m256i)x);
    return (uint32_t)_mm256_movemask_ps((__m256)kept);
}
inline vf vkeep(vf x, uint64_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
    return _mm256_and_ps(x, (__m256)_mm256_cmpeq_epi32(set, lane));
}
#else
inline void vmul_wide(vu x, uint32_t m, vu &high, vu &low) {
    for (int i = 0; i < VL; ++i) {
        const uint64_t wide = (uint64_t)m * x[i];
        high[i] = (uint32_t)(wide >> 32);
        low[i] = (uint32_t)wide;
    }
}
inline uint32_t vat_least(vu x, uint32_t threshold) {
    uint32_t bits = 0;
    for (int i = 0; i < VL; ++i) bits |= (uint32_t)(x[i] >= threshold) << i;
    return bits;
}
inline vf vkeep(vf x, uint64_t bits) {
    for (int i = 0; i < VL; ++i)
        if (!(bits >> i & 1)) x[i] = 0;
    return x;
}
#endif

constexpr int kLanes = 64;  // most queries of one block
constexpr float kLog2e = 1.4426950408889634f;

inline vf vzero() { return vset(0.f); }

// x as it is, rounded: the compiler may not fuse the product that made it into a sum.
inline vf vrounded(vf x) {
#if defined(PA_AVX512)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// What a mask makes of a score: -inf where the mask is -inf, whatever the score, a nan too; else their sum.
inline vf vmasked(vf score, vf mask) { return vpositive(mask + vset(-kMinusInf), score + mask, mask); }

// What 2^x and e^x share: the result's power of two is applied. Without scalef, what would be subnormal or nearly
// becomes 0.
inline vf vfinish(vf fraction, vf n, vf x, float smallest) {
    const vf y = vscale2(fraction, n);
#if defined(PA_AVX512)
    (void)x, (void)smallest;
    return y;
#elif defined(PA_AVX2)
    return _mm256_and_ps(y, _mm256_cmp_ps(x, vset(smallest), _CMP_NLT_UQ));
#else
    return x < vset(smallest) ? vzero() : y;
#endif
}

// Without scalef an exponent must stay in range; with it, far below is enough to reach 0 and take -inf away, whose
// fraction is nan.
#if defined(PA_AVX512)
constexpr float kSmallestLog2 = -200.f, kSmallestLog = -140.f;
#else
constexpr float kSmallestLog2 = -126.f, kSmallestLog = -87.f;
#endif

// 2^x for x <= 127. Minimax polynomial of degree 6 on [-1/2, 1/2], relative error 2e-9 before rounding; exact at 0.
inline vf vexp2(vf x) {
    const vf clamped = vmax(vset(kSmallestLog2), x);
    const vf n = vround(clamped), f = clamped - n;
    vf p = vfma(vset(0x1.41fbbcp-13f), f, vset(0x1.5f3e54p-10f));
    p = vfma(p, f, vset(0x1.3b2d4cp-7f));
    p = vfma(p, f, vset(0x1.c6aee8p-5f));
    p = vfma(p, f, vset(0x1.ebfbdcp-3f));
    p = vfma(p, f, vset(0x1.62e430p-1f));
    p = vfma(p, f, vset(1.f));
    return vfinish(p, n, x, kSmallestLog2);
}

// The same to 2e-7, exact at 0: a polynomial of degree 5 on [0, 1].
inline vf vexp2_short(vf x) {
#if defined(PA_AVX512)
    const vf f = _mm512_reduce_ps(x, 9);  // what is left above the next lower integer; 0 of an infinity
    vf p = vfma(vset(0x1.e974fep-10f), f, vset(0x1.277854p-7f));
    p = vfma(p, f, vset(0x1.c91ce6p-5f));
    p = vfma(p, f, vset(0x1.ebdb56p-3f));
    p = vfma(p, f, vset(0x1.62e4bap-1f));
    return _mm512_scalef_ps(vfma(p, f, vset(1.f)), x);  // by 2^floor(x)
#else
    return vexp2(x);
#endif
}

// e^x for x <= 88: the same polynomial; ln 2 is taken away in two parts, so that a large -x loses nothing.
inline vf vexp(vf x) {
    const vf clamped = vmax(vset(kSmallestLog), x);
    const vf n = vround(clamped * vset(kLog2e));
    vf f = vfma(n, vset(-0x1.62e400p-1f), clamped);
    f = vfma(n, vset(-0x1.7f7d1cp-20f), f);
    vf p = vfma(vset(0x1.6ae73p-10f), f, vset(0x1.126782p-7f));
    p = vfma(p, f, vset(0x1.555822p-5f));
    p = vfma(p, f, vset(0x1.555418p-3f));
    p = vfma(p, f, vset(0x1.fffffcp-2f));
    p = vfma(p, f, vset(0x1p+0f));
    p = vfma(p, f, vset(1.f));
    return vfinish(p, n, x, kSmallestLog);
}

// log x of a normal x > 0, to 2e-7 of it and to 1e-7 near 1; a nan stays one.
inline vf vlog(vf x) {
#if defined(PA_AVX512)
    const vf m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const vf e = _mm512_getexp_ps(x) - _mm512_getexp_ps(m), r = m - vset(1.f);
    vf p = vfma(vset(0x1.c773eap-5f), r, vset(-0x1.f031f4p-4f));
    p = vfma(p, r, vset(0x1.313e34p-3f));
    p = vfma(p, r, vset(-0x1.57d5c2p-3f));
    p = vfma(p, r, vset(0x1.993ce8p-3f));
    p = vfma(p, r, vset(-0x1.ffececp-3f));
    p = vfma(p, r, vset(0x1.5555b2p-2f));
    p = vfma(p * r, r, vset(-0.5f) * r);  // log(1 + r) = r + r p
    return vfma(e, vset(0x1.62e430p-1f), vfma(p, r, r));
#else
    vf y = x;
    for (int i = 0; i < VL; ++i) y[i] = __builtin_logf(x[i]);
    return y;
#endif
}

// -inf in the first n lanes, 0 in the others, to be added to scores.
inline vf vhide_first(int n) {
    alignas(64) static const struct Table {
        float x[2 * VL];
        constexpr Table() : x() {
            for (int i = 0; i < VL; ++i) x[i] = kMinusInf;
        }
    } table;
    return vload(table.x + VL - (n < 0 ? 0 : n > VL ? VL : n));
}

}  // namespace PA_ISA
}  // namespace prefixattn
