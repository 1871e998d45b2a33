// x86 with AVX2, FMA and F16C.
#if defined(__AVX2__)
#define PA_ISA avx2
#define PA_AVX2
#include "reparam_fwd.h"
#include "reparam_sweep.h"
#else
#include "../reparam.h"
#endif

const prefixattn::ReparamKernels &prefixattn::avx2_reparam_kernels() {
#if defined(__AVX2__)
    static const ReparamKernels kernels{"avx2", avx2::reparam_fwd, avx2::reparam_sweep};
#else
    static const ReparamKernels kernels{"avx2", nullptr, nullptr};
#endif
    return kernels;
}
