// x86 with AVX2, FMA and F16C.
#if defined(__AVX2__)
#define PA_ISA avx2
#define PA_AVX2
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::avx2_attention{avx2::fwd, avx2::bwd};
#else
#include "cpu/kernels.h"

const prefixattn::AttentionKernels prefixattn::avx2_attention{};
#endif
