// x86 with AVX-512 F, BW, DQ and VL; bfloat16 is widened to fp32.
#if defined(__AVX512F__)
#define PA_ISA avx512
#define PA_AVX512
#include "prefix_attn_kernels.h"
#else
#include "../prefix_attn.h"
#endif

const prefixattn::Kernels &prefixattn::avx512_kernels() {
#if defined(__AVX512F__)
    static const Kernels kernels{"avx512", avx512::fwd, avx512::bwd};
#else
    static const Kernels kernels{"avx512", nullptr, nullptr};
#endif
    return kernels;
}
