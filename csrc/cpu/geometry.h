// Which queries and keys a piece of work covers. Scores are kept transposed, a key to a row and a query to a lane:
// softmax then runs down the lanes, and keys and values are operands that need no packing.
#pragma once
#include <type_traits>

#include "../prefix_attn.h"
#include "gemm.h"
#include "pack.h"

namespace prefixattn {
namespace PA_ISA {

constexpr int kStrip = 16;  // keys of a strip on the causal diagonal

struct QueryBlock {
    int64_t l0;  // first query
    int lanes;   // queries
    int width;   // lanes rounded up to vectors: the row stride of everything transposed
};

inline int64_t query_blocks(int64_t L) { return (((L + VL - 1) / VL) * VL + kLanes - 1) / kLanes; }

// Blocks differ by at most one vector: 197 queries are 64 + 48 + 48 + 37, not 64 + 64 + 64 + 5.
inline QueryBlock query_block(int64_t L, int64_t i) {
    const int64_t vectors = (L + VL - 1) / VL, n = query_blocks(L);
    const int64_t v0 = (vectors * i + n - 1) / n, v1 = (vectors * (i + 1) + n - 1) / n;
    const int64_t end = v1 * VL < L ? v1 * VL : L;
    return {v0 * VL, (int)(end - v0 * VL), (int)((v1 - v0) * VL)};
}

struct Range {
    int64_t begin, end;
};

template <class X>
inline X min_of(X a, X b) {
    return a < b ? a : b;
}
template <class X>
inline X max_of(X a, X b) {
    return a > b ? a : b;
}

inline const char *at(const Strided &t, int64_t i0, int64_t i1, int64_t i2, int64_t element) {
    return (const char *)t.data + (i0 * t.stride0 + i1 * t.stride1 + i2 * t.stride2) * element;
}

inline int64_t prefix_row(const AttnParams &p, int64_t b) { return p.rows ? p.rows[b] : p.T == 1 ? 0 : b; }
inline int64_t memory_row(const AttnParams &p, int64_t b) { return p.memories == 1 ? 0 : prefix_row(p, b); }
inline int64_t prefix_length(const AttnParams &p, int64_t b) { return p.lengths ? p.lengths[b] : p.P; }
inline uint64_t dropout_seed(const AttnParams &p) { return p.seed ? (uint64_t)*p.seed : 0; }

inline int64_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }
inline int64_t mask_element(const AttnParams &p) {
    return p.mask_kind == MaskKind::kBool ? 1 : p.mask_kind == MaskKind::kFloat32 ? 4 : element_size(p.dtype);
}
inline bool is_key_padding(const AttnParams &p) { return p.mask_kind != MaskKind::kNone && p.mask.stride2 == 0; }

// A float mask is added to scaled scores, in its own units.
inline bool has_float_mask(const AttnParams &p) {
    return p.mask_kind == MaskKind::kSameAsQ || p.mask_kind == MaskKind::kFloat32;
}

constexpr float kHidden = -1e37f;  // a mask value from here down hides its key as -inf does

// What the mask adds to a score; bool: True attends.
inline float mask_value(const AttnParams &p, const char *x) {
    if (p.mask_kind == MaskKind::kBool) return *x ? 0.f : kMinusInf;
    float value;
    if (p.mask_kind == MaskKind::kFloat32 || p.dtype == DType::kFloat32)
        std::memcpy(&value, x, 4);
    else
        value = p.dtype == DType::kBFloat16 ? to_float(*(const bf16 *)x) : to_float(*(const f16 *)x);
    return value <= kHidden ? kMinusInf : value;
}

// Own keys from the first to the last that padding leaves visible.
inline Range padded_range(const AttnParams &p, int64_t b, int64_t h) {
    Range r{0, p.S};
    if (!is_key_padding(p)) return r;
    const int64_t size = mask_element(p);
    const char *m = at(p.mask, b, h, 0, size);
    const auto hidden = [&](int64_t s) { return mask_value(p, m + s * p.mask_stride3 * size) == kMinusInf; };
    while (r.end > 0 && hidden(r.end - 1)) --r.end;
    while (r.begin < r.end && hidden(r.begin)) ++r.begin;
    return r;
}

// Own keys that some query of the block sees.
inline Range visible_keys(const AttnParams &p, Range padded, const QueryBlock &q) {
    Range r = padded;
    if (p.causal) r.end = min_of(r.end, q.l0 + q.lanes + p.S - p.L);
    r.end = max_of(r.begin, r.end);
    return r;
}

// Own keys s0 .. s0 + n in strips: the first is seen by the whole block, those on the diagonal lack their first `skip`
// lanes altogether (and may need single lanes hidden). Where a strip begins depends on its keys alone, not on s0: the
// order in which a product sums depends on how many lanes it has, and both passes must compute the same score.
struct Strips {
    // Key s is visible to query l iff s <= l + offset. align: strips begin at a multiple of so many rows.
    Strips(bool causal, int64_t offset, const QueryBlock &q, int64_t s0, int n, int align)
        : n_(n), align_(align), diagonal_(causal ? q.l0 + offset - s0 : n) {}  // row seen by lanes >= row - diagonal
    template <class F>
    void each(F f) const {  // f(first row, rows, lanes to skip)
        for (int r = 0; r < n_;) {
            const int64_t strip = r > diagonal_ ? (r - diagonal_) / kStrip : 0;
            const int64_t next = (diagonal_ + (strip + 1) * kStrip + align_ - 1) / align_ * align_;
            const int rows = (int)min_of<int64_t>(n_, next) - r;
            f(r, rows, (int)(strip * kStrip));
            r += rows;
        }
    }
    int first_hidden_row() const { return (int)max_of<int64_t>(0, min_of<int64_t>(n_, diagonal_ + 1)); }
    int hidden_lanes(int row) const { return (int)max_of<int64_t>(0, row - diagonal_); }

  private:
    int n_, align_;
    int64_t diagonal_;
};

// Calls whose forward is prefix_attn_decode.h's, so that the backward computes scores as it does.
inline bool one_query(const AttnParams &p) {
    return p.L == 1 && p.D % VL == 0 && p.dropout_p == 0 && p.prefix_dropout_p == 0 && !p.memory.data;
}

// What lse is rounded by, all weights of its query err by, in the backward: of floats it is kept to twice their digits.
template <class Storage>
using Lse = std::conditional_t<sizeof(Storage) == 4, double, float>;

template <class Storage>
Lse<Storage> log_of_sum(float max, float sum) {
    return sum != 0 ? (Lse<Storage>)(max + __builtin_log((double)sum)) : (Lse<Storage>)kMinusInf;
}

}  // namespace PA_ISA
}  // namespace prefixattn
