// Any CPU.
#define PA_ISA portable
#include "cpu/reparam/kernels.h"

const prefixattn::ReparamKernels prefixattn::portable_reparam{portable::reparam_fwd, portable::reparam_fused_step};
