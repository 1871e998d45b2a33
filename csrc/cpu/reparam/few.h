// The fused step when h has few rows, bound by memory: the matrix is read along its rows, four at a time, and none
// of it is copied.
#pragma once
#include "cpu/reparam/rules.h"

namespace prefixattn {
namespace PA_ISA {

struct FewRows {
    int64_t P, M, ld;      // ld: see row_floats()
    const float *h;        // [P][ld]
    float *dh;             // [P][ld]
    const float *dy;       // [P][kStepBlock], from the first of R rows of the matrix on
    const float *w;        // the first row
    int64_t row;           // which it is
    int64_t prefetch_end;  // of the matrix: nothing is asked for from here on
};

// One vector of R rows of the matrix; n < VL: the last, of n numbers.
template <class Rule, int R, bool kDh>
__attribute__((always_inline)) inline void few_rows_step(const FewRows &s, const Rule &rule, int64_t m, int n) {
    vf g[R], w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        g[r] = vzero();
        w[r] = load(s.w + r * s.M + m, n);
    }
    const float *h = s.h + m, *dy = s.dy;
    float *dh = kDh ? s.dh + m : nullptr;
    for (int64_t p = 0; p < s.P; ++p, h += s.ld, dy += kStepBlock) {
        const vf rows = vload(h);
        vf sum = kDh ? vload(dh) : vzero();
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const vf factor = vset(dy[r]);
            if (Rule::kGradient) g[r] = vfma(factor, rows, g[r]);
            if (kDh) sum = vfma(factor, w[r], sum);
        }
        if (kDh) {
            vstore(dh, sum);
            dh += s.ld;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rule(g[r], w[r], (s.row + r) * s.M + m, n, r * kMomentBlock + (int)(m % kMomentBlock));
}

// Lanes begin .. end of R rows, begin the start of a block; the R rows after them are asked for.
template <class Rule, int R, bool kDh>
void few_rows(const FewRows &s, const Rule &rule, int64_t begin, int64_t end) {
    const int64_t at = s.row * s.M;
    for (int64_t m = begin; m < end;) {
        const int64_t first = m, stop = Rule::kBlocks && end - m > kMomentBlock ? m + kMomentBlock : end;
        for (int r = 0; r < R; ++r) rule.open(r, s.row + r, first, (int)(stop - first));
        for (; m + VL <= stop; m += VL) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const int64_t ahead = (R + r) * s.M + m;
                if (at + ahead < s.prefetch_end) {
                    prefetch(s.w + ahead);
                    rule.prefetch_at(at + ahead);
                }
            }
            few_rows_step<Rule, R, kDh>(s, rule, m, VL);
        }
        if (m < stop) few_rows_step<Rule, R, kDh>(s, rule, m, (int)(stop - m));
        m = stop;
        for (int r = 0; r < R; ++r) rule.close(r, s.row + r, first, (int)(stop - first));
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
