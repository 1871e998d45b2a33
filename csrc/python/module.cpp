// The module `_C`: both ops, the instruction sets, and what csrc/api/limits.h says.
#include <pybind11/pybind11.h>

#include "api/limits.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "python/bindings.h"
#include "python/numbers.h"

namespace py = pybind11;
namespace prefixattn {
namespace {

py::list isas() {
    py::list names;
    for (const Isa *isa : usable_isas()) names.append(isa->name);
    return names;
}

py::dict isa_objections() {
    py::dict objections;
    for (const Isa *isa : all_isas())
        if (const std::string words = isa_objection(*isa); !words.empty()) objections[isa->name] = words;
    return objections;
}

}  // namespace
}  // namespace prefixattn

PYBIND11_MODULE(_C, m) {
    using namespace prefixattn;
    bind_attention(m);
    bind_reparam(m);
    m.def(
        "isas", isas,
        "Instruction sets that were compiled in and run on this CPU, best first; behind \"portable\" those that run by "
        "name only.");
    m.def("isa_objections", isa_objections, "Why the other instruction sets do not run here, by name, in words.");
    m.def("isa", [] { return isa_in_use().name; }, "The instruction set in use.");
    m.def("set_isa", set_isa, "Takes another of isas(), for tests and benchmarks.");
    m.def("limit_scratch", limit_scratch,
          "Lets a thread's scratch be refused beyond so many bytes (0: never), for tests.");
    m.def("openmp_runtime", openmp_runtime, "File of the OpenMP runtime in use; empty: none found, one thread.");
    m.attr("DTYPES") = numbers<DType>();
    m.attr("MASK_KINDS") = numbers<MaskKind>();
    m.attr("PHIS") = numbers<Phi>();
    m.attr("MOMENT_FORMATS") = numbers<MomentFormat>();
    m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
    m.attr("HEAD_DIM_STEP") = kHeadDimStep;
    m.attr("MOMENT_BLOCK") = kMomentBlock;
}
