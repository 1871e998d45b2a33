// What each file <op>/<isa>.cpp exports. Those files include no templates of the standard library: see vec.h.
#pragma once
#include "api/reparam.h"
#include "cpu/calls.h"

namespace prefixattn {

// Null members were not compiled. Each runs on at most so many threads.
struct AttentionKernels {
    void (*fwd)(const CpuFwdParams &, int threads);
    void (*bwd)(const CpuBwdParams &, int threads);
    bool (*multiplies)() = nullptr;  // of sets with tiles: whether a trial of their products comes out right
};
struct ReparamKernels {
    void (*fwd)(const ReparamFwdParams &, int threads);
    void (*fused_step)(const FusedStepParams &, int threads);
};

extern const AttentionKernels portable_attention, avx2_attention, avx512_attention, avx512_bf16_attention,
    amx_bf16_attention, amx_fp16_attention, amx_plain_attention, amx_plain_avx512_attention;
extern const ReparamKernels portable_reparam, avx2_reparam, avx512_reparam;

}  // namespace prefixattn
