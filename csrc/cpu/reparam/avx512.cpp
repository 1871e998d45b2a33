// x86 with AVX-512 F, BW, DQ and VL.
#if defined(__AVX512F__)
#define PA_ISA avx512
#define PA_AVX512
#include "cpu/reparam/kernels.h"

const prefixattn::ReparamKernels prefixattn::avx512_reparam{avx512::reparam_fwd, avx512::reparam_fused_step};
#else
#include "cpu/kernels.h"

const prefixattn::ReparamKernels prefixattn::avx512_reparam{};
#endif
