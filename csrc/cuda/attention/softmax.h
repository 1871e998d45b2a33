// From products to weights: tiles of scores in accumulators, 16 queries to a warp, and what is known of each query.
#pragma once
#include "cuda/attention/keys.h"

namespace prefixattn::cuda {

// What a warp works at: 16 queries of one head, and the columns that they see.
struct Queries {
    int b, h;      // of q
    int l0, rows;  // the first one, and how many there are from it on: more than 16, or fewer
    int limit[2];  // of this lane's two queries, the first hidden column
    int full;      // columns below are seen by all 16
    int seen;      // columns from here on are seen by none

    PA_DEVICE Queries(const AttnParams &p, const Axis &axis, int b_, int h_, int l0_)
        : b(b_), h(h_), l0(l0_), rows((int)p.L - l0_) {
        limit[0] = axis.seen(l0 + row_of(0)), limit[1] = axis.seen(l0 + row_of(2));
        full = axis.seen(l0);
        seen = axis.seen((rows < kStep ? (int)p.L : l0 + kStep) - 1);
    }

    template <class E>
    PA_DEVICE E *in(const Strided &t) const {
        return (E *)t.data + b * t.stride0 + h * t.stride1 + l0 * t.stride2;
    }
    // Of [B, H, L], at this lane's row of a half.
    PA_DEVICE int64_t at(const AttnParams &p, int half) const {
        return ((int64_t)b * p.H + h) * p.L + l0 + row_of(2 * half);
    }
};

// A tile of scores is accumulators side by side: x[n][i] is row row_of(i), column first + 8 n + column_of(i).
// The functions below take the accumulators of 16 columns, numbered from `column` on.

// To natural units: the scale, and on the prefix the gain of its dropout.
PA_DEVICE void scale_scores(float (&left)[4], float (&right)[4], int column, int prefix, float own, float on_prefix) {
    PA_UNROLL
    for (int i = 0; i < 4; ++i) {
        left[i] *= column + column_of(i) < prefix ? on_prefix : own;
        right[i] *= column + kColumns + column_of(i) < prefix ? on_prefix : own;
    }
}

// Bias i is that of the first column.
PA_DEVICE void add_bias(float (&x)[4], const Bias &bias, int i) {
    const hw::Floats2 two = bias.pair(i + column_of(0));
    PA_UNROLL
    for (int j = 0; j < 4; ++j) x[j] = two.x[j & 1] == kMinusInf ? kMinusInf : x[j] + two.x[j & 1];
}

// What is done to scores after their product: `i` is the first column's place in its tile.
PA_DEVICE void adjust(float (&left)[4], float (&right)[4], int column, int i, const FwdLaunch &p, const Axis &axis,
                      const Bias &bias) {
    if (!p.scores.raw) scale_scores(left, right, column, axis.prefix, p.scale, p.scale * p.drops.gain);
    if (bias.there) {
        add_bias(left, bias, i);
        add_bias(right, bias, i + kColumns);
    }
}

PA_DEVICE void hide(float (&left)[4], float (&right)[4], int column, const int (&limit)[2]) {
    PA_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (column + column_of(i) >= limit[i >> 1]) left[i] = kMinusInf;
        if (column + kColumns + column_of(i) >= limit[i >> 1]) right[i] = kMinusInf;
    }
}

// The largest of a lane's columns, by row.
PA_DEVICE void raise(float (&top)[2], const float (&left)[4], const float (&right)[4]) {
    PA_UNROLL
    for (int i = 0; i < 4; ++i) top[i >> 1] = hw::max(top[i >> 1], hw::max(left[i], right[i]));
}

// What a query's weights are relative to. A weight is exp2(score * factor - shift), one multiply-add; the shift is
// rounded, which is the same factor on all weights of a query, near 1 unless the shift is large.
struct Pivot {
    float top;    // the query's largest score; of a query that sees no key, anything but -inf
    float shift;  // top * factor, or 0 where `top` was subtracted already
};

constexpr float kLargeShift = 1024.f;

PA_DEVICE Pivot pivot_of(float top, float factor) {
    const float pivot = top == kMinusInf ? 0.f : top;
    return {pivot, pivot * factor};
}
// Past 2^31 what rounding leaves of the shift is more than an exponent holds. There the score's difference is taken
// before the product.
PA_DEVICE bool is_large(const Pivot &pivot) { return !(pivot.shift < kLargeShift && pivot.shift > -kLargeShift); }
PA_DEVICE void subtract_top(float (&x)[4], const Pivot (&pivot)[2]) {
    PA_UNROLL
    for (int i = 0; i < 4; ++i) x[i] -= pivot[i >> 1].top;
}

PA_DEVICE float weight_of(float score, float factor, const Pivot &pivot) {
    return hw::exp2(score * factor - pivot.shift);
}

// The scores of 16 columns become weights, which are added to a lane's sums by row.
PA_DEVICE void weigh(float (&left)[4], float (&right)[4], const Pivot (&pivot)[2], float factor, float (&sum)[2]) {
    PA_UNROLL
    for (int i = 0; i < 4; ++i) {
        left[i] = weight_of(left[i], factor, pivot[i >> 1]);
        right[i] = weight_of(right[i], factor, pivot[i >> 1]);
    }
    sum[0] += (left[0] + left[1]) + (right[0] + right[1]);
    sum[1] += (left[2] + left[3]) + (right[2] + right[3]);
}

// The weights that lie on the first `prefix` columns, by row. A pass of its own, so that the products of those who do
// not want it stand in one block.
template <int kGroups>
PA_DEVICE void add_mass(float (&mass)[2], const float (&s)[2 * kGroups][4], const Pivot (&pivot)[2], float factor,
                        int prefix) {
    PA_UNROLL
    for (int n = 0; n < 2 * kGroups; ++n) {
        if (n * kColumns >= prefix) break;
        PA_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float weight = weight_of(s[n][i], factor, pivot[i >> 1]);
            mass[i >> 1] += n * kColumns + column_of(i) < prefix ? weight : 0.f;
        }
    }
}

// The same of scores that are weights already.
template <int kGroups>
PA_DEVICE void add_weights(float (&mass)[2], const float (&w)[2 * kGroups][4], int prefix) {
    PA_UNROLL
    for (int n = 0; n < 2 * kGroups; ++n) {
        PA_UNROLL
        for (int i = 0; i < 4; ++i) mass[i >> 1] += n * kColumns + column_of(i) < prefix ? w[n][i] : 0.f;
    }
}

// Writes lse and mass of 16 queries; sum and mass are a lane's, pivot is the row's. What the sum divides is `inverse`.
PA_DEVICE void finish_sums(const FwdLaunch &p, const Queries &q, const Pivot (&pivot)[2], const float (&sum)[2],
                           const float (&mass)[2], float (&inverse)[2]) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(sum[half]);
        const bool seen = total != 0.f;  // a nan counts as seen and stays one
        inverse[half] = seen ? 1.f / total : 0.f;
        const bool mine = place() == 0 && row_of(2 * half) < q.rows;
        if (p.lse && mine) {
            const float lse = pivot[half].top * p.scores.unit + hw::log2(total) * kLn2;
            hw::store_global((float *)p.lse + q.at(p, half), seen ? lse : kMinusInf);
        }
        if (p.mass) {
            const float on_prefix = quad_sum(mass[half]) * inverse[half];
            if (mine) hw::store_global(p.mass + q.at(p, half), on_prefix);
        }
    }
}

}  // namespace prefixattn::cuda
