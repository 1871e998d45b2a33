// What becomes of a vector of the gradient: a rule is called with it, the matrix's old values and where they lie.
#pragma once
#include "reparam_tiles.h"

namespace prefixattn {
namespace PA_ISA {

struct NoRule {
    static constexpr bool kGradient = false;
    explicit NoRule(const SweepParams &) {}
    void operator()(vf, vf, int64_t, int) const {}
    void prefetch_at(int64_t) const {}
};

struct DenseRule {
    static constexpr bool kGradient = true;
    explicit DenseRule(const SweepParams &p) : dw_(p.dw) {}
    void operator()(vf g, vf, int64_t at, int n) const { store(dw_ + at, g, n); }
    void prefetch_at(int64_t) const {}

  private:
    float *dw_;
};

// torch.optim.AdamW's rule.
template <class Moment>
class AdamWRule {
  public:
    static constexpr bool kGradient = true;
    explicit AdamWRule(const SweepParams &p)
        : w_(p.w),
          m_((Moment *)p.moment1),
          v_((Moment *)p.moment2),
          toward1_(vset(p.one_minus_beta1)),
          beta2_(vset(p.beta2)),
          toward2_(vset(p.one_minus_beta2)),
          eps_(vset(p.eps)),
          step_(vset(-p.step_size)),
          correction_(vset(p.inverse_sqrt_correction2)),
          decay_(vset(p.decay)) {}

    void operator()(vf g, vf w, int64_t at, int n) const {
        const vf m0 = load(m_ + at, n), m = vfma(g - m0, toward1_, m0);
        const vf v = vfma(g * toward2_, g, load(v_ + at, n) * beta2_);
        store(m_ + at, m, n);
        store(v_ + at, v, n);
        store(w_ + at, vfma(step_, m / vfma(vsqrt(v), correction_, eps_), w * decay_), n);
    }
    void prefetch_at(int64_t at) const {
        prefetch(m_ + at);
        prefetch(v_ + at);
    }

  private:
    float *w_;
    Moment *m_, *v_;
    vf toward1_, beta2_, toward2_, eps_, step_, correction_, decay_;
};

// torch.optim.SGD's rule; without momentum there is no buffer.
template <class Moment>
class SgdRule {
  public:
    static constexpr bool kGradient = true;
    explicit SgdRule(const SweepParams &p)
        : w_(p.w),
          b_((Moment *)p.moment1),
          nesterov_(p.nesterov),
          first_(p.first),
          lr_(vset(-p.lr)),
          momentum_(vset(p.momentum)),
          toward_(vset(p.one_minus_dampening)),
          decay_(vset(p.weight_decay)) {}

    void operator()(vf g, vf w, int64_t at, int n) const {
        g = vfma(decay_, w, g);
        if (b_) {
            const vf b = first_ ? g : vfma(momentum_, load(b_ + at, n), toward_ * g);
            store(b_ + at, b, n);
            g = nesterov_ ? vfma(momentum_, b, g) : b;
        }
        store(w_ + at, vfma(lr_, g, w), n);
    }
    void prefetch_at(int64_t at) const {
        if (b_) prefetch(b_ + at);
    }

  private:
    float *w_;
    Moment *b_;
    bool nesterov_, first_;
    vf lr_, momentum_, toward_, decay_;
};

}  // namespace PA_ISA
}  // namespace prefixattn
