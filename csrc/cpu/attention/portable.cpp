// Any CPU: vectors of four floats in the compiler's own vector types.
#define PA_ISA portable
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::portable_attention{portable::fwd, portable::bwd};
