// The kernels over tiles on any CPU, to test them: tiles in plain C++, the portable vectors.
#define PA_ISA amx_plain
#include "cpu/attention/kernels.h"

const prefixattn::AttentionKernels prefixattn::amx_plain_attention{amx_plain::fwd, amx_plain::bwd,
                                                                   amx_plain::multiplies};
