// x86 with AVX-512 F, BW, DQ and VL.
#if defined(__AVX512F__)
#define PA_ISA avx512
#define PA_AVX512
#include "reparam_fwd.h"
#include "reparam_sweep.h"
#else
#include "../reparam.h"
#endif

const prefixattn::ReparamKernels &prefixattn::avx512_reparam_kernels() {
#if defined(__AVX512F__)
    static const ReparamKernels kernels{"avx512", avx512::reparam_fwd, avx512::reparam_sweep};
#else
    static const ReparamKernels kernels{"avx512", nullptr, nullptr};
#endif
    return kernels;
}
