// x86 with AVX-512 F, BW, DQ and VL; bfloat16 is widened to fp32.
#if defined(__AVX512F__)
#define PA_ISA avx512
#define PA_AVX512
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::avx512_attention{avx512::fwd, avx512::bwd};
#else
#include "cpu/kernels.h"

const prefixattn::AttentionKernels prefixattn::avx512_attention{};
#endif
