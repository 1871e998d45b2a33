// The same with the vector code that they have beside AMX.
#if defined(PA_PLAIN_TILES)
#define PA_ISA amx_plain_avx512
#define PA_AVX512
#define PA_BF16DOT
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::amx_plain_avx512_attention{amx_plain_avx512::fwd, amx_plain_avx512::bwd,
                                                                          amx_plain_avx512::multiplies};
#else
#include "cpu/kernels.h"

const prefixattn::AttentionKernels prefixattn::amx_plain_avx512_attention{};
#endif
