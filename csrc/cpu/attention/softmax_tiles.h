// The softmax of tiles' scores: 32 queries, a lane each, over rows of keys, online.
#pragma once
#include "cpu/attention/panels.h"

namespace prefixattn {
namespace PA_ISA {

constexpr int kTileLanes = 2 * kTile;  // queries of a block

struct TileBlock {  // of queries
    int64_t h;
    QueryBlock q;
    int64_t prefix_begin, own_begin, own_end;  // virtual keys that it sees begin and end here
    float *queries, *acc;                      // [words of D][32], and out [D][32], transposed
    alignas(64) float pivot[kTileLanes], prefix_sum[kTileLanes], own_sum[kTileLanes];
};

template <class Ops>
class TileSoftmax {
    static constexpr float kNoKey = -0x1p126f;  // the pivot of a query that has met no key: -inf - -inf is nan

  public:
    float *scores, *multipliers;      // [rows][32]; the second: of dropout, null where there is none
    float prefix_factor, own_factor;  // what scores are still to be multiplied by
    float gain;                       // what prefix dropout multiplies kept elements by
    int64_t plane;                    // words to the second plane of pairs

    // A maximum may be passed by 2^8 before what was summed is scaled to a new one: the digits of a weight do not
    // depend on its size.
    bool raise_pivot(TileBlock &x, int rows, int np, vf *rescale) const {
        constexpr int NV = kTileLanes / VL;
        constexpr float kSlack = 5.5f;
        vf prefix[NV], own[NV];
        maximum(0, np, prefix);
        maximum(np, rows, own);
        bool moved = false;
        for (int v = 0; v < NV; ++v) {
            const vf highest = vmax(prefix[v] * vset(prefix_factor), own[v] * vset(own_factor));
            const vf old = vload(x.pivot + v * VL);
            const vf now = vpositive(highest - (old + vset(kSlack)), highest, old);
            vstore(x.pivot + v * VL, now);
            rescale[v] = vexp2((old - vmax(now, vset(kNoKey))) * vset(kLog2e));
            moved |= vany_other(rescale[v], 1.f);
        }
        return moved;
    }

    // Scores of n rows, the prefix's np first, to weights in pairs of rows.
    void run(TileBlock &x, int np, int n, const vf *rescale, uint32_t *pairs) const {
        const bool drops = multipliers, exact = is_power_of_2(prefix_factor) && is_power_of_2(own_factor);
        drops   ? exact ? run<true, true>(x, np, n, rescale, pairs) : run<true, false>(x, np, n, rescale, pairs)
        : exact ? run<false, true>(x, np, n, rescale, pairs)
                : run<false, false>(x, np, n, rescale, pairs);
    }

  private:
    template <bool kDrop, bool kExact>
    void run(TileBlock &x, int np, int n, const vf *rescale, uint32_t *pairs) const {
        x.q.lanes > kTile ? weigh<kDrop, kExact, 2>(x, np, n, rescale, pairs)
                          : weigh<kDrop, kExact, 1>(x, np, n, rescale, pairs);
    }

    void maximum(int begin, int end, vf *max) const {
        constexpr int NV = kTileLanes / VL;
        vf second[NV];
        for (int v = 0; v < NV; ++v) max[v] = second[v] = vset(kMinusInf);
        const float *S = scores + (int64_t)begin * kTileLanes;
        int r = begin;
        for (; r + 2 <= end; r += 2, S += 2 * kTileLanes)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                max[v] = vmax(max[v], vload(S + v * VL));
                second[v] = vmax(second[v], vload(S + kTileLanes + v * VL));
            }
        for (int v = 0; v < NV; ++v) {
            if (r < end) max[v] = vmax(max[v], vload(S + v * VL));
            max[v] = vmax(max[v], second[v]);
        }
    }

    template <bool kDrop, bool kExact, int NJ>
    void weigh(TileBlock &x, int np, int n, const vf *rescale, uint32_t *pairs) const {
        constexpr int NV = NJ * kTile / VL;
        vf minus_pivot[NV], prefix[NV], own[NV];
        for (int v = 0; v < NV; ++v) {
            minus_pivot[v] = vzero() - vmax(vload(x.pivot + v * VL), vset(kNoKey));
            prefix[v] = own[v] = vzero();
        }
        const Kind of_prefix{prefix_factor, gain, prefix}, of_own{own_factor, 1, own};
        const int whole = np / 2 * 2;
        if (whole > 0 && gain != 1)
            weights<kDrop, kExact, true, NJ>(0, whole, of_prefix, of_prefix, minus_pivot, pairs);
        else if (whole > 0)
            weights<kDrop, kExact, false, NJ>(0, whole, of_prefix, of_prefix, minus_pivot, pairs);
        int r = whole;
        if (np % 2) {  // the last row of the prefix and the first own key
            weights<kDrop, kExact, true, NJ>(r, r + 2, of_prefix, of_own, minus_pivot, pairs);
            r += 2;
        }
        if (r < n) weights<kDrop, kExact, false, NJ>(r, n, of_own, of_own, minus_pivot, pairs);
        for (int v = 0; v < NV; ++v) {
            float *sums[] = {x.prefix_sum + v * VL, x.own_sum + v * VL};
            vstore(sums[0], vfma(vload(sums[0]), rescale[v], prefix[v]));
            vstore(sums[1], vfma(vload(sums[1]), rescale[v], own[v]));
        }
    }

    struct Kind {  // prefix rows, or own keys
        float factor, gain;
        vf *sum;  // of weights without the gain of prefix dropout
    };

    // Rows begin .. end, in pairs of a first and a second. A score is rounded before the pivot, a rounded score, is
    // taken away: of large ones the difference would be what rounding left. The backward does the same. kExact: there
    // is nothing to round.
    template <bool kDrop, bool kExact, bool kGain, int NJ>
    void weights(int begin, int end, const Kind &first, const Kind &second, const vf *minus_pivot,
                 uint32_t *pairs) const {
        constexpr int NV = NJ * kTile / VL;
        const vf f0 = vset(first.factor), f1 = vset(second.factor), g0 = vset(first.gain), g1 = vset(second.gain);
        vf sum0[NV], sum1[NV];
        for (int v = 0; v < NV; ++v) sum0[v] = sum1[v] = vzero();
        const auto weight = [&](const float *score, vf f, vf pivot) {
            const vf product = vload(score);
            const vf x = kExact ? vfma(product, f, pivot) : vrounded(product * f) + pivot;
            return vexp2_short(x * vset(kLog2e));
        };
        for (int r = begin; r < end; r += 2) {
            const float *row = scores + r * kTileLanes;
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                vf w0 = weight(row + v * VL, f0, minus_pivot[v]);
                vf w1 = weight(row + kTileLanes + v * VL, f1, minus_pivot[v]);
                sum0[v] = sum0[v] + w0;
                sum1[v] = sum1[v] + w1;
                if (kGain) w0 = w0 * g0, w1 = w1 * g1;
                if (kDrop) {
                    const float *m = multipliers + (int64_t)r * kTileLanes + v * VL;
                    w0 = w0 * vload(m), w1 = w1 * vload(m + kTileLanes);
                }
                Ops::put_pairs(pairs + r / 2 * kTileLanes + v * VL, plane, w0, w1);
            }
        }
        for (int v = 0; v < NV; ++v) {
            first.sum[v] = first.sum[v] + sum0[v];
            second.sum[v] = second.sum[v] + sum1[v];
        }
    }
};

}  // namespace PA_ISA
}  // namespace prefixattn
