// What `_cuda_host` has beside the kernels: the order that it draws, what it counted, and what kernels may touch.
#pragma once
#include <pybind11/pybind11.h>

#include "cuda/hw/hw.h"
#include "cuda/launch.h"

namespace prefixattn::cuda {

inline pybind11::dict counted() {
    const host::Counts c = host::counts();
    pybind11::dict found;
    found["launches"] = c.launches;
    found["blocks"] = c.blocks;
    found["mma"] = c.mma;
    found["ldmatrix"] = c.ldmatrix;
    found["ldmatrix_conflicts"] = c.ldmatrix_conflicts;
    found["shuffles"] = c.shuffles;
    found["barriers"] = c.barriers;
    found["load_bytes"] = c.load_bytes;
    found["store_bytes"] = c.store_bytes;
    found["copy_bytes"] = c.copy_bytes;
    found["shared_load_bytes"] = c.shared_load_bytes;
    found["shared_store_bytes"] = c.shared_store_bytes;
    return found;
}

inline void bind_host(pybind11::module_ &m) {
    m.def("set_seed", host::set_seed, "Draws another order of blocks, warps and lanes.");
    m.def("counts", counted, "What the launches since reset_counts() did.");
    m.def("reset_counts", host::reset_counts);
    m.def(
        "allow", [](uintptr_t at, size_t bytes, bool w) { host::allow(reinterpret_cast<void *>(at), bytes, w); },
        "Memory that kernels may touch, and write; as soon as some is named, they may touch no other.");
    m.def("forget_tensors", host::forget_tensors, "Takes back every allow().");
    m.def("set_device", set_device, "Shared memory of a block, in bytes, and processors: what the host stands for.");
}

}  // namespace prefixattn::cuda
