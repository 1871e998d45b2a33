// What a file's worth of kernels offers to launch.cu: one pass for one type and head size, which the build names.
#pragma once
#include "cuda/launch.h"

#define PA_JOIN_(a, b) a##b
#define PA_JOIN(a, b) PA_JOIN_(a, b)

namespace prefixattn::cuda {

template <class Params>
struct Instance {
    Plan (*plan)(const Params &, const Device &);
    const char *(*run)(const Params &, void *workspace, const Device &, void *stream);
};

extern const Instance<FwdParams> fwd_bf16_64, fwd_bf16_128, fwd_fp16_64, fwd_fp16_128;
extern const Instance<BwdParams> bwd_bf16_64, bwd_bf16_128, bwd_fp16_64, bwd_fp16_128;

}  // namespace prefixattn::cuda
