// prefix_attention on a CPU for Python. attention/cpu.py checks types and devices.
#include "cpu/isa.h"
#include "python/attention_records.h"
#include "python/bindings.h"

namespace py = pybind11;
namespace prefixattn {
namespace {

void fwd(const py::dict &fields, int threads) {
    const FwdParams p = read_fwd(fields);
    const py::gil_scoped_release nogil;
    isa_in_use().attention->fwd(p, threads);
}

void bwd(const py::dict &fields, int threads) {
    const BwdParams p = read_bwd(fields);
    const py::gil_scoped_release nogil;
    isa_in_use().attention->bwd(p, threads);
}

}  // namespace

void bind_attention(py::module_ &m) {
    m.def("prefix_attn_fwd", fwd);
    m.def("prefix_attn_bwd", bwd);
}

}  // namespace prefixattn
