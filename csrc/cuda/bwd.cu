// The backward kernels of one type and head size, which build_support/cuda.py names: as CUDA, and as C++ for the tests.
#include "cuda/attention/bwd.h"
#include "cuda/instance.h"
#include "cuda/steps.h"

namespace prefixattn::cuda {
namespace {

using E = hw::PA_ELEMENT;

Plan plan_bwd(const BwdParams &p, const Device &device) {
    Plan made;
    made.workspace = bwd_workspace(p, device);
    bwd_launches<E, PA_HEAD_DIM>(p, nullptr, device, Planner{made});
    return made;
}

const char *run_bwd(const BwdParams &p, void *workspace, const Device &device, void *stream) {
    return bwd_launches<E, PA_HEAD_DIM>(p, workspace, device, Runner{(hw::Stream)stream});
}

}  // namespace

const Instance<BwdParams> PA_JOIN(bwd_, PA_INSTANCE) = {plan_bwd, run_bwd};

}  // namespace prefixattn::cuda
