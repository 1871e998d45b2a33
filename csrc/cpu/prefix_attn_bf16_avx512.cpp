// x86 with AVX-512 and AVX512_BF16: bfloat16 pairs are multiplied by vdpbf16ps.
#if defined(__AVX512BF16__)
#define PA_ISA avx512_bf16
#define PA_AVX512
#define PA_BF16DOT
#include "prefix_attn_kernels.h"
#else
#include "../prefix_attn.h"
#endif

const prefixattn::Kernels &prefixattn::avx512_bf16_kernels() {
#if defined(__AVX512BF16__)
    static const Kernels kernels{"avx512_bf16", avx512_bf16::fwd, avx512_bf16::bwd};
#else
    static const Kernels kernels{"avx512_bf16", nullptr, nullptr};
#endif
    return kernels;
}
