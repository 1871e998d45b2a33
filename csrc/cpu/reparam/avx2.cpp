// x86 with AVX2, FMA and F16C.
#if defined(__AVX2__)
#define PA_ISA avx2
#define PA_AVX2
#include "cpu/reparam/kernels.h"

const prefixattn::ReparamKernels prefixattn::avx2_reparam{avx2::reparam_fwd, avx2::reparam_fused_step};
#else
#include "cpu/kernels.h"

const prefixattn::ReparamKernels prefixattn::avx2_reparam{};
#endif
