// What dropout keeps, by vectors; api/semantics.h says which counter is whose.
#pragma once
#include "api/semantics.h"
#include "cpu/vec.h"

namespace prefixattn {
namespace PA_ISA {

// The four words of a vector of counters.
inline void philox(uint64_t seed, vu x0, vu x1, uint32_t c2, uint32_t c3, vu words[4]) {
    vu x2 = vu{} + c2, x3 = vu{} + c3;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
        vu a_high, a_low, b_high, b_low;
        vmul_wide(x0, kPhiloxFactor0, a_high, a_low);
        vmul_wide(x2, kPhiloxFactor1, b_high, b_low);
        x0 = b_high ^ x1 ^ k0;
        x2 = a_high ^ x3 ^ k1;
        x1 = b_low;
        x3 = a_low;
        k0 += kPhiloxStep0;
        k1 += kPhiloxStep1;
    }
    words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

// Row by row multipliers (0 or the scale) for the attention weights of keys j, j + 1, ... and queries l0 .. l0 + n,
// whole vectors.
class AttentionDropout {
  public:
    AttentionDropout(uint64_t seed, double p, int64_t head, int64_t l0, int n)
        : keep_(p), seed_(seed), head_(head), l0_(l0), n_(n) {}

    void row(int64_t j, float *multiplier) {  // [n]
        if ((j >> 2) != group_) {
            group_ = j >> 2;
            for (int i = 0; i < n_; i += VL) {
                const PhiloxWords c = dropout_counter(l0_ + i, j, head_, kDropsAttention);
                vu words[4];
                philox(seed_, vu{} + c.x[0], vcount(c.x[1]), c.x[2], c.x[3], words);
                for (int w = 0; w < 4; ++w) std::memcpy(words_[w] + i, &words[w], sizeof(vu));
            }
        }
        const uint32_t *w = words_[dropout_word(j)];
        for (int i = 0; i < n_; ++i) multiplier[i] = w[i] >= keep_.threshold ? keep_.scale : 0.f;
    }

  private:
    Keep keep_;
    uint64_t seed_;
    int64_t head_, l0_;
    int n_;
    int64_t group_ = -1;
    uint32_t words_[4][kLanes];
};

// Bit 4 i of the result is bit i.
inline uint64_t spread(uint64_t bits) {
    bits = (bits | bits << 24) & 0x000000ff000000ffull;
    bits = (bits | bits << 12) & 0x000f000f000f000full;
    bits = (bits | bits << 6) & 0x0303030303030303ull;
    return (bits | bits << 3) & 0x1111111111111111ull;
}

// Which elements prefix dropout keeps of some of a sample's prefix rows, one head's, a bit each. Both passes read rows
// more often than they are drawn.
class KeptPrefix {
  public:
    static int64_t words(int64_t D) { return (D + 63) / 64; }

    // Room for `rows` of them.
    template <class Arena>
    void allocate(Arena &arena, int64_t rows, int64_t D) {
        D_ = (int)D, capacity_ = rows;
        bits_ = arena.template take<uint64_t>(2 * rows * words(D));
    }

    // Makes sure of rows p0 .. p0 + n, n <= capacity; reads on up to `end` where there is room.
    void draw(uint64_t seed, double p, int64_t head, int64_t p0, int64_t n, int64_t end) {
        if (head == head_ && p0 >= first_ && p0 + n <= end_) return;
        head_ = head, first_ = p0, end_ = p0 + capacity_ < end ? p0 + capacity_ : end;
        const uint32_t threshold = Keep(p).threshold;
        for (int draw = kDropsPrefixK; draw <= kDropsPrefixV; ++draw)
            for (int64_t row = first_; row < end_; ++row) {
                uint64_t *bits = at(row, draw);
                std::memset(bits, 0, sizeof(uint64_t) * words(D_));
                for (int d = 0; d < D_; d += 4 * VL) {
                    const PhiloxWords c = dropout_counter(row, d, head, draw);
                    vu x[4];
                    philox(seed, vcount(c.x[0]), vu{} + c.x[1], c.x[2], c.x[3], x);
                    for (int w = 0; w < 4; ++w) bits[d / 64] |= spread(vat_least(x[w], threshold)) << (w + d % 64);
                }
            }
    }

    // draw: kDropsPrefixK or kDropsPrefixV. Bit d % 64 of word d / 64 is element d.
    const uint64_t *row(int64_t row, int draw) const { return at(row, draw); }

  private:
    uint64_t *at(int64_t row, int draw) const {
        return bits_ + ((draw - kDropsPrefixK) * capacity_ + row - first_) * words(D_);
    }

    int D_ = 0;
    int64_t capacity_ = 0, head_ = -1, first_ = 0, end_ = 0;
    uint64_t *bits_ = nullptr;
};

// dst[d] = src[d] where a bit is set, 0 elsewhere.
inline void keep_elements(const float *src, const uint64_t *bits, int D, float *dst) {
    int d = 0;
    for (; d + VL <= D; d += VL) vstore(dst + d, vkeep(vload(src + d), bits[d / 64] >> d % 64));
    for (; d < D; ++d) dst[d] = bits[d / 64] >> d % 64 & 1 ? src[d] : 0.f;
}
inline void keep_elements(const uint16_t *src, const uint64_t *bits, int D, uint16_t *dst) {
#if defined(PA_AVX512)
    for (int d = 0; d < D; d += 32) {
        const __mmask32 there = D - d < 32 ? (__mmask32)((1u << (D - d)) - 1) : ~(__mmask32)0;
        const __mmask32 kept = (__mmask32)(bits[d / 64] >> d % 64);
        _mm512_mask_storeu_epi16(dst + d, there, _mm512_maskz_loadu_epi16(kept & there, src + d));
    }
#else
    for (int d = 0; d < D; ++d) dst[d] = bits[d / 64] >> d % 64 & 1 ? src[d] : 0;
#endif
}

// dst[d] += src[d] * scale where a bit is set.
inline void add_kept(const float *src, float scale, const uint64_t *bits, int D, float *dst) {
    int d = 0;
    for (; d + VL <= D; d += VL)
        vstore(dst + d, vload(dst + d) + vkeep(vload(src + d) * vset(scale), bits[d / 64] >> d % 64));
    for (; d < D; ++d)
        if (bits[d / 64] >> d % 64 & 1) dst[d] += src[d] * scale;
}

}  // namespace PA_ISA
}  // namespace prefixattn
