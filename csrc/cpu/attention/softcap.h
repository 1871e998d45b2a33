// Scores that are bent towards a cap: cap * tanh(score / cap).
#pragma once
#include "cpu/vec.h"

namespace prefixattn {
namespace PA_ISA {

// To 1.5e-7 of the value: a minimax polynomial of degree 11 up to 0.55, then the quotient of exponentials. A nan stays
// one. `slope` gets the derivative, if not null: near 1, 1 - tanh^2 would be what rounding left.
inline vf vtanh(vf x, vf *slope = nullptr) {
    const vf square = x * x;
    vf p = vfma(vset(-0x1.98a754p-8f), square, vset(0x1.58b6ccp-6f));
    p = vfma(p, square, vset(-0x1.b91458p-5f));
    p = vfma(p, square, vset(0x1.110c7ep-3f));
    p = vfma(p, square, vset(-0x1.555546p-2f));
    const vf inner = vfma(p * square, x, x);
    const vf size = vmax(x, vzero() - x), e = vexp(size * vset(-2.f));
    const vf outer = (vset(1.f) - e) / (vset(1.f) + e), far = size - vset(0.55f);
    if (slope) {
        const vf inverse = vset(1.f) / (vset(1.f) + e);
        *slope = vpositive(far, vset(4.f) * e * inverse * inverse, vset(1.f) - inner * inner);
    }
    return vpositive(far, vpositive(x, outer, vzero() - outer), inner);
}

// Scores S [count], whole vectors, times `factor`, then capped. `slopes` gets the derivative of what is capped, if not
// null.
inline void cap_scores(float *S, int64_t count, float factor, float cap, float *slopes) {
    const vf f = vset(factor), inverse = vset(1 / cap);  // apart: factor / cap may lie outside float's range
    for (int64_t i = 0; i < count; i += VL) {
        vf slope;
        vstore(S + i, vtanh(vload(S + i) * f * inverse, &slope) * vset(cap));
        if (slopes) vstore(slopes + i, slope);
    }
}

// Scores S [count], whole vectors, to what a float mask is added to: scaled, and capped where there is a cap.
inline void scale_scores(float *S, int64_t count, float factor, float cap) {
    if (cap > 0) return cap_scores(S, count, factor, cap, nullptr);
    for (int64_t i = 0; i < count; i += VL) vstore(S + i, vload(S + i) * vset(factor));
}

}  // namespace PA_ISA
}  // namespace prefixattn
