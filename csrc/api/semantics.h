// The rules that every backend shares: which prefix a sample has, which keys a query sees, what a mask hides, which
// elements dropout keeps. Scalars only, so that device code can include it; prefixattn/reference.py and philox.py say
// the same in PyTorch.
#pragma once
#include <cstdint>
#include <type_traits>

#include "api/prefix_attn.h"

#if defined(__CUDACC__)
#define PA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always: a copy of its own, compiled for AVX-512, could be the one that the linker keeps for everybody
#define PA_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace prefixattn {

// Which row of prefix_k and prefix_v, and of the memory, sample b has, and how much of it.
PA_HOST_DEVICE int64_t prefix_row(const AttnParams &p, int64_t b) {
    return p.prefix_ids ? p.prefix_ids[b] : p.T == 1 ? 0 : b;
}
PA_HOST_DEVICE int64_t memory_row(const AttnParams &p, int64_t b) { return p.memories == 1 ? 0 : prefix_row(p, b); }
PA_HOST_DEVICE int64_t prefix_length(const AttnParams &p, int64_t b) {
    return p.prefix_lengths ? p.prefix_lengths[b] : p.P;
}

// Under causality query l sees own key s iff s <= l + causal_offset, and all of the prefix either way.
PA_HOST_DEVICE int64_t causal_offset(const AttnParams &p) { return p.S - p.L; }
// Own keys from here on are hidden from query l; may lie outside 0 .. S.
PA_HOST_DEVICE int64_t causal_end(const AttnParams &p, int64_t l) { return l + causal_offset(p) + 1; }

PA_HOST_DEVICE int64_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }
PA_HOST_DEVICE int64_t mask_element(const AttnParams &p) {
    return p.mask_kind == MaskKind::kBool ? 1 : p.mask_kind == MaskKind::kFloat32 ? 4 : element_size(p.dtype);
}
// The same for all queries.
PA_HOST_DEVICE bool is_key_padding(const AttnParams &p) {
    return p.mask_kind != MaskKind::kNone && p.mask.stride2 == 0;
}
// Which is added to scaled scores, in its own units.
PA_HOST_DEVICE bool has_float_mask(const AttnParams &p) {
    return p.mask_kind == MaskKind::kSameAsQ || p.mask_kind == MaskKind::kFloat32;
}

constexpr float kHidden = -1e37f;  // a mask value from here down hides its key as -inf does

// What a mask's element adds to a score; bool: True attends.
PA_HOST_DEVICE float mask_term(float value) { return value <= kHidden ? kMinusInf : value; }
PA_HOST_DEVICE float mask_term(bool attends) { return attends ? 0.f : kMinusInf; }

// What lse is rounded by, all weights of its query err by, in the backward: of floats it is kept to twice their digits.
template <class Storage>
using Lse = std::conditional_t<sizeof(Storage) == 4, double, float>;

// Dropout. Bits are Philox4x32-10's (Salmon et al., 2011) and the counter is the position, so that every backend and
// both passes drop the same elements, whichever tile draws them.
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The last word of a counter keeps the draws apart.
constexpr int kDropsAttention = 0, kDropsPrefixK = 1, kDropsPrefixV = 2;

struct PhiloxWords {
    uint32_t x[4];
};

// Element (row, column) is word `column % 4` of this counter. Of attention a row is a query, a column a virtual key
// (prefix rows, then own keys) and `head` is b * H + h; of a prefix a row is one of its own, a column an element of the
// head and `head` is b * Hkv + g.
PA_HOST_DEVICE PhiloxWords dropout_counter(int64_t row, int64_t column, int64_t head, int draw) {
    return {{(uint32_t)(column >> 2), (uint32_t)row, (uint32_t)head, (uint32_t)draw}};
}
PA_HOST_DEVICE int dropout_word(int64_t column) { return (int)(column & 3); }
PA_HOST_DEVICE uint64_t dropout_seed(const AttnParams &p) { return p.seed ? (uint64_t)*p.seed : 0; }

PA_HOST_DEVICE PhiloxWords philox4x32(uint64_t seed, PhiloxWords counter) {
    uint32_t *x = counter.x, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxStep0, k1 += kPhiloxStep1) {
        const uint64_t a = (uint64_t)kPhiloxFactor0 * x[0], b = (uint64_t)kPhiloxFactor1 * x[2];
        x[0] = (uint32_t)(b >> 32) ^ x[1] ^ k0;
        x[2] = (uint32_t)(a >> 32) ^ x[3] ^ k1;
        x[1] = (uint32_t)b;
        x[3] = (uint32_t)a;
    }
    return counter;
}

struct Keep {            // what is kept, and how it is scaled
    uint32_t threshold;  // keep iff word >= threshold = floor(p * 2^32)
    float scale;         // 1 / (1 - p)
    PA_HOST_DEVICE explicit Keep(double p) : threshold((uint32_t)(p * 4294967296.0)), scale((float)(1.0 / (1.0 - p))) {}
};

PA_HOST_DEVICE float prefix_gain(double p) { return p > 0 ? Keep(p).scale : 1.f; }

}  // namespace prefixattn
