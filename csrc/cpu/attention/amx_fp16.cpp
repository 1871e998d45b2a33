// x86 with AMX for float16 too, whose pairs are multiplied by tdpfp16ps.
#if defined(PA_AMX_FP16)
#define PA_ISA amx_fp16
#define PA_AVX512
#define PA_BF16DOT
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::amx_fp16_attention{amx_fp16::fwd, amx_fp16::bwd, amx_fp16::multiplies};
#else
#include "cpu/kernels.h"

const prefixattn::AttentionKernels prefixattn::amx_fp16_attention{};
#endif
