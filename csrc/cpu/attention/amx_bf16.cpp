// x86 with AMX: bfloat16 pairs are multiplied by tdpbf16ps.
#if defined(PA_AMX)
#define PA_ISA amx_bf16
#define PA_AVX512
#define PA_BF16DOT
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::amx_bf16_attention{amx_bf16::fwd, amx_bf16::bwd, amx_bf16::multiplies};
#else
#include "cpu/kernels.h"

const prefixattn::AttentionKernels prefixattn::amx_bf16_attention{};
#endif
