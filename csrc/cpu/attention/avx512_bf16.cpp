// x86 with AVX-512 and AVX512_BF16: bfloat16 pairs are multiplied by vdpbf16ps.
#if defined(__AVX512BF16__)
#define PA_ISA avx512_bf16
#define PA_AVX512
#define PA_BF16DOT
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::avx512_bf16_attention{avx512_bf16::fwd, avx512_bf16::bwd};
#else
#include "cpu/kernels.h"

const prefixattn::AttentionKernels prefixattn::avx512_bf16_attention{};
#endif
