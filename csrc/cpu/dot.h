// One query against keys, along the head size: how a call of one query a head computes scores, in either pass.
#pragma once
#include "pack.h"

namespace prefixattn {
namespace PA_ISA {

// Dot products of a query [D] with n <= VL keys, `stride` bytes apart, in a vector with zeros past n: sums along
// vectors, a key each, then across them. D is a multiple of VL.
template <class T>
inline vf dot_keys(const float *query, const char *keys, ptrdiff_t stride, int n, int D) {
    alignas(64) float sums[VL * VL], turned[VL * VL];
    for (int r = 0; r < n; ++r) {
        const T *key = (const T *)(keys + r * stride);
        vf even = vzero(), odd = vzero();
        int d = 0;
        for (; d + 2 * VL <= D; d += 2 * VL) {
            even = vfma(vload_as(key + d), vload(query + d), even);
            odd = vfma(vload_as(key + d + VL), vload(query + d + VL), odd);
        }
        if (d < D) even = vfma(vload_as(key + d), vload(query + d), even);
        vstore(sums + r * VL, even + odd);
    }
    transpose(sums, 4 * VL, n, VL, turned, VL);
    for (int step = VL / 2; step > 0; step /= 2)
        for (int r = 0; r < step; ++r)
            vstore(turned + r * VL, vload(turned + r * VL) + vload(turned + (r + step) * VL));
    return vload(turned);
}

}  // namespace PA_ISA
}  // namespace prefixattn
