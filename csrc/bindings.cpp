// Python's door: plain integers in, nothing returned. Shapes were checked by whoever called the op (functional.py),
// types and devices in prefixattn/cpu.py.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "prefix_attn.h"

namespace py = pybind11;
namespace prefixattn {
namespace {

py::list isas() {
    py::list names;
    for (const Isa *isa : usable_isas()) names.append(isa->name);
    return names;
}

template <class E>
py::dict numbers() {
    py::dict found;
    for (const Named<E> &x : Names<E>::all) found[x.name] = static_cast<int>(x.value);
    return found;
}

Strided strided(const py::tuple &t) {  // (address, stride0, stride1, stride2)
    return {reinterpret_cast<void *>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            t[3].cast<int64_t>()};
}
template <class T>
T *address(uintptr_t x) {
    return reinterpret_cast<T *>(x);
}

struct Common {  // what prefixattn/cpu.py passes as one tuple, in this order
    template <class P>
    static void read(const py::tuple &t, P &p) {
        int i = 0;
        const auto next = [&] { return t[i++]; };
        p.dtype = static_cast<DType>(next().template cast<int>());
        for (int64_t *size : {&p.B, &p.H, &p.Hkv, &p.L, &p.S, &p.T, &p.P, &p.D})
            *size = next().template cast<int64_t>();
        for (Strided *s : {&p.q, &p.k, &p.v, &p.prefix_k, &p.prefix_v}) *s = strided(next().template cast<py::tuple>());
        p.memory = strided(next().template cast<py::tuple>());
        p.memories = next().template cast<int64_t>();
        p.phi = static_cast<Phi>(next().template cast<int>());
        p.rows = address<const int64_t>(next().template cast<uintptr_t>());
        p.lengths = address<const int64_t>(next().template cast<uintptr_t>());
        p.mask_kind = static_cast<MaskKind>(next().template cast<int>());
        p.mask = strided(next().template cast<py::tuple>());
        p.mask_stride3 = next().template cast<int64_t>();
        p.scale = next().template cast<float>();
        p.softcap = next().template cast<float>();
        p.causal = next().template cast<bool>();
        p.dropout_p = next().template cast<double>();
        p.prefix_dropout_p = next().template cast<double>();
        p.seed = next().template cast<uint64_t>();
        p.threads = next().template cast<int>();
    }
};

void fwd(const py::tuple &common, const py::tuple &out, const py::tuple &attended, uintptr_t lse, uintptr_t mass) {
    FwdParams p{};
    Common::read(common, p);
    p.out = strided(out);
    p.attended = strided(attended);
    p.lse = address<void>(lse);
    p.mass = address<float>(mass);
    const py::gil_scoped_release nogil;
    isa_in_use().attention->fwd(p);
}

void bwd(const py::tuple &common, const py::tuple &dout, const py::tuple &out, uintptr_t lse, uintptr_t dlse,
         const py::tuple &gradients) {
    BwdParams p{};
    Common::read(common, p);
    p.dout = strided(dout);
    p.out = strided(out);
    p.lse = address<const void>(lse);
    p.dlse = address<const float>(dlse);
    int i = 0;
    for (Strided *s : {&p.dq, &p.dk, &p.dv, &p.dprefix_k, &p.dprefix_v, &p.dmemory})
        *s = strided(gradients[i++].cast<py::tuple>());
    const py::gil_scoped_release nogil;
    isa_in_use().attention->bwd(p);
}

}  // namespace

}  // namespace prefixattn

PYBIND11_MODULE(_C, m) {
    using namespace prefixattn;
    m.def("prefix_attn_fwd", fwd);
    m.def("prefix_attn_bwd", bwd);
    m.def("isas", isas, "Instruction sets that were compiled in and run on this CPU, best first.");
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
    bind_reparam(m);
}
