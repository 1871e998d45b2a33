// Scores that are bent towards a cap: cap * tanh(score / cap).
#pragma once
#include "vec.h"

namespace prefixattn {
namespace PA_ISA {

// To 1.5e-7 of the value: a minimax polynomial of degree 11 up to 0.55, then the quotient of exponentials. A nan stays
// one.
inline vf vtanh(vf x) {
    const vf square = x * x;
    vf p = vfma(vset(-0x1.98a754p-8f), square, vset(0x1.58b6ccp-6f));
    p = vfma(p, square, vset(-0x1.b91458p-5f));
    p = vfma(p, square, vset(0x1.110c7ep-3f));
    p = vfma(p, square, vset(-0x1.555546p-2f));
    const vf inner = vfma(p * square, x, x);
    const vf size = vmax(x, vzero() - x), e = vexp(size * vset(-2.f));
    const vf outer = (vset(1.f) - e) / (vset(1.f) + e);
    return vpositive(size - vset(0.55f), vpositive(x, outer, vzero() - outer), inner);
}

// Scores S [count], whole vectors, times `factor`, then capped. `slopes` gets the derivative of what is capped, if not
// null.
inline void cap_scores(float *S, int64_t count, float factor, float cap, float *slopes) {
    const vf f = vset(factor), inverse = vset(1 / cap);  // apart: factor / cap may lie outside float's range
    for (int64_t i = 0; i < count; i += VL) {
        const vf bent = vtanh(vload(S + i) * f * inverse);
        vstore(S + i, bent * vset(cap));
        if (slopes) vstore(slopes + i, vset(1.f) - bent * bent);
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
