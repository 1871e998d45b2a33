// The reparameterization for Python: a dict of the members of ReparamFwdParams or FusedStepParams in, nothing returned.
// prefixattn/reparam/cpu.py checks them.
#include "api/reparam.h"

#include "cpu/isa.h"
#include "python/bindings.h"
#include "python/reader.h"

namespace py = pybind11;
namespace prefixattn {
namespace {

void require_some(std::initializer_list<int64_t> sizes) {  // the kernels divide by them
    for (const int64_t n : sizes)
        if (n < 1) throw std::invalid_argument("a size is " + std::to_string(n) + ", expected 1 or more");
}

}  // namespace

// Not in the unnamed namespace, where read_member() would not find them.
static void read_value(py::handle x, KvForm &to) {
    using Form = KvForm;
    static const Record<Form> record("form", {PA_FIELD(Form, layers), PA_FIELD(Form, kv_heads),
                                              PA_FIELD(Form, head_dim), PA_FIELD(Form, interleaved)});
    record.read(x, to);
    require_some({to.layers, to.kv_heads, to.head_dim});
}

static void read_value(py::handle x, KeptMoment &to) {
    using Kept = KeptMoment;
    static const Record<Kept> record("moment", {PA_FIELD(Kept, data), PA_FIELD(Kept, scale), PA_FIELD(Kept, format)});
    to = {};
    if (!x.is_none()) record.read(x, to);
}

namespace {

template <class Call>
std::vector<Field<Call>> sizes() {
    return {PA_FIELD(Call, G), PA_FIELD(Call, P), PA_FIELD(Call, O), PA_FIELD(Call, M)};
}

template <class Call>
Call read(const Record<Call> &record, const py::dict &fields) {
    Call p{};
    record.read(fields, p);
    require_some({p.G, p.P, p.O, p.M});
    return p;
}

ReparamSizes read_sizes(const py::dict &fields) {
    static const Record<ReparamSizes> record("sizes", sizes<ReparamSizes>());
    return read(record, fields);
}

int64_t fwd_workspace(const py::dict &sizes) { return reparam_fwd_workspace(read_sizes(sizes)); }
int64_t step_workspace(const py::dict &sizes) { return reparam_step_workspace(read_sizes(sizes)); }

void fwd(const py::dict &fields, int threads) {
    using Call = ReparamFwdParams;
    static const Record<Call> record("reparam_fwd", sizes<Call>(),
                                     {PA_FIELD(Call, h), PA_FIELD(Call, w), PA_FIELD(Call, b), PA_FIELD(Call, form),
                                      PA_FIELD(Call, dtype), PA_FIELD(Call, workspace), PA_FIELD(Call, kv)});
    const Call p = read(record, fields);
    const py::gil_scoped_release nogil;
    isa_in_use().reparam->fwd(p, threads);
}

void read_form(py::handle x, FusedStepParams &to) {  // None: dy is no gradient of kv
    to.dy_is_kv = !x.is_none();
    if (to.dy_is_kv) read_value(x, to.form);
}

using Call = FusedStepParams;

// What every fused step takes.
std::vector<Field<Call>> step_fields() {
    std::vector<Field<Call>> fields = sizes<Call>();
    fields.insert(fields.end(), {PA_FIELD(Call, h),
                                 PA_FIELD(Call, dy),
                                 {"form", read_form},
                                 PA_FIELD(Call, dtype),
                                 PA_FIELD(Call, w),
                                 PA_FIELD(Call, dh),
                                 PA_FIELD(Call, workspace),
                                 PA_FIELD(Call, grad_scale)});
    return fields;
}

void fused_step(const Record<Call> &record, const py::dict &fields, int threads, StepRule rule) {
    Call p = read(record, fields);
    p.rule = rule == StepRule::kDense && !p.dw ? StepRule::kNone : rule;
    const py::gil_scoped_release nogil;
    isa_in_use().reparam->fused_step(p, threads);
}

void bwd(const py::dict &fields, int threads) {
    static const Record<Call> record("reparam_bwd", step_fields(), {PA_FIELD(Call, dw), PA_FIELD(Call, db)});
    fused_step(record, fields, threads, StepRule::kDense);
}

void dh(const py::dict &fields, int threads) {
    static const Record<Call> record("reparam_dh", step_fields());
    fused_step(record, fields, threads, StepRule::kNone);
}

void adamw(const py::dict &fields, int threads) {
    static const Record<Call> record("reparam_adamw", step_fields(),
                                     {{"exp_avg", read_member<&Call::moment1, Call>},
                                      {"exp_avg_sq", read_member<&Call::moment2, Call>},
                                      PA_FIELD(Call, one_minus_beta1),
                                      PA_FIELD(Call, beta2),
                                      PA_FIELD(Call, one_minus_beta2),
                                      PA_FIELD(Call, eps),
                                      PA_FIELD(Call, step_size),
                                      PA_FIELD(Call, inverse_sqrt_correction2),
                                      PA_FIELD(Call, decay),
                                      PA_FIELD(Call, salt)});
    fused_step(record, fields, threads, StepRule::kAdamW);
}

void sgd(const py::dict &fields, int threads) {
    static const Record<Call> record("reparam_sgd", step_fields(),
                                     {{"momentum_buffer", read_member<&Call::moment1, Call>},
                                      PA_FIELD(Call, lr),
                                      PA_FIELD(Call, momentum),
                                      PA_FIELD(Call, one_minus_dampening),
                                      PA_FIELD(Call, weight_decay),
                                      PA_FIELD(Call, nesterov),
                                      PA_FIELD(Call, first)});
    fused_step(record, fields, threads, StepRule::kSgd);
}

}  // namespace

void bind_reparam(py::module_ &m) {
    m.def("reparam_fwd_workspace", fwd_workspace, "Floats of scratch that reparam_fwd wants.");
    m.def("reparam_step_workspace", step_workspace, "Floats of scratch that the others want.");
    m.def("reparam_fwd", fwd);
    m.def("reparam_bwd", bwd);
    m.def("reparam_dh", dh);
    m.def("reparam_adamw", adamw);
    m.def("reparam_sgd", sgd);
}

}  // namespace prefixattn
