// Any CPU: vectors of four floats in the compiler's own vector types.
#define PA_ISA portable
#include "prefix_attn_kernels.h"

const prefixattn::Kernels &prefixattn::portable_kernels() {
    static const Kernels kernels{"portable", portable::fwd, portable::bwd};
    return kernels;
}
