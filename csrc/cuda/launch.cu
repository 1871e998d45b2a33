// From a call to the file of kernels for its type and head size, and what a device offers.
#include "cuda/hw/hw.h"
#include "cuda/instance.h"
#include "cuda/launch.h"

namespace prefixattn::cuda {
namespace {

template <class Params>
struct Row {
    DType dtype;
    int64_t head_dim;
    const Instance<Params> *instance;
};

constexpr Row<FwdParams> kFwd[] = {{DType::kBFloat16, 64, &fwd_bf16_64},
                                   {DType::kBFloat16, 128, &fwd_bf16_128},
                                   {DType::kFloat16, 64, &fwd_fp16_64},
                                   {DType::kFloat16, 128, &fwd_fp16_128}};
constexpr Row<BwdParams> kBwd[] = {{DType::kBFloat16, 64, &bwd_bf16_64},
                                   {DType::kBFloat16, 128, &bwd_bf16_128},
                                   {DType::kFloat16, 64, &bwd_fp16_64},
                                   {DType::kFloat16, 128, &bwd_fp16_128}};

template <class Params, int kRows>
const Instance<Params> *find(const Row<Params> (&table)[kRows], const AttnParams &p) {
    for (const Row<Params> &row : table)
        if (row.dtype == p.dtype && row.head_dim == p.D) return row.instance;
    return nullptr;
}

}  // namespace

const char *refused(const AttnParams &p) {
    return find(kFwd, p) ? nullptr : "they are for bfloat16 and float16 and for head sizes 64 and 128";
}

Plan plan(const FwdParams &p, const Device &device) { return find(kFwd, p)->plan(p, device); }
Plan plan(const BwdParams &p, const Device &device) { return find(kBwd, p)->plan(p, device); }

const char *run(const FwdParams &p, void *workspace, const Device &device, void *stream) {
    return find(kFwd, p)->run(p, workspace, device, stream);
}
const char *run(const BwdParams &p, void *workspace, const Device &device, void *stream) {
    return find(kBwd, p)->run(p, workspace, device, stream);
}

#if defined(__CUDACC__)

const char *use_device(int index, Device &offers) {
    constexpr int kKnown = 64;
    thread_local Device known[kKnown];
    cudaError_t error = cudaSetDevice(index);
    Device found = index >= 0 && index < kKnown ? known[index] : Device{};
    if (error == cudaSuccess && !found.processors) {
        error = cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, index);
        if (error == cudaSuccess && index < kKnown) known[index] = found;
    }
    offers = found;
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

// The shared memory of sm_80, and few processors, so that small calls are spread over them as large ones are on a GPU.
static Device stands_for{163 * 1024, 4};

void set_device(int shared_bytes, int processors) { stands_for = {shared_bytes, processors}; }

const char *use_device(int, Device &offers) {
    offers = stands_for;
    return nullptr;
}

#endif

}  // namespace prefixattn::cuda
