// Blocks and panels of the reparameterization: outputs (rows of the matrix) in blocks of 64, lanes in panels of 64.
#pragma once
#include "api/reparam.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace prefixattn {
namespace PA_ISA {

constexpr int kBlock = 64;       // rows of the matrix that the forward works on together
constexpr int kStepBlock = 128;  // and the fused step: dh comes and goes once for as many
constexpr int kPanel = 64;       // lanes of a panel; the last one is narrower
// Most rows of h for which the matrix is read along its rows, not in tiles: by the forward, by the fused step.
constexpr int kFewRows = 16, kFewStepRows = VL == 16 ? 32 : VL == 8 ? 24 : 16;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }
inline int at_most(int64_t n, int most) { return n < most ? (int)n : most; }

// Between rows of h, and of dh. One vector more than M needs: at M = 512 all rows would share two sets of L1 otherwise.
inline int64_t row_floats(int64_t M) { return round_up(M, VL) + VL; }

// n lanes in panels: lane l of row r lies at panel(l) * rows + r * width + l % kPanel, so a panel is contiguous.
struct Panels {
    int64_t lanes, rows;
    int64_t count() const { return (lanes + kPanel - 1) / kPanel; }
    int64_t floats() const { return round_up(lanes, VL) * rows; }
    int64_t first(int64_t i) const { return i * kPanel; }
    int used(int64_t i) const { return at_most(lanes - i * kPanel, kPanel); }
    int width(int64_t i) const { return (int)round_up(used(i), VL); }
    int64_t offset(int64_t i) const { return i * kPanel * rows; }
};

// Calls f(row, step, count, offset) for each run of outputs that are neighbours in kv: rows row, row + step, ...
// of a block that starts at output `o` and has n; `offset` is where the run lies for prefix row 0, in elements; the
// next prefix row lies head_dim further.
template <class F>
inline void each_run(const KvForm &form, int64_t g, int64_t P, int64_t o, int n, F f) {
    const int64_t D = form.head_dim, heads = form.kv_heads, blocks = form.layers * 2 * heads;
    const int step = form.interleaved ? 2 : 1;  // key and value in turn; o and n are even then
    for (int row = 0; row < n;) {
        const int64_t number = (o + row) / step, head = number / D, d = number % D;
        const int count = at_most((n - row) / step, (int)(D - d));
        for (int side = 0; side < step; ++side) {
            const int64_t block = form.interleaved ? (head / heads * 2 + side) * heads + head % heads : head;
            f(row + side, step, count, (g * blocks + block) * P * D + d);
        }
        row += count * step;
    }
}

// Vectors of another storage type; with n < VL only the first n numbers are touched.
inline vf load(const float *p) { return vload(p); }
inline void store(float *p, vf x) { vstore(p, x); }
#if defined(PA_AVX512)
inline vf load(const bf16 *p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
#elif defined(PA_AVX2)
inline vf load(const bf16 *p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
#else
inline vf load(const bf16 *p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
#endif
inline void store(bf16 *p, vf x) {
#if defined(PA_AVX512)  // as from_float, to nearest even
    const __m512i bits = (__m512i)x, high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i y = _mm512_mask_or_epi32(_mm512_srli_epi32(up, 16), nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(y));
#elif defined(PA_AVX2)
    const __m256i bits = (__m256i)x, high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = (__m256i)_mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i y = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
#else
    for (int i = 0; i < VL; ++i) from_float(x[i], p + i);
#endif
}
template <class T>
inline vf load(const T *p, int n) {
    if (n == VL) return load(p);
    T copy[VL] = {};
    std::memcpy(copy, p, n * sizeof(T));
    return load(copy);
}
template <class T>
inline void store(T *p, vf x, int n) {
    if (n == VL) return store(p, x);
    T copy[VL];
    store(copy, x);
    std::memcpy(p, copy, n * sizeof(T));
}

// Copies rows of `used` floats, with zeros up to `width`, a multiple of VL.
inline void copy_rows(const float *src, int64_t stride, int64_t rows, int64_t used, float *dst, int64_t ld,
                      int64_t width) {
    for (int64_t r = 0; r < rows; ++r, src += stride, dst += ld) {
        int64_t i = 0;
        for (; i + VL <= used; i += VL) vstore(dst + i, vload(src + i));
        for (; i < width; i += VL) vstore(dst + i, i < used ? load(src + i, (int)(used - i)) : vzero());
    }
}

inline void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

template <class T>
inline void store_row(const float *src, T *dst, int n) {
    const int whole = n / 8 * 8;
    narrow(src, dst, whole);
    for (int i = whole; i < n; ++i) from_float(src[i], dst + i);
}
template <class T>
inline void load_row(const T *src, float *dst, int n) {
    const int whole = n / 8 * 8;
    widen(src, dst, whole);
    for (int i = whole; i < n; ++i) dst[i] = to_float(src[i]);
}

}  // namespace PA_ISA
}  // namespace prefixattn
