// How a moment is kept: a kind of number, or the codes of 8 bits that prefixattn/reparam/moments8.py defines. A block
// of a row comes as floats and goes back when all of it is new, since the scale of its codes is its new maximum.
#pragma once
#include "cpu/reparam/tiles.h"

namespace prefixattn {
namespace PA_ISA {

typedef int32_t vs __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));

// GCC makes conversions of bytes one at a time.
inline vs load_codes(const uint8_t *p) {
#if defined(PA_AVX512)
    return (vs)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(PA_AVX2)
    return (vs)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return vs{p[0], p[1], p[2], p[3]};
#endif
}
inline vs load_codes(const uint8_t *p, int n) {
    uint8_t copy[VL] = {};
    std::memcpy(copy, p, n);
    return load_codes(copy);
}
inline void store_codes(uint8_t *p, vs x) {
#if defined(PA_AVX512)
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(PA_AVX2)
    const __m256i pick = _mm256_set1_epi32(0x0c080400), y = _mm256_shuffle_epi8((__m256i)x, pick);
    _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
#else
    for (int i = 0; i < VL; ++i) p[i] = (uint8_t)x[i];
#endif
}
inline void store_codes(uint8_t *p, vs x, int n) {
    if (n == VL) return store_codes(p, x);
    uint8_t copy[VL];
    store_codes(copy, x);
    std::memcpy(p, copy, n);
}

inline vf vmin(vf a, vf b) { return a < b ? a : b; }  // the second if either is nan
inline float vmax_of(vf x) {
    alignas(64) float y[VL];
    vstore(y, x);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) y[i] = y[i] > y[i + half] ? y[i] : y[i + half];
    return y[0];
}

// 32 fair bits for each number of a row of the matrix that starts at number `first`.
class Coin {
  public:
    Coin(uint32_t salt, int64_t first) : first_((uint32_t)first), salt_(salt ^ (uint32_t)((uint64_t)first >> 32)) {}
    vu at(int64_t m) const {
        vu x = (lanes() + (first_ + (uint32_t)m)) ^ salt_;
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        return x ^ (x >> 16);
    }
    static vf fraction(vu bits) { return __builtin_convertvector((vs)(bits >> 8), vf) * vset(0x1p-24f); }

  private:
    static vu lanes() {
        vu x;
        for (int i = 0; i < VL; ++i) x[i] = i;
        return x;
    }
    uint32_t first_, salt_;
};

// exp_avg: value = scale * sign(k) (k / 127)^2, code = k + 127.
struct SignedCode {
    static constexpr float kMost = 127;
    static vf decode(vs code, vf unit) {  // unit: scale / kMost^2
        const vf k = __builtin_convertvector(code - 127, vf);
        return k * magnitude(k) * unit;
    }
    static vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }
    static vs encode(vf x, vf inverse, vu coin) {  // inverse: kMost^2 / scale
        const vf square = magnitude(x) * inverse;
        const vs low = __builtin_convertvector(vmin(vsqrt(square), vset(126.99999f)), vs);
        const vf root = __builtin_convertvector(low, vf);
        const vs up = (vs)(square - root * root > Coin::fraction(coin) * (root + root + vset(1.f)));  // -1 or 0
        const vs sign = (vs)x >> 31;
        return (((low - up) ^ sign) - sign) + 127;
    }
};

// exp_avg_sq, given and encoded as its square root: value = (scale (code / 255)^2)^2.
struct SquareCode {
    static constexpr float kMost = 255;
    static vf decode(vs code, vf unit) {
        const vf k = __builtin_convertvector(code, vf), x = k * k * unit;
        return x * x;
    }
    static vf magnitude(vf x) { return x; }
    static vs encode(vf x, vf inverse, vu coin) {
        const vf square = x * inverse;
        const vs low = __builtin_convertvector(vmin(vsqrt(square), vset(254.99998f)), vs);
        const vf root = __builtin_convertvector(low, vf), below = root * root, gap = root + root + vset(1.f);
        const vf over = (square - below) * (square + below);  // fourth powers: of the value, of the code below, above
        const vs up = (vs)(over > Coin::fraction((coin << 16) | (coin >> 16)) * (gap * (below + below + gap)));
        const vs code = low - up, least = (vs)x > 1 ? vs{} + 1 : (vs)x;  // 1 if x > 0: what is positive stays so
        return code > least ? code : least;
    }
};

// One moment of the matrix, [rows, M].
class Moment {
  public:
    explicit Moment(const KeptMoment &k, int64_t M) : kept_(k), M_(M) {}
    bool eight() const { return kept_.format == MomentFormat::kEightBit; }

    // n numbers of a row from m on, the start of a block; zeros up to a whole vector.
    template <class Code>
    void read(int64_t row, int64_t m, int n, float *dst) const {
        const int64_t at = row * M_ + m;
        if (eight()) {
            const vf unit = vset(scale(row, m) / (Code::kMost * Code::kMost));
            const uint8_t *codes = (const uint8_t *)kept_.data + at;
            int i = 0;
            for (; i + VL <= n; i += VL) vstore(dst + i, Code::decode(load_codes(codes + i), unit));
            if (i == n) return;
            alignas(64) float tail[VL];
            vstore(tail, Code::decode(load_codes(codes + i, n - i), unit));
            vstore(dst + i, load(tail, n - i));
        } else if (kept_.format == MomentFormat::kFloat32) {
            for (int i = 0; i < n; i += VL)
                vstore(dst + i, load((const float *)kept_.data + at + i, at_most(n - i, VL)));
        } else {
            for (int i = 0; i < n; i += VL)
                vstore(dst + i, load((const bf16 *)kept_.data + at + i, at_most(n - i, VL)));
        }
    }

    // Not of 8 bits.
    void write(int64_t row, int64_t m, int n, const float *src) const {
        const int64_t at = row * M_ + m;
        const bool wide = kept_.format == MomentFormat::kFloat32;
        for (int i = 0; i < n; i += VL)
            wide ? store((float *)kept_.data + at + i, vload(src + i), at_most(n - i, VL))
                 : store((bf16 *)kept_.data + at + i, vload(src + i), at_most(n - i, VL));
    }

    // Of 8 bits: writes the scale; returns what encode() wants.
    template <class Code>
    vf write_scale(int64_t row, int64_t m, int n, const float *src) const {
        vf most = vzero();
        for (int i = 0; i < n; i += VL) most = vmax(most, Code::magnitude(vload(src + i)));
        const float found = vmax_of(most), used = found < 0x1p-112f ? 0.f : found;
        scale(row, m) = used;
        return vset(used > 0 ? Code::kMost * Code::kMost / used : 0.f);
    }
    uint8_t *codes(int64_t row, int64_t m) const { return (uint8_t *)kept_.data + row * M_ + m; }

    void ask(int64_t row, int64_t m, int n) const {  // for what read() will want
        const int size = kept_.format == MomentFormat::kFloat32 ? 4 : eight() ? 1 : 2;
        const char *p = (const char *)kept_.data + (row * M_ + m) * size;
        for (const char *end = p + n * size; p < end; p += 64) prefetch(p);
    }

  private:
    float &scale(int64_t row, int64_t m) const {
        return kept_.scale[row * ((M_ + kMomentBlock - 1) / kMomentBlock) + m / kMomentBlock];
    }
    const KeptMoment kept_;
    const int64_t M_;
};

}  // namespace PA_ISA
}  // namespace prefixattn
