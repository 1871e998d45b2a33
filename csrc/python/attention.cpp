// prefix_attention on a CPU for Python. attention/cpu.py checks types and devices.
#include "cpu/isa.h"
#include "python/attention_records.h"
#include "python/bindings.h"

namespace py = pybind11;
namespace prefixattn {
namespace {

template <class Call>
const std::vector<Field<Call>> &fields_of_cpu() {
    static const std::vector<Field<Call>> fields{PA_FIELD(Call, window_left),      PA_FIELD(Call, window_right),
                                                 PA_FIELD(Call, prefix_in_window), PA_FIELD(Call, cu_seqlens_q),
                                                 PA_FIELD(Call, cu_seqlens_k),     PA_FIELD(Call, total_q),
                                                 PA_FIELD(Call, splits_float32)};
    return fields;
}

void fwd(const py::dict &fields, int threads) {
    const auto p = read_fwd(fields, fields_of_cpu<CpuFwdParams>());
    const py::gil_scoped_release nogil;
    isa_in_use().attention->fwd(p, threads);
}

void bwd(const py::dict &fields, int threads) {
    const auto p = read_bwd(fields, fields_of_cpu<CpuBwdParams>());
    const py::gil_scoped_release nogil;
    isa_in_use().attention->bwd(p, threads);
}

}  // namespace

void bind_attention(py::module_ &m) {
    m.def("prefix_attn_fwd", fwd);
    m.def("prefix_attn_bwd", bwd);
}

}  // namespace prefixattn
