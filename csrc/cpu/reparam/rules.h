// What becomes of a vector of the gradient: a rule is called with it, the matrix's old values, where they lie, and
// `slot`, 256 r + m % 256 for number m of the r-th row in work. A rule with kBlocks is told of each block of 256
// numbers along a row before and after its vectors; it has kBuffer floats to keep until then.
#pragma once
#include "cpu/reparam/moments.h"

namespace prefixattn {
namespace PA_ISA {

constexpr int kRowsAtOnce = 4;

struct ByVector {
    static constexpr bool kGradient = true, kBlocks = false;
    static constexpr int kBuffer = 0;
    void open(int, int64_t, int64_t, int) const {}
    void close(int, int64_t, int64_t, int) const {}
};

struct NoRule : ByVector {
    static constexpr bool kGradient = false;
    NoRule(const FusedStepParams &, float *) {}
    void operator()(vf, vf, int64_t, int, int) const {}
    void prefetch_at(int64_t) const {}
};

struct DenseRule : ByVector {
    DenseRule(const FusedStepParams &p, float *) : dw_(p.dw) {}
    void operator()(vf g, vf, int64_t at, int n, int) const { store(dw_ + at, g, n); }
    void prefetch_at(int64_t) const {}

  private:
    float *dw_;
};

// torch.optim.AdamW's rule.
class AdamW {
  public:
    explicit AdamW(const FusedStepParams &p)
        : toward1_(vset(p.one_minus_beta1)),
          beta2_(vset(p.beta2)),
          toward2_(vset(p.one_minus_beta2)),
          eps_(vset(p.eps)),
          step_(vset(-p.step_size)),
          correction_(vset(p.inverse_sqrt_correction2)),
          decay_(vset(p.decay)) {}
    struct New {
        vf w, m, v, root;  // root: of v
    };
    New operator()(vf g, vf w, vf m0, vf v0) const {
        const vf m = vfma(g - m0, toward1_, m0), v = vfma(g * toward2_, g, v0 * beta2_), root = vsqrt(v);
        return {vfma(step_, m / vfma(root, correction_, eps_), w * decay_), m, v, root};
    }

  private:
    vf toward1_, beta2_, toward2_, eps_, step_, correction_, decay_;
};

// With moments of types that are read and written a vector at a time.
template <class First, class Second>
class AdamWRule : public ByVector {
  public:
    AdamWRule(const FusedStepParams &p, float *)
        : w_(p.w), m_((First *)p.moment1.data), v_((Second *)p.moment2.data), rule_(p) {}

    void operator()(vf g, vf w, int64_t at, int n, int) const {
        const AdamW::New x = rule_(g, w, load(m_ + at, n), load(v_ + at, n));
        store(m_ + at, x.m, n);
        store(v_ + at, x.v, n);
        store(w_ + at, x.w, n);
    }
    void prefetch_at(int64_t at) const {
        prefetch(m_ + at);
        prefetch(v_ + at);
    }

  private:
    float *w_;
    First *m_;
    Second *v_;
    AdamW rule_;
};

// With any moments.
class AdamWByBlock {
  public:
    static constexpr bool kGradient = true, kBlocks = true;
    static constexpr int kBuffer = 2 * kRowsAtOnce * kMomentBlock;
    AdamWByBlock(const FusedStepParams &p, float *buffer)
        : w_(p.w),
          m_(p.moment1, p.M),
          v_(p.moment2, p.M),
          M_(p.M),
          rows_(p.G * p.O),
          salt_(p.salt),
          new_m_(buffer),
          new_v_(buffer + kRowsAtOnce * kMomentBlock),
          roots_(v_.eight()),
          rule_(p) {}

    void open(int r, int64_t row, int64_t m, int n) const {
        if (row + kRowsAtOnce < rows_) {
            m_.ask(row + kRowsAtOnce, m, n);
            v_.ask(row + kRowsAtOnce, m, n);
        }
        m_.read<SignedCode>(row, m, n, new_m_ + r * kMomentBlock);
        v_.read<SquareCode>(row, m, n, new_v_ + r * kMomentBlock);
    }
    void operator()(vf g, vf w, int64_t at, int n, int slot) const {
        const AdamW::New x = rule_(g, w, vload(new_m_ + slot), vload(new_v_ + slot));
        vstore(new_m_ + slot, x.m);
        vstore(new_v_ + slot, roots_ ? x.root : x.v);
        store(w_ + at, x.w, n);
    }
    void close(int r, int64_t row, int64_t m, int n) const {
        if (m_.eight() && v_.eight()) return encode<true, true>(r, row, m, n);
        if (m_.eight()) encode<true, false>(r, row, m, n);
        if (v_.eight()) encode<false, true>(r, row, m, n);
        if (!m_.eight()) m_.write(row, m, n, new_m_ + r * kMomentBlock);
        if (!v_.eight()) v_.write(row, m, n, new_v_ + r * kMomentBlock);
    }
    void prefetch_at(int64_t) const {}  // open() does

  private:
    template <bool kFirst, bool kSecond>
    void encode(int r, int64_t row, int64_t m, int n) const {
        const float *x = new_m_ + r * kMomentBlock, *y = new_v_ + r * kMomentBlock;
        const vf along_x = kFirst ? m_.write_scale<SignedCode>(row, m, n, x) : vzero();
        const vf along_y = kSecond ? v_.write_scale<SquareCode>(row, m, n, y) : vzero();
        uint8_t *first = m_.codes(row, m), *second = v_.codes(row, m);
        const Coin coin(salt_, row * M_);
        const auto step = [&](int i, int count) {
            const vu bits = coin.at(m + i);
            if (kFirst) store_codes(first + i, SignedCode::encode(vload(x + i), along_x, bits), count);
            if (kSecond) store_codes(second + i, SquareCode::encode(vload(y + i), along_y, bits), count);
        };
        int i = 0;
        for (; i + VL <= n; i += VL) step(i, VL);
        if (i < n) step(i, n - i);
    }

    float *w_;
    Moment m_, v_;
    int64_t M_, rows_;
    uint32_t salt_;
    float *new_m_, *new_v_;  // [kRowsAtOnce][kMomentBlock]
    bool roots_;             // new_v_ becomes the square roots
    AdamW rule_;
};

// torch.optim.SGD's rule; without momentum there is no buffer.
template <class Moment>
class SgdRule : public ByVector {
  public:
    SgdRule(const FusedStepParams &p, float *)
        : w_(p.w),
          b_((Moment *)p.moment1.data),
          nesterov_(p.nesterov),
          first_(p.first),
          lr_(vset(-p.lr)),
          momentum_(vset(p.momentum)),
          toward_(vset(p.one_minus_dampening)),
          decay_(vset(p.weight_decay)) {}

    void operator()(vf g, vf w, int64_t at, int n, int) const {
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
