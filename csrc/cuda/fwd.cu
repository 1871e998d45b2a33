// The forward kernels of one type and head size, which build_support/cuda.py names: as CUDA, and as C++ for the tests.
#include "cuda/attention/fwd.h"
#include "cuda/instance.h"
#include "cuda/steps.h"

namespace prefixattn::cuda {
namespace {

using E = hw::PA_ELEMENT;

Plan plan_fwd(const FwdParams &p, const Device &device) {
    Plan made;
    made.workspace = fwd_workspace(p, device);
    fwd_launches<E, PA_HEAD_DIM>(p, nullptr, device, Planner{made});
    return made;
}

const char *run_fwd(const FwdParams &p, void *workspace, const Device &device, void *stream) {
    return fwd_launches<E, PA_HEAD_DIM>(p, workspace, device, Runner{(hw::Stream)stream});
}

}  // namespace

const Instance<FwdParams> PA_JOIN(fwd_, PA_INSTANCE) = {plan_fwd, run_fwd};

}  // namespace prefixattn::cuda
