// What a memory is multiplied by: phi of a query, and its derivative; a nan stays one.
#pragma once
#include "api/prefix_attn.h"
#include "cpu/vec.h"

namespace prefixattn {
namespace PA_ISA {

struct PhiNone {
    static vf value(vf x) { return x; }
    static vf slope(vf) { return vset(1.f); }
};

struct PhiElu {
    static vf value(vf x) { return vpositive(x, x, vexp(x) - vset(1.f)); }
    static vf slope(vf x) { return vpositive(x, vset(1.f), vexp(x)); }
};

struct PhiRelu {
    static vf value(vf x) { return vmax(vzero(), x); }
    static vf slope(vf x) { return vpositive(x, vset(1.f), vzero()); }
};

// With erf, to 1.3e-7. Minimax polynomials: erf(z) / z in z^2 up to 1; then log(1 - erf(z)) up to 4, where erf is 1.
struct PhiGelu {
    static vf value(vf x) { return x * normal_cdf(x); }
    static vf slope(vf x) { return vfma(x * vset(0x1.988454p-2f), vexp(x * x * vset(-0.5f)), normal_cdf(x)); }

  private:
    template <int N>
    static vf polynomial(vf x, const float (&coefficients)[N]) {
        vf y = vset(coefficients[N - 1]);
        for (int i = N - 2; i >= 0; --i) y = vfma(y, x, vset(coefficients[i]));
        return y;
    }

    static vf normal_cdf(vf x) {
        static const float kInner[] = {0x1.20dd74p+0f, -0x1.81273ep-2f,  0x1.ce2d2p-4f, -0x1.b7fbb4p-6f,
                                       0x1.5419f6p-8f, -0x1.a485ecp-11f, 0x1.4ae4dp-14f};
        static const float kOuter[] = {0x1.8a57ap-13f, -0x1.212c0cp+0f, -0x1.443566p-1f, -0x1.bc1518p-4f,
                                       0x1.9d0306p-6f, -0x1.138ccp-8f,  0x1.cec60ap-12f, -0x1.6bd7fp-16f};
        const vf z = x * vset(0x1.6a09e6p-1f), size = vmax(vzero() - z, z);
        const vf up_to_4 = vzero() - vmax(vset(-4.f), vzero() - size);
        const vf erf = vpositive(size - vset(1.f), vset(1.f) - vexp(polynomial(up_to_4, kOuter)),
                                 size * polynomial(size * size, kInner));
        return vset(0.5f) * (vset(1.f) + vpositive(x, erf, vzero() - erf));
    }
};

// Calls f with the struct of a phi, so that its loops are compiled for each.
template <class F>
inline void with_phi(Phi phi, F f) {
    switch (phi) {
        case Phi::kNone:
            return f(PhiNone());
        case Phi::kElu:
            return f(PhiElu());
        case Phi::kGelu:
            return f(PhiGelu());
        case Phi::kRelu:
            return f(PhiRelu());
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
