// The virtual key axis of a sample, prefix rows first and own keys after them without a gap, as its tiles are read into
// shared memory; and what hides a key.
#pragma once
#include "cuda/attention/params.h"
#include "cuda/attention/tiles.h"

namespace prefixattn::cuda {

struct Axis {
    int prefix;  // rows of the prefix in use
    int end;     // of the axis: those and S
    int offset;  // under causality query l sees columns below prefix + l + offset + 1
    bool causal;

    PA_DEVICE Axis(const AttnParams &p, int b) : Axis(p, (int)prefix_length(p, b), p.causal) {}
    // of every sample, if there are neither lengths nor causality
    PA_DEVICE static Axis of_all(const AttnParams &p) { return {p, (int)p.P, false}; }

    // Columns from here on are hidden from query l; never before the end of the prefix.
    PA_DEVICE int seen(int l) const {
        if (!causal) return end;
        const int last = prefix + (l + offset + 1 > 0 ? l + offset + 1 : 0);
        return last < end ? last : end;
    }

  private:
    PA_DEVICE Axis(const AttnParams &p, int prefix_rows, bool is_causal)
        : prefix(prefix_rows), end(prefix + (int)p.S), offset((int)causal_offset(p)), causal(is_causal) {}
};

// Keys or values of one sample and key head.
template <class E>
struct KeyRows {
    const E *own, *prefix;
    int64_t stride_own, stride_prefix;

    // row: prefix_row(p, b)
    PA_DEVICE KeyRows(const Strided &own_rows, const Strided &prefix_rows, int b, int row, int g)
        : own((const E *)own_rows.data + b * own_rows.stride0 + g * own_rows.stride1),
          prefix((const E *)prefix_rows.data + row * prefix_rows.stride0 + g * prefix_rows.stride1),
          stride_own(own_rows.stride2),
          stride_prefix(prefix_rows.stride2) {}
    PA_DEVICE KeyRows(const AttnParams &p, const Strided &own_rows, const Strided &prefix_rows, int b, int g)
        : KeyRows(own_rows, prefix_rows, b, (int)prefix_row(p, b), g) {}
};

// What padding does to the columns of a tile: a float each, added to the score; -inf hides.
struct Bias {
    hw::Shared at;
    bool there;

    PA_HOST_DEVICE static constexpr int bytes(int columns) { return columns * 4; }
    PA_DEVICE bool visible(int i, hw::Here here = hw::here()) const {
        return !there || hw::load_shared<float>(at + 4 * i, here) != kMinusInf;
    }
    // of columns i and i + 1, i even
    PA_DEVICE hw::Floats2 pair(int i) const { return hw::load_shared<hw::Floats2>(at + 4 * i); }
};

// What the padding mask of sample b and query head h adds to a column; 0 where it has none. E is that of q.
template <class E>
PA_DEVICE float mask_at(const AttnParams &p, const Axis &axis, int b, int h, int column) {
    if (column < axis.prefix || column >= axis.end) return 0.f;
    const int64_t at = b * p.mask.stride0 + h * p.mask.stride1 + (column - axis.prefix) * p.mask_stride3;
    if (p.mask_kind == MaskKind::kBool) return mask_term(hw::load_global((const uint8_t *)p.mask.data + at) != 0);
    if (p.mask_kind == MaskKind::kFloat32) return mask_term(hw::load_global((const float *)p.mask.data + at));
    return mask_term(hw::to_float(hw::load_global((const E *)p.mask.data + at)));
}

// Rows begin .. end of a tile, by kThreads threads: row r is row r - begin from `from` on. What padding hides is zeros
// and is not read.
template <int kThreads, int D, class E>
PA_DEVICE void copy_rows(const Tile<D> &to, int begin, int end, const E *from, int64_t stride, const Bias &bias) {
    constexpr int kPieces = Tile<D>::kPieces, kRows = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && kRows % 8 == 0, "the swizzle of a thread's rows is one");
    const int piece = hw::thread() % kPieces;
    int row = begin + hw::thread() / kPieces;
    const E *at = row_at(from, row - begin, stride) + piece * kPiece;
    hw::Shared there = to.piece(row, piece);
    PA_NO_UNROLL
    for (; row < end; row += kRows) {
        hw::copy_async16(there, at, bias.visible(row));
        at = row_at(at, kRows, stride);
        there = there + kRows * Tile<D>::kRowBytes;
    }
}

// The same rows as zeros; `any` is some address.
template <int kThreads, int D>
PA_DEVICE void zero_rows(const Tile<D> &to, int begin, int end, const void *any) {
    constexpr int kPieces = Tile<D>::kPieces;
    PA_NO_UNROLL
    for (int row = begin + hw::thread() / kPieces; row < end; row += kThreads / kPieces)
        hw::copy_async16(to.piece(row, hw::thread() % kPieces), any, false);
}

PA_DEVICE int clamp(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

// Columns first .. first + kRows into a tile. Rows past the end, and those that padding hides, are zeros: what is
// hidden has weight 0, and may hold a nan.
template <int kRows, int kThreads, int D, class E>
PA_DEVICE void copy_keys(const Tile<D> &to, const KeyRows<E> &keys, const Axis &axis, int first, const Bias &bias) {
    const int on_prefix = clamp(axis.prefix - first, kRows), there = clamp(axis.end - first, kRows);
    const E *own = row_at(keys.own, first + on_prefix - axis.prefix, keys.stride_own);
    if (on_prefix > 0)
        copy_rows<kThreads>(to, 0, on_prefix, row_at(keys.prefix, first, keys.stride_prefix), keys.stride_prefix, bias);
    copy_rows<kThreads>(to, on_prefix, there, own, keys.stride_own, bias);
    if (there < kRows) zero_rows<kThreads>(to, there, kRows, own);
}

// Prefix dropout: bit i says whether element 4 * four + i of a prefix row is kept. draw: kDropsPrefixK or
// kDropsPrefixV; head: b * Hkv + g.
PA_DEVICE uint32_t kept_four(uint64_t seed, uint32_t threshold, int row, int four, int64_t head, int draw) {
    const PhiloxWords drawn = philox4x32(seed, dropout_counter(row, 4 * four, head, draw));
    uint32_t bits = 0;
    PA_UNROLL
    for (int i = 0; i < 4; ++i) bits |= (drawn.x[i] >= threshold ? 1u : 0u) << i;
    return bits;
}

// Zeros in a tile of columns from `first` on what dropout takes from the prefix; the gain enters scores and weights.
// A barrier before and after it is the caller's.
template <int kRows, int kThreads, int D>
PA_DEVICE void drop_prefix(const Tile<D> &tile, const Axis &axis, int first, uint64_t seed, uint32_t threshold,
                           int64_t head, int draw) {
    const int rows = axis.prefix - first < kRows ? axis.prefix - first : kRows;
    PA_NO_UNROLL
    for (int i = hw::thread(); i < rows * (D / 4); i += kThreads) {
        const int row = i / (D / 4), four = i % (D / 4);
        const uint32_t bits = kept_four(seed, threshold, first + row, four, head, draw);
        const hw::Shared at = tile.element(row, 4 * four);
        hw::Words2 x = hw::load_shared<hw::Words2>(at);
        PA_UNROLL
        for (int j = 0; j < 2; ++j) {
            const uint32_t two = bits >> (2 * j);
            x.x[j] &= (two & 1 ? 0xffffu : 0u) | (two & 2 ? 0xffff0000u : 0u);
        }
        hw::store_shared(at, x);
    }
}

}  // namespace prefixattn::cuda
