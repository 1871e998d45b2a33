// What a CUDA kernel of the op is given beside the record of api/prefix_attn.h, worked out once on the host.
#pragma once
#include "api/semantics.h"
#include "cuda/plan.h"

namespace prefixattn::cuda {

// Dropout of the prefix. The threshold is drawn against; 0 keeps everything.
struct PrefixDrops {
    uint32_t threshold = 0;
    float gain = 1.f;
};

inline PrefixDrops prefix_drops(const AttnParams &p) {
    if (!(p.prefix_dropout_p > 0)) return {};
    const Keep keep(p.prefix_dropout_p);
    return {keep.threshold, keep.scale};
}

// In which units a score is before the softmax, and the factor that makes it a power of two.
struct Scores {
    bool raw;      // a product and no more: scale is in `factor`
    float factor;  // of score - top, for exp2
    float unit;    // of what `top` is in, to natural units
};

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLeastRawScale = 1e-30f;  // below, scale * log2(e) might be flushed to 0, and 0 * inf is nan

inline Scores scores_of(const AttnParams &p) {
    // the largest product is the largest score only if nothing is added and the scale is positive
    const bool raw = !has_float_mask(p) && !(p.prefix_dropout_p > 0) && p.scale > kLeastRawScale;
    return {raw, raw ? p.scale * kLog2e : kLog2e, raw ? p.scale : 1.f};
}

struct FwdLaunch : FwdParams {
    PrefixDrops drops;
    Scores scores;
    int group = 1;  // query heads of a key head
    // of fwd_short
    int heads = 1;  // query heads that a block walks: those of its key head, or one
    int parts = 1;  // blocks that share the queries of those heads
    int units = 1;  // of 16 queries of a head, that a block has at most
};

}  // namespace prefixattn::cuda
