// One query against keys, along the head size: how a call of one query a head computes scores, in either pass.
#pragma once
#include "api/semantics.h"
#include "cpu/pack.h"

namespace prefixattn {
namespace PA_ISA {

// Calls whose forward is decode.h's, so that the backward computes scores as it does.
inline bool one_query(const AttnParams &p) {
    return p.L == 1 && p.D % VL == 0 && p.dropout_p == 0 && p.prefix_dropout_p == 0 && !p.memory.data;
}

// The 32 sums of a dot product over D numbers, folded to one vector. Fewer would be longer chains, and err more: there
// are as many whatever a vector holds. D is a multiple of VL.
template <class T>
inline vf dot_sums(const T *a, const float *b, int D) {
    constexpr int kSums = 32 / VL;
    vf sum[kSums];
    for (int i = 0; i < kSums; ++i) sum[i] = vzero();
    int d = 0;
    for (; d + 32 <= D; d += 32)
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) sum[i] = vfma(vload_as(a + d + i * VL), vload(b + d + i * VL), sum[i]);
    for (int i = 0; d < D; d += VL, ++i) sum[i] = vfma(vload_as(a + d), vload(b + d), sum[i]);
    for (int half = kSums / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
    return sum[0];
}

// A dot product in double, of D numbers, a multiple of 8.
inline double exact_dot(const float *a, const float *b, int D) {
    typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
    typedef double Doubles __attribute__((vector_size(64)));
    Doubles sum = {};
    for (int d = 0; d < D; d += 8)
        sum += __builtin_convertvector(*(const Floats *)(a + d), Doubles) *
               __builtin_convertvector(*(const Floats *)(b + d), Doubles);
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// Dot products of a query [D] with n <= VL keys, `stride` bytes apart, in a vector with zeros past n: sums along
// vectors, a key each, then across them. D is a multiple of VL.
template <class T>
inline vf dot_keys(const float *query, const char *keys, ptrdiff_t stride, int n, int D) {
    alignas(64) float sums[VL * VL], turned[VL * VL];
    for (int r = 0; r < n; ++r) vstore(sums + r * VL, dot_sums((const T *)(keys + r * stride), query, D));
    transpose(sums, 4 * VL, n, VL, turned, VL);
    for (int step = VL / 2; step > 0; step /= 2)
        for (int r = 0; r < step; ++r)
            vstore(turned + r * VL, vload(turned + r * VL) + vload(turned + (r + step) * VL));
    return vload(turned);
}

}  // namespace PA_ISA
}  // namespace prefixattn
