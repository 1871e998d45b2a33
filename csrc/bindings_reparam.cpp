// The reparameterization's part of Python's door; prefixattn/reparam/cpu.py says what goes where.
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/isa.h"
#include "reparam.h"

namespace py = pybind11;
namespace prefixattn {
namespace {

class Reader {  // of a tuple, in its order
  public:
    explicit Reader(const py::tuple &t) : tuple_(t) {}
    template <class T>
    void read(T &x) {
        if constexpr (std::is_pointer_v<T>)
            x = reinterpret_cast<T>(tuple_[i_++].cast<uintptr_t>());
        else if constexpr (std::is_enum_v<T>)
            x = static_cast<T>(tuple_[i_++].cast<int>());
        else
            x = tuple_[i_++].cast<T>();
    }
    template <class... T>
    void all(T &...x) {
        (read(x), ...);
    }
    bool more() const { return i_ < tuple_.size(); }

  private:
    const py::tuple &tuple_;
    size_t i_ = 0;
};

void read_moment(const py::tuple &t, KeptMoment &m) { Reader(t).all(m.data, m.scale, m.format); }

void require_some(std::initializer_list<int64_t> sizes) {  // the kernels divide by them
    for (const int64_t n : sizes)
        if (n < 1) throw std::invalid_argument("a size is " + std::to_string(n) + ", expected 1 or more");
}
void read_sizes(const py::tuple &t, ReparamSizes &s) {
    Reader(t).all(s.G, s.P, s.O, s.M, s.threads);
    require_some({s.G, s.P, s.O, s.M});
}
void read_form(const py::tuple &t, BankForm &f) {
    Reader(t).all(f.layers, f.kv_heads, f.head_dim, f.interleaved);
    require_some({f.layers, f.kv_heads, f.head_dim});
}

int64_t fwd_workspace(const py::tuple &sizes) {
    ReparamSizes s{};
    read_sizes(sizes, s);
    return reparam_fwd_workspace(s);
}

int64_t sweep_workspace(const py::tuple &sizes) {
    ReparamSizes s{};
    read_sizes(sizes, s);
    return reparam_sweep_workspace(s);
}

void fwd(const py::tuple &sizes, const py::tuple &form, int dtype, const py::tuple &tensors) {
    ReparamFwdParams p{};
    read_sizes(sizes, p);
    read_form(form, p.form);
    p.dtype = static_cast<DType>(dtype);
    Reader(tensors).all(p.h, p.w, p.b, p.workspace, p.bank);
    const py::gil_scoped_release nogil;
    isa_in_use().reparam->fwd(p);
}

SweepParams sweep_params(const py::tuple &sizes, const py::tuple &tensors, float grad_scale) {
    SweepParams p{};
    read_sizes(sizes, p);
    Reader reader(tensors);
    reader.all(p.h, p.dy, p.w, p.dh, p.workspace);
    p.dy_is_bank = reader.more();
    if (p.dy_is_bank) {
        reader.all(p.form.layers, p.form.kv_heads, p.form.head_dim, p.form.interleaved, p.dtype);
        require_some({p.form.layers, p.form.kv_heads, p.form.head_dim});
    }
    p.grad_scale = grad_scale;
    return p;
}

void bwd(const py::tuple &sizes, const py::tuple &tensors, const py::tuple &form, int dtype, uintptr_t dw,
         uintptr_t db) {
    SweepParams p = sweep_params(sizes, tensors, 1.f);
    p.dy_is_bank = true;
    read_form(form, p.form);
    p.dtype = static_cast<DType>(dtype);
    p.dw = reinterpret_cast<float *>(dw);
    p.db = reinterpret_cast<float *>(db);
    p.rule = p.dw ? SweepRule::kDense : SweepRule::kNone;
    const py::gil_scoped_release nogil;
    isa_in_use().reparam->sweep(p);
}

void dh(const py::tuple &sizes, const py::tuple &tensors) {
    const SweepParams p = sweep_params(sizes, tensors, 1.f);
    const py::gil_scoped_release nogil;
    isa_in_use().reparam->sweep(p);
}

void adamw(const py::tuple &sizes, const py::tuple &tensors, float grad_scale, const py::tuple &exp_avg,
           const py::tuple &exp_avg_sq, const py::tuple &numbers, uint32_t salt) {
    SweepParams p = sweep_params(sizes, tensors, grad_scale);
    p.rule = SweepRule::kAdamW;
    read_moment(exp_avg, p.moment1);
    read_moment(exp_avg_sq, p.moment2);
    p.salt = salt;
    Reader(numbers).all(p.one_minus_beta1, p.beta2, p.one_minus_beta2, p.eps, p.step_size, p.inverse_sqrt_correction2,
                        p.decay);
    const py::gil_scoped_release nogil;
    isa_in_use().reparam->sweep(p);
}

void sgd(const py::tuple &sizes, const py::tuple &tensors, float grad_scale, const py::tuple &buffer,
         const py::tuple &numbers) {
    SweepParams p = sweep_params(sizes, tensors, grad_scale);
    p.rule = SweepRule::kSgd;
    read_moment(buffer, p.moment1);
    Reader(numbers).all(p.lr, p.momentum, p.one_minus_dampening, p.weight_decay, p.nesterov, p.first);
    const py::gil_scoped_release nogil;
    isa_in_use().reparam->sweep(p);
}

}  // namespace

void bind_reparam(py::module_ &m) {
    m.def("reparam_fwd_workspace", fwd_workspace, "Floats of scratch that reparam_fwd wants.");
    m.def("reparam_sweep_workspace", sweep_workspace, "Floats of scratch that the others want.");
    m.def("reparam_fwd", fwd);
    m.def("reparam_bwd", bwd);
    m.def("reparam_dh", dh);
    m.def("reparam_adamw", adamw);
    m.def("reparam_sgd", sgd);
}

}  // namespace prefixattn
