// Where the sums of bwd_key_side.h go: own keys' gradients in their type, the prefix's as partial sums in float32,
// which the last block of a head adds in a fixed order.
#pragma once
#include "cuda/attention/bwd_key_side.h"

namespace prefixattn::cuda {

// 16 rows of accumulators, times a factor, rounded to E: those of rows begin .. end, row 0 of which is at `to`.
template <class E, int D>
PA_DEVICE void store_some_rows(E *to, int64_t stride, int row0, int begin, int end, const float (&c)[D / kColumns][4],
                               float factor) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + row_of(2 * half);
        PA_UNROLL
        for (int i = 0; i < D / 32; ++i) {
            hw::Words4 words;
            PA_UNROLL
            for (int j = 0; j < 4; ++j)
                words.x[j] = hw::pack<E>(c[4 * i + j][2 * half] * factor, c[4 * i + j][2 * half + 1] * factor);
            quad_transpose(words.x);
            if (row >= begin && row < end) hw::store_global((hw::Words4 *)(to + row * stride) + place() + 4 * i, words);
        }
    }
}

// Own keys' gradients. The column after the prefix is own key s0.
template <class E, int D, int kTiles, int kUnit>
PA_DEVICE void store_own(const BwdLaunch &p, const KeySide<E, D, kTiles, kUnit> &side, const Axis &axis, int b, int g,
                         int s0) {
    PA_UNROLL
    for (int i = 0; i < kTiles; ++i) {
        const int row0 = side.row0(i);
        if (row0 >= axis.end || row0 + kStep <= axis.prefix) continue;
        if (p.dk.data)
            store_some_rows<E, D>((E *)tensor_row<E>(p.dk, b, g, s0) - axis.prefix * p.dk.stride2, p.dk.stride2, row0,
                                  axis.prefix, axis.end, side.dk[i], p.scale);
        if (p.dv.data)
            store_some_rows<E, D>((E *)tensor_row<E>(p.dv, b, g, s0) - axis.prefix * p.dv.stride2, p.dv.stride2, row0,
                                  axis.prefix, axis.end, side.dv[i], 1.f);
    }
}

// Where a sum over some of a prefix row's samples is kept.
PA_DEVICE float *partial_rows(const BwdLaunch &p, int slot, int g, int which) {
    return p.partial + (((int64_t)slot * p.Hkv + g) * 2 + which) * p.P * p.D;
}

struct PrefixTarget {
    int t, g, slot;
    int row0;    // the prefix row at column 0
    int sample;  // whose dropout it is
    bool adds;   // to what the slot holds
};

// Which of a lane's elements of a prefix row dropout keeps: bits 2 j and 2 j + 1 of block j.
template <int D>
PA_DEVICE uint32_t kept_of_row(const BwdLaunch &p, const PrefixTarget &to, int which, int row) {
    if (!p.drops.threshold) return ~0u;
    const int draw = which ? kDropsPrefixV : kDropsPrefixK;
    const int64_t head = (int64_t)to.sample * p.Hkv + to.g;
    uint32_t kept = 0;
    PA_NO_UNROLL
    for (int j = 0; j < D / kColumns; ++j) {
        const int d = j * kColumns + column_of(0);
        kept |= (kept_four(dropout_seed(p), p.drops.threshold, row, d / 4, head, draw) >> (d & 2) & 3) << 2 * j;
    }
    return kept;
}

// A lane's elements of a prefix row's gradient: rows row_of(2 * half) of accumulators.
template <class E, int D>
PA_DEVICE void put_prefix(const BwdLaunch &p, const PrefixTarget &to, int which, int row, int half,
                          const float (&c)[D / kColumns][4], float factor) {
    const uint32_t kept = kept_of_row<D>(p, to, which, row);
    const Strided &grad = which ? p.dprefix_v : p.dprefix_k;
    auto *out = (uint32_t *)tensor_row<E>(grad, to.t, to.g, row) + place();
    auto *sum = (hw::Floats2 *)(partial_rows(p, to.slot, to.g, which) + (int64_t)row * D) + place();
    PA_UNROLL
    for (int j = 0; j < D / kColumns; ++j) {
        float x = kept >> 2 * j & 1 ? c[j][2 * half] * factor : 0.f;
        float y = kept >> 2 * j & 2 ? c[j][2 * half + 1] * factor : 0.f;
        if (p.direct) {
            hw::store_global(out + j * (kColumns / 2), hw::pack<E>(x, y));
            continue;
        }
        if (to.adds) {
            const hw::Floats2 before = hw::load_global(sum + j * (kColumns / 2));
            x += before.x[0];
            y += before.x[1];
        }
        hw::store_global(sum + j * (kColumns / 2), hw::Floats2{{x, y}});
    }
}

// The sums of columns below `end`, all of which are of the prefix.
template <class E, int D, int kTiles, int kUnit>
PA_DEVICE void leave_prefix(const BwdLaunch &p, const KeySide<E, D, kTiles, kUnit> &side, int end,
                            const PrefixTarget &to) {
    PA_UNROLL
    for (int i = 0; i < kTiles; ++i) {
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int column = side.row0(i) + row_of(2 * half);
            if (column >= end) continue;
            if (p.dprefix_k.data) put_prefix<E, D>(p, to, 0, to.row0 + column, half, side.dk[i], p.scale);
            if (p.dprefix_v.data) put_prefix<E, D>(p, to, 1, to.row0 + column, half, side.dv[i], 1.f);
        }
    }
}

// Zeros in rows begin .. end of the prefix's gradient, or of a slot.
template <class E, int kThreads>
PA_DEVICE void clear_prefix(const BwdLaunch &p, int t, int g, int slot, int begin, int end) {
    const int pairs = (int)p.D / 2;
    PA_NO_UNROLL
    for (int i = hw::thread(); i < (end - begin) * pairs; i += kThreads) {
        const int row = begin + i / pairs, d = 2 * (i % pairs);
        PA_UNROLL
        for (int which = 0; which < 2; ++which) {
            const Strided &grad = which ? p.dprefix_v : p.dprefix_k;
            if (!grad.data) continue;
            if (p.direct)
                hw::store_global((uint32_t *)(tensor_row<E>(grad, t, g, row) + d), 0u);
            else
                hw::store_global((hw::Floats2 *)(partial_rows(p, slot, g, which) + (int64_t)row * p.D + d),
                                 hw::Floats2{{0.f, 0.f}});
        }
    }
}

// How many blocks leave a sum of row t of the bank.
PA_DEVICE int arrivals(const BwdLaunch &p, int t, int blocks_a_sample) {
    if (p.T == 1) return p.runs;
    int samples = 0;
    PA_NO_UNROLL
    for (int b = 0; b < (int)p.B; ++b) samples += prefix_row(p, b) == t;
    return samples * blocks_a_sample;
}

// The block has left its sum. The last one adds them all, in the order of their slots: rows begin .. end of row t.
template <class E, int kThreads>
PA_DEVICE void sum_if_last(const BwdLaunch &p, int t, int g, int chunk, int begin, int end, int blocks_a_sample,
                           hw::Shared flag) {
    hw::fence_device();
    hw::sync_block();
    if (hw::thread() == 0) {
        uint32_t *counter = p.tickets + ((int64_t)chunk * p.T + t) * p.Hkv + g;
        const bool last = (int)hw::ticket(counter) + 1 == arrivals(p, t, blocks_a_sample);
        hw::store_shared(flag, last ? 1u : 0u);
    }
    hw::sync_block();
    if (!hw::load_shared<uint32_t>(flag)) return;
    hw::fence_device();
    const int fours = (int)p.D / 4;
    PA_NO_UNROLL
    for (int i = hw::thread(); i < 2 * (end - begin) * fours; i += kThreads) {
        const int which = i / ((end - begin) * fours), at = i - which * (end - begin) * fours;
        const int row = begin + at / fours, d = at % fours * 4;
        const Strided &grad = which ? p.dprefix_v : p.dprefix_k;
        if (!grad.data) continue;
        float sum[4] = {};
        const auto add = [&](int slot) {
            const float *from = partial_rows(p, slot, g, which) + (int64_t)row * p.D + d;
            const auto x = hw::load_global_fresh((const hw::Floats4 *)from);
            PA_UNROLL
            for (int c = 0; c < 4; ++c) sum[c] += x.x[c];
        };
        if (p.T == 1) {
            for (int slot = 0; slot < p.slots; ++slot) add(slot);
        } else {
            PA_NO_UNROLL
            for (int b = 0; b < (int)p.B; ++b) {
                if (prefix_row(p, b) != t || row >= prefix_length(p, b)) continue;
                for (int slot = 0; slot < p.slots; ++slot) add(b * p.slots + slot);
            }
        }
        hw::store_global((hw::Words2 *)(tensor_row<E>(grad, t, g, row) + d),
                         hw::Words2{{hw::pack<E>(sum[0], sum[1]), hw::pack<E>(sum[2], sum[3])}});
    }
}

}  // namespace prefixattn::cuda
