// x86 with AVX2, FMA and F16C.
#if defined(__AVX2__)
#define PA_ISA avx2
#define PA_AVX2
#include "prefix_attn_kernels.h"
#else
#include "../prefix_attn.h"
#endif

const prefixattn::Kernels &prefixattn::avx2_kernels() {
#if defined(__AVX2__)
    static const Kernels kernels{"avx2", avx2::fwd, avx2::bwd};
#else
    static const Kernels kernels{"avx2", nullptr, nullptr};
#endif
    return kernels;
}
