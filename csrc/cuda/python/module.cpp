// The module `_cuda`, and `_cuda_host`, its twin on the host machine. attention/cuda.py checks types and devices.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "python/attention_records.h"
#include "python/numbers.h"
#if defined(PA_HOST_MACHINE)
#include "cuda/python/host.h"
#endif

namespace py = pybind11;
namespace prefixattn::cuda {
namespace {

void require(const char *error) {
    if (error) throw std::runtime_error(std::string("the cuda kernels: ") + error);
}

FwdParams read(const py::dict &fields, FwdParams *) { return read_fwd(fields); }
BwdParams read(const py::dict &fields, BwdParams *) { return read_bwd(fields); }

// `allocate` takes a number of bytes and returns their address; it keeps them for as long as it wants them kept.
template <class Params>
void call(const py::dict &fields, const py::function &allocate, int device, uintptr_t stream) {
    const Params p = read(fields, static_cast<Params *>(nullptr));
    require(refused(p));
    Device offers;
    require(use_device(device, offers));
    void *workspace = nullptr;
    if (const int64_t bytes = plan(p, offers).workspace)
        workspace = reinterpret_cast<void *>(allocate(bytes).cast<uintptr_t>());
    const char *error;
    {
        const py::gil_scoped_release nogil;
        error = run(p, workspace, offers, reinterpret_cast<void *>(stream));
    }
    require(error);
}

template <class Params>
py::dict planned(const py::dict &fields, int shared_bytes, int processors) {
    const Params p = read(fields, static_cast<Params *>(nullptr));
    require(refused(p));
    const Plan made = plan(p, Device{shared_bytes, processors});
    py::list launches;
    for (int i = 0; i < made.count; ++i) {
        const Launch &x = made.launches[i];
        py::dict launch;
        launch["kernel"] = x.kernel;
        launch["grid"] = py::make_tuple(x.grid[0], x.grid[1], x.grid[2]);
        launch["threads"] = x.threads;
        launch["shared_bytes"] = x.shared_bytes;
        launches.append(launch);
    }
    py::dict found;
    found["launches"] = launches;
    found["workspace"] = made.workspace;
    return found;
}

}  // namespace
}  // namespace prefixattn::cuda

PYBIND11_MODULE(PA_MODULE, m) {
    using namespace prefixattn;
    using namespace prefixattn::cuda;
    m.def("prefix_attn_fwd", call<FwdParams>);
    m.def("prefix_attn_bwd", call<BwdParams>);
    m.def("fwd_plan", planned<FwdParams>, "What a device with so much shared memory and so many processors would run.");
    m.def("bwd_plan", planned<BwdParams>, "The same of a backward pass.");
    m.attr("DTYPES") = numbers<DType>();
    m.attr("MASK_KINDS") = numbers<MaskKind>();
    m.attr("PHIS") = numbers<Phi>();
#if defined(PA_HOST_MACHINE)
    bind_host(m);
    m.attr("HOST_MACHINE") = true;
#else
    m.attr("HOST_MACHINE") = false;
#endif
}
