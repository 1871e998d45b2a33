// Philox4x32-10 (Salmon et al., 2011), counter = position, so that every backend and both passes drop the same
// elements.
#pragma once
#include "vec.h"

namespace prefixattn {
namespace PA_ISA {

struct Keep {            // what is kept, and how it is scaled
    uint32_t threshold;  // keep iff word >= threshold = floor(p * 2^32)
    float scale;         // 1 / (1 - p)
    explicit Keep(double p) : threshold((uint32_t)(p * 4294967296.0)), scale((float)(1.0 / (1.0 - p))) {}
};

// words[w][i] of the counters (c0, c1 + i, c2, c3), i < n.
inline void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, int n,
                   uint32_t words[4][kLanes]) {
    for (int i = 0; i < n; ++i) {
        uint32_t x0 = c0, x1 = c1 + (uint32_t)i, x2 = c2, x3 = c3;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t a = 0xD2511F53ull * x0, b = 0xCD9E8D57ull * x2;
            x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
            x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
            x1 = (uint32_t)b;
            x3 = (uint32_t)a;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[0][i] = x0;
        words[1][i] = x1;
        words[2][i] = x2;
        words[3][i] = x3;
    }
}

// Row by row multipliers (0 or the scale) for the attention weights of keys j, j + 1, ... and queries l0 .. l0 + n.
class AttentionDropout {
  public:
    AttentionDropout(uint64_t seed, double p, int64_t head, int64_t l0, int n)
        : keep_(p), seed_(seed), head_((uint32_t)head), l0_((uint32_t)l0), n_(n) {}

    void row(int64_t j, float *multiplier) {  // [n]
        if ((j >> 2) != group_) {
            group_ = j >> 2;
            philox(seed_, (uint32_t)group_, l0_, head_, 0, n_, words_);
        }
        const uint32_t *w = words_[j & 3];
        for (int i = 0; i < n_; ++i) multiplier[i] = w[i] >= keep_.threshold ? keep_.scale : 0.f;
    }

  private:
    Keep keep_;
    uint64_t seed_;
    uint32_t head_, l0_;
    int n_;
    int64_t group_ = -1;
    uint32_t words_[4][kLanes];
};

inline float prefix_gain(double p) { return p > 0 ? Keep(p).scale : 1.f; }

// Multipliers for one row p of a sample's prefix keys (stream 1) or values (stream 2).
inline void prefix_dropout_row(uint64_t seed, const Keep &keep, int64_t head, int64_t p, int stream, int D,
                               float *multiplier) {
    uint32_t words[4][kLanes];
    for (int d = 0; d < D; d += 4) {
        philox(seed, (uint32_t)(d / 4), (uint32_t)p, (uint32_t)head, (uint32_t)stream, 1, words);
        for (int w = 0; w < 4; ++w) multiplier[d + w] = words[w][0] >= keep.threshold ? keep.scale : 0.f;
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
