// A long sum of products, kept in two floats an element: one chain of additions errs with its length.
#pragma once
#include "cpu/attention/geometry.h"

namespace prefixattn {
namespace PA_ISA {

// The gradients of some keys and of their values while tiles are added to them.
struct KeySums {
    static constexpr int kRun = 8;  // tiles added in one chain

    float *dk, *dv;              // [floats] each: what tiles are added to; dv may be null
    float *dk_total, *dv_total;  // and what has left them, rounding aside; null: no sum is longer than a run
    int64_t *tiles;              // added so far
    int64_t floats;              // whole vectors

    void clear() const {
        *tiles = 0;
        float *const all[] = {dk, dv, dk_total, dv_total};
        for (float *x : all)
            if (x) std::memset(x, 0, sizeof(float) * floats);
    }

    // To be called after each tile; it counts alone, so every schedule adds in the same order.
    void added() const {
        if (!dk_total || ++*tiles % kRun) return;
        fold(dk, dk_total);
        if (dv) fold(dv, dv_total);
    }

    // Leaves the sums in dk and dv.
    void finish() const {
        if (!dk_total) return;
        for (int64_t i = 0; i < floats; i += VL) {
            vstore(dk + i, vload(dk_total + i) + vload(dk + i));
            if (dv) vstore(dv + i, vload(dv_total + i) + vload(dv + i));
        }
    }

  private:
    // total takes in the rest, which keeps what that rounds away.
    void fold(float *rest, float *total) const {
        for (int64_t i = 0; i < floats; i += VL) {
            const vf a = vload(total + i), b = vload(rest + i), sum = a + b, from_b = sum - a;
            vstore(total + i, sum);
            vstore(rest + i, (a - (sum - from_b)) + (b - from_b));
        }
    }
};

}  // namespace PA_ISA
}  // namespace prefixattn
