// Masks of own keys: which they leave visible, and what they add to a tile of scores.
#pragma once
#include "cpu/attention/geometry.h"
#include "cpu/pack.h"

namespace prefixattn {
namespace PA_ISA {

// What the mask adds to a score, read where it lies.
inline float mask_value(const AttnParams &p, const char *x) {
    if (p.mask_kind == MaskKind::kBool) return mask_term(*x != 0);
    float value;
    if (p.mask_kind == MaskKind::kFloat32 || p.dtype == DType::kFloat32)
        std::memcpy(&value, x, 4);
    else
        value = p.dtype == DType::kBFloat16 ? to_float(*(const bf16 *)x) : to_float(*(const f16 *)x);
    return mask_term(value);
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

// Masks of own keys, added to scores S [rows][width] of keys s0 .. s0 + n.
class Masker {
  public:
    static int64_t scratch_floats(const AttnParams &p, int rows) {
        return p.mask_kind == MaskKind::kNone || is_key_padding(p) ? 0 : (int64_t)2 * (rows + 16) * kLanes;
    }

    Masker(const AttnParams &p, int64_t b, int64_t h, float *scratch)
        : p_(p), scratch_(scratch), size_(mask_element(p)) {
        if (p.mask_kind != MaskKind::kNone) base_ = at(p.mask, b, h, 0, size_);
    }

    void apply(const QueryBlock &q, const Strips &strips, int64_t s0, int n, float *S) const {
        if (base_ && is_key_padding(p_))
            padding(q, s0, n, S);
        else if (base_)
            general(q, s0, n, S);
        hide(q, strips, n, S);
    }

    // Of scores S [n][width] those of queries that do not see the key: too early, or past its window.
    static void hide(const QueryBlock &q, const Strips &strips, int n, float *S) {
        for (int r = strips.first_diagonal(); r < n; ++r) {
            float *row = S + (int64_t)r * q.width;
            const int hidden = strips.first_lane(r);
            int i = 0;
            for (; i + VL <= hidden; i += VL) vstore(row + i, vset(kMinusInf));
            if (i < hidden) vstore(row + i, vmasked(vload(row + i), vhide_first(hidden - i)));
        }
        for (int r = 0; r < strips.end_passed(); ++r) {
            float *row = S + (int64_t)r * q.width;
            int i = strips.end_lane(r);
            for (; i % VL; ++i) row[i] = kMinusInf;
            for (; i < q.width; i += VL) vstore(row + i, vset(kMinusInf));
        }
    }

  private:
    void padding(const QueryBlock &q, int64_t s0, int n, float *S) const {
        for (int r = 0; r < n; ++r) {
            const float bias = mask_value(p_, base_ + (s0 + r) * p_.mask_stride3 * size_);
            if (bias == 0) continue;
            for (int i = 0; i < q.width; i += VL)
                vstore(S + (int64_t)r * q.width + i, vmasked(vload(S + (int64_t)r * q.width + i), vset(bias)));
        }
    }

    void general(const QueryBlock &q, int64_t s0, int n, float *S) const {
        const int ld = (n + 15) / 16 * 16;
        float *tile = scratch_, *turned = scratch_ + (int64_t)ld * kLanes;
        for (int i = 0; i < q.lanes; ++i) {
            const char *row = base_ + ((q.l0 + i) * p_.mask.stride2 + s0 * p_.mask_stride3) * size_;
            float *dst = tile + (int64_t)i * ld;
            if (p_.mask_kind == MaskKind::kBool && p_.mask_stride3 == 1)
                for (int r = 0; r < n; ++r) dst[r] = mask_term(row[r] != 0);
            else
                for (int r = 0; r < n; ++r) dst[r] = mask_value(p_, row + r * p_.mask_stride3 * size_);
        }
        // a nan that an earlier call left would be one of every lane's that is summed with
        std::memset(tile + (int64_t)q.lanes * ld, 0, sizeof(float) * (q.width - q.lanes) * ld);
        transpose(tile, 4 * ld, q.width, n, turned, q.width);
        for (int64_t i = 0; i < (int64_t)n * q.width; i += VL) vstore(S + i, vmasked(vload(S + i), vload(turned + i)));
    }

    const AttnParams &p_;
    float *scratch_;
    int64_t size_;
    const char *base_ = nullptr;
};

}  // namespace PA_ISA
}  // namespace prefixattn
