// The forward pass as its launch: which kernel, with what grid.
#pragma once
#include "cuda/attention/fwd_long.h"
#include "cuda/attention/fwd_short.h"
#include "cuda/steps.h"

namespace prefixattn::cuda {

constexpr int64_t kShortKeys = 256, kGridY = 65535;

inline int64_t fwd_workspace(const FwdParams &, const Device &) { return 0; }

inline FwdLaunch fwd_launch(const FwdParams &p) {
    FwdLaunch x;
    (FwdParams &)x = p;
    if (p.L == 1) x.causal = false;  // aligned bottom-right, a single query sees every key
    x.drops = prefix_drops(p);
    x.scores = scores_of(p);
    x.group = (int)(p.H / p.Hkv);
    return x;
}

// A block of fwd_short has a key head with all of its queries, unless that leaves processors without work.
inline void share_queries(FwdLaunch &x, const Device &device) {
    constexpr int kWarps = 4, kBlocks = 2;  // blocks for each processor
    const bool padded_by_head = x.mask_kind != MaskKind::kNone && x.mask.stride1 != 0;
    x.heads = padded_by_head ? 1 : x.group;
    const int64_t units = x.heads * ((x.L + kStep - 1) / kStep), blocks = x.B * (x.H / x.heads);
    const int64_t wanted = (kBlocks * device.processors + blocks - 1) / blocks;
    const int64_t rounds = (units + kWarps - 1) / kWarps, parts = wanted < 1 ? 1 : wanted < rounds ? wanted : rounds;
    x.units = (int)((rounds + parts - 1) / parts * kWarps);
    x.parts = (int)((units + x.units - 1) / x.units);
}

// The narrowest kernel that holds a call's keys and that a device has shared memory for: 0, or its columns.
template <class E, int D, int kKeys, bool kPlain>
bool holds(const FwdLaunch &x, const Device &device) {
    const int64_t keys = x.S + x.P;
    const bool plain = x.scores.raw && x.mask_kind == MaskKind::kNone && !x.causal && !x.prefix_lengths;
    const bool fits = kPlain ? plain && keys > kKeys - kStep && keys <= kKeys : keys <= kKeys;
    return fits && FwdShort<E, D, kKeys, kPlain>::shared_bytes(x) <= device.shared_bytes;
}

template <class E, int D, int kKeys, bool kPlain, class On>
const char *on_short(const FwdLaunch &x, On &&on) {
    using K = FwdShort<E, D, kKeys, kPlain>;
    const hw::Grid grid{(int)(x.H / x.heads), (int)x.B, x.parts};
    return on(Step<K>{grid, K::shared_bytes(x), x});
}

template <class E, int D, class On>
const char *fwd_launches(const FwdParams &p, void *, const Device &device, On &&on) {
    FwdLaunch x = fwd_launch(p);
    if (p.S + p.P <= kShortKeys && p.B <= kGridY) {
        share_queries(x, device);
        // 193 to 208 keys are those of a ViT with a prefix, 241 to 256 with one of 50
        if (holds<E, D, 208, true>(x, device)) return on_short<E, D, 208, true>(x, on);
        if (holds<E, D, 256, true>(x, device)) return on_short<E, D, 256, true>(x, on);
        if (holds<E, D, 64, false>(x, device)) return on_short<E, D, 64, false>(x, on);
        if (holds<E, D, 128, false>(x, device)) return on_short<E, D, 128, false>(x, on);
        // for 256 keys of 128 elements with conditions there are too few registers
        constexpr int kMost = D == 64 ? 256 : 208;
        if (holds<E, D, kMost, false>(x, device)) return on_short<E, D, kMost, false>(x, on);
    }
    using K = FwdLong<E, D, 2>;
    x.parts = (int)K::blocks(x);
    const int64_t blocks = x.parts * x.B * x.H;
    if (blocks >= (int64_t)1 << 31) return "more than 2^31 blocks of queries";
    return on(Step<K>{hw::Grid{(int)blocks, 1, 1}, K::shared_bytes(x), x});
}

}  // namespace prefixattn::cuda
