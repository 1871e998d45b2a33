// Any CPU.
#define PA_ISA portable
#include "reparam_fwd.h"
#include "reparam_sweep.h"

const prefixattn::ReparamKernels &prefixattn::portable_reparam_kernels() {
    static const ReparamKernels kernels{"portable", portable::reparam_fwd, portable::reparam_sweep};
    return kernels;
}
