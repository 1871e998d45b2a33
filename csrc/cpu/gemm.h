// The matrix product of kernels without tiles: C[m, n] (+)= sum_k A[m, k] * B[k, n], with scalars of A broadcast
// against vectors of B. A is read where it lies, through byte strides, so that keys and values need no packing; B has
// rows of 4-byte words. With Fp32 a word is a float; with Bf16Dot it is a pair of bfloat16 and k counts pairs. Tiles
// have a product of their own (tile_product.h).
#pragma once
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace prefixattn {
namespace PA_ISA {

struct Fp32 {
    using Number = float;
    static constexpr bool kPairs = false, kTiles = false;
    static constexpr int kPlanes = 1;
    static Region region() { return {}; }
    static inline vf bcast(const char *p) {
        float x;
        std::memcpy(&x, p, 4);
        return vset(x);
    }
    static inline vf dot(vf a, vf b, vf c) { return vfma(a, b, c); }
    static constexpr bool kShortRuns = true;
};

#if defined(PA_BF16DOT)
struct Bf16Dot {
    using Number = bf16;
    static constexpr bool kPairs = true, kTiles = false;
    static constexpr int kPlanes = 1;
    static Region region() { return {}; }
    static inline vf bcast(const char *p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return (vf)_mm512_set1_epi32(x);
    }
    static inline vf dot(vf a, vf b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
    static constexpr bool kShortRuns = false;
};
#endif

struct Operand {       // words of A
    const char *data;  // A[m, k] lies at data + m * row + k * step
    ptrdiff_t row, step;
};

// MR rows by NV vectors of C in registers. kStepIsWord: A.step == 4 (k runs along memory), else A.row == 4.
template <class Dot, int MR, int NV, bool kStepIsWord>
inline void tile(Operand a, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc, int K, bool accumulate) {
    // Every call sums on its own and adds to C once: a long sum is made of short ones, and errs as little. A narrow
    // tile has registers to spare and goes further, to runs such as a dot product along vectors would have, and to runs
    // of those. With pairs of bfloat16 that gains nothing.
    constexpr bool kRuns = Dot::kShortRuns && NV == 1;
    constexpr int kRun = kRuns ? 16 : 1 << 30, kLongRun = 64;
    vf acc[MR][NV], run[MR], total[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
        run[m] = total[m] = vzero();
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) acc[m][n] = vzero();
    }
    const char *pa = a.data;
    for (int k = 0; k < K;) {
        for (const int end = kRun < K - k ? k + kRun : K; k < end; ++k) {
            vf row[NV];
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) row[n] = vload(b + n * VL);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
                const vf x = Dot::bcast(pa + m * (kStepIsWord ? a.row : 4));
#pragma GCC unroll 4
                for (int n = 0; n < NV; ++n) acc[m][n] = Dot::dot(x, row[n], acc[m][n]);
            }
            pa += kStepIsWord ? 4 : a.step;
            b += ldb;
        }
        if (!kRuns) continue;
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
            run[m] = run[m] + acc[m][0];
            acc[m][0] = vzero();
        }
        if (k % kLongRun != 0 && k < K) continue;
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
            total[m] = total[m] + run[m];
            run[m] = vzero();
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) {
            const vf sum = kRuns ? total[m] : acc[m][n];
            vstore(c + m * ldc + n * VL, accumulate ? vload(c + m * ldc + n * VL) + sum : sum);
        }
}

template <class Dot, int NV, bool kStepIsWord>
void column(int M, Operand a, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc, int K, bool accumulate) {
    constexpr int MR = NV == 4       ? 6
                       : NV == 3     ? 8
                       : kMaxNV == 4 ? 8
                                     : 6;  // fills the register file, leaves the latency covered
    int m = 0;
    const auto step = [&](int rows) {
        m += rows;
        a.data += rows * a.row;
        c += rows * ldc;
    };
    for (; m + MR <= M; step(MR)) tile<Dot, MR, NV, kStepIsWord>(a, b, ldb, c, ldc, K, accumulate);
    for (; m + 4 <= M; step(4)) tile<Dot, 4, NV, kStepIsWord>(a, b, ldb, c, ldc, K, accumulate);
    for (; m + 2 <= M; step(2)) tile<Dot, 2, NV, kStepIsWord>(a, b, ldb, c, ldc, K, accumulate);
    for (; m < M; step(1)) tile<Dot, 1, NV, kStepIsWord>(a, b, ldb, c, ldc, K, accumulate);
}

// N counts floats and is a multiple of VL; K counts words of A's rows.
template <class Dot, bool kStepIsWord>
void gemm(int M, int N, int K, Operand a, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc, bool accumulate) {
    if (M <= 0 || N <= 0) return;
    for (int vectors = N / VL; vectors > 0;) {
        const int nv = vectors <= kMaxNV ? vectors : vectors == kMaxNV + 1 && kMaxNV > 2 ? kMaxNV - 1 : kMaxNV;
        switch (nv) {
            case 1:
                column<Dot, 1, kStepIsWord>(M, a, b, ldb, c, ldc, K, accumulate);
                break;
            case 2:
                column<Dot, 2, kStepIsWord>(M, a, b, ldb, c, ldc, K, accumulate);
                break;
#if defined(PA_AVX512)
            case 3:
                column<Dot, 3, kStepIsWord>(M, a, b, ldb, c, ldc, K, accumulate);
                break;
            case 4:
                column<Dot, 4, kStepIsWord>(M, a, b, ldb, c, ldc, K, accumulate);
                break;
#endif
        }
        vectors -= nv;
        b += nv * VL;
        c += nv * VL;
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
