// Random inputs of a call, and all of its gradients by sums in double.
#pragma once
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "api/semantics.h"
#include "cuda/hw/hw.h"

namespace prefixattn::cuda {

struct Shape {
    int B = 1, H = 1, Hkv = 1, L = 1, S = 1, T = 1, P = 0;
    bool causal = false, lengths = false, ids = false, dlse = false, packed = false, nan_hidden = false;
    int mask = 0;  // 1: bool, of keys; 2: of q's type, of heads and keys
    double drop = 0;
    float scale = 0.125f;
    int D = 64;
};

constexpr Shape kPlain{.B = 3, .H = 2, .Hkv = 2, .L = 37, .S = 37, .T = 1, .P = 10};

// What both passes are asked with, beside the plain shape and what one of them has alone.
inline std::vector<Shape> features_of_both() {
    std::vector<Shape> s(8, kPlain);
    s[0].H = 4, s[0].causal = true;
    s[1].L = 5, s[1].S = 60, s[1].causal = true;
    s[2].lengths = true, s[2].P = 21;
    s[3].drop = 0.4, s[3].lengths = true;
    s[4].drop = 0.4, s[4].H = 4, s[4].mask = 2;
    s[5].mask = 1, s[5].nan_hidden = true;
    s[6].mask = 2, s[6].H = 4, s[6].causal = true;
    s[7].T = 3, s[7].lengths = true;
    return s;
}

struct alignas(256) Aligned {
    unsigned char bytes[256];
};

// Tensors [n0][n1][n2][D] whose rows lie `row` elements apart.
template <class E>
struct Made {
    std::vector<Aligned> memory;
    size_t bytes = 0;
    Strided strided;
    int D;

    Made() = default;
    Made(int n0, int n1, int n2, int D, int row, float size, std::mt19937 &random) : D(D) {
        const size_t count = (size_t)n0 * (size_t)n1 * (size_t)n2 * (size_t)row;
        bytes = count * 2;
        memory.resize(bytes / 256 + 1);
        std::normal_distribution<float> normal(0.f, size);
        E *data = (E *)memory.data();
        for (size_t i = 0; i < count; ++i) data[i] = hw::from_float<E>(normal(random));
        strided = {data, (int64_t)n1 * n2 * row, (int64_t)n2 * row, row};
    }
    E *row(int64_t i0, int64_t i1, int64_t i2) const {
        return (E *)strided.data + i0 * strided.stride0 + i1 * strided.stride1 + i2 * strided.stride2;
    }
    double at(int64_t i0, int64_t i1, int64_t i2, int d) const { return (double)hw::to_float(row(i0, i1, i2)[d]); }
};

template <class E>
struct Inputs {
    Shape shape;
    Made<E> q, k, v, prefix_k, prefix_v, out, dout, mask_like_q;
    std::vector<int64_t> ids, lengths;
    std::vector<uint8_t> mask_bool;
    std::vector<float> lse, dlse;
    int64_t seed = 12345;

    explicit Inputs(const Shape &s) : shape(s) {
        std::mt19937 random(7);
        const int row = s.packed ? 3 * s.D : s.D;
        q = {s.B, s.H, s.L, s.D, row, 1.f, random};
        k = {s.B, s.Hkv, s.S, s.D, row, 1.f, random};
        v = {s.B, s.Hkv, s.S, s.D, row, 1.f, random};
        prefix_k = {s.T, s.Hkv, s.P, s.D, s.D, 1.f, random};
        prefix_v = {s.T, s.Hkv, s.P, s.D, s.D, 1.f, random};
        out = {s.B, s.H, s.L, s.D, s.D, 1.f, random};
        dout = {s.B, s.H, s.L, s.D, s.D, 1.f, random};
        for (int b = 0; b < s.B; ++b) {
            ids.push_back(b * 7 % 3 % s.T);  // leaves rows unused
            lengths.push_back(s.P - (b * 5 + 3) % (s.P + 1));
        }
        std::uniform_int_distribution<int> third(0, 2);
        mask_bool.resize((size_t)(s.B * s.S));
        for (auto &m : mask_bool) m = third(random) != 0;
        mask_like_q = {s.B, s.H, 1, s.S, s.S, 1.f, random};
        for (int i = 0; s.mask == 2 && i < s.B * s.H * s.S; i += 3)
            ((E *)mask_like_q.strided.data)[i] = hw::from_float<E>(kMinusInf);
        for (int b = 0; s.nan_hidden && b < s.B; ++b)
            for (int j = 0; j < s.S; ++j)
                if (!mask_bool[(size_t)(b * s.S + j)])
                    for (int g = 0; g < s.Hkv; ++g) k.row(b, g, j)[0].bits = v.row(b, g, j)[1].bits = 0x7fff;
        lse.resize((size_t)(s.B * s.H * s.L));
        dlse.resize(lse.size());
        std::normal_distribution<float> normal;
        for (float &x : dlse) x = normal(random);
    }

    BwdParams params() const {
        const Shape &s = shape;
        BwdParams p{};
        p.dtype = std::is_same<E, hw::BF16>::value ? DType::kBFloat16 : DType::kFloat16;
        p.B = s.B, p.H = s.H, p.Hkv = s.Hkv, p.L = s.L, p.S = s.S, p.T = s.T, p.P = s.P, p.D = s.D;
        p.q = q.strided, p.k = k.strided, p.v = v.strided;
        p.prefix_k = prefix_k.strided, p.prefix_v = prefix_v.strided;
        p.prefix_ids = s.ids ? ids.data() : nullptr;
        p.prefix_lengths = s.lengths ? lengths.data() : nullptr;
        if (s.mask == 1) p.mask_kind = MaskKind::kBool, p.mask = {(void *)mask_bool.data(), s.S, 0, 0};
        if (s.mask == 2) p.mask_kind = MaskKind::kSameAsQ, p.mask = mask_like_q.strided, p.mask.stride2 = 0;
        p.mask_stride3 = 1;
        p.scale = s.scale;
        p.causal = s.causal;
        p.prefix_dropout_p = s.drop;
        p.seed = s.drop > 0 ? &seed : nullptr;
        p.out = out.strided, p.dout = dout.strided;
        p.lse = lse.data();
        p.dlse = s.dlse ? dlse.data() : nullptr;
        return p;
    }

    // A kernel may read these, and nothing else.
    void allow() const {
        for (const Made<E> *t : {&q, &k, &v, &prefix_k, &prefix_v, &out, &dout, &mask_like_q})
            host::allow(t->memory.data(), t->bytes, false);
        host::allow(mask_bool.data(), mask_bool.size(), false);
        host::allow(lse.data(), lse.size() * sizeof(float), false);
        host::allow(dlse.data(), dlse.size() * sizeof(float), false);
    }

    const char *name() const {
        static std::string text;
        const Shape &s = shape;
        char buffer[256];
        std::snprintf(buffer, sizeof buffer, "B%d H%d Hkv%d L%d S%d T%d P%d D%d%s%s%s%s%s mask%d drop%g", s.B, s.H,
                      s.Hkv, s.L, s.S, s.T, s.P, s.D, s.causal ? " causal" : "", s.lengths ? " lengths" : "",
                      s.ids ? " ids" : "", s.dlse ? " dlse" : "", s.packed ? " packed" : "", s.mask, s.drop);
        return (text = buffer).c_str();
    }
};

// Also writes out and lse, which a backward is given.
struct Truth {
    std::vector<double> out, dq, dk, dv, dprefix_k, dprefix_v;

    template <class E>
    explicit Truth(const Inputs<E> &x) {
        const Shape &s = x.shape;
        const AttnParams p = x.params();
        const size_t D = (size_t)s.D;
        dq.assign((size_t)(s.B * s.H * s.L) * D, 0);
        dk.assign((size_t)(s.B * s.Hkv * s.S) * D, 0);
        dv = dk;
        dprefix_k.assign((size_t)(s.T * s.Hkv * s.P) * D, 0);
        dprefix_v = dprefix_k;
        for (int b = 0; b < s.B; ++b)
            for (int h = 0; h < s.H; ++h) {
                const int g = h / (s.H / s.Hkv), t = (int)prefix_row(p, b), length = (int)prefix_length(p, b);
                const int keys = length + s.S;
                std::vector<double> K((size_t)keys * D), V(K), kept_k(K.size(), 1), kept_v(K.size(), 1);
                for (int j = 0; j < keys; ++j)
                    for (int d = 0; d < s.D; ++d) {
                        const size_t at = (size_t)j * D + (size_t)d;
                        if (j < length && s.drop > 0) {
                            kept_k[at] = keep(p, j, d, b * s.Hkv + g, kDropsPrefixK);
                            kept_v[at] = keep(p, j, d, b * s.Hkv + g, kDropsPrefixV);
                        }
                        K[at] = (j < length ? x.prefix_k.at(t, g, j, d) : x.k.at(b, g, j - length, d)) * kept_k[at];
                        V[at] = (j < length ? x.prefix_v.at(t, g, j, d) : x.v.at(b, g, j - length, d)) * kept_v[at];
                    }
                for (int l = 0; l < s.L; ++l) {
                    std::vector<double> w((size_t)keys);
                    double top = -1e300, sum = 0;
                    for (int j = 0; j < keys; ++j) {
                        double score = bias(x, b, h, j - length);
                        if (s.causal && j - length > l + s.S - s.L && j >= length) score = -1e300;
                        if (score > -1e299) score += s.scale * dot(x.q.row(b, h, l), &K[(size_t)j * D], s.D);
                        w[(size_t)j] = score;
                        top = std::max(top, score);
                    }
                    for (double &score : w) {
                        score = score <= -1e299 ? 0 : std::exp(score - top);
                        sum += score;
                    }
                    const size_t row = (size_t)((b * s.H + h) * s.L + l);
                    ((std::vector<float> &)x.lse)[row] = sum > 0 ? (float)(top + std::log(sum)) : kMinusInf;
                    std::vector<double> o(D, 0), dp((size_t)keys, 0);
                    for (int j = 0; j < keys; ++j) {
                        if (w[(size_t)j] == 0) continue;
                        w[(size_t)j] /= sum;
                        dp[(size_t)j] = dot(x.dout.row(b, h, l), &V[(size_t)j * D], s.D);
                        for (size_t d = 0; d < D; ++d) o[d] += w[(size_t)j] * V[(size_t)j * D + d];
                    }
                    for (size_t d = 0; d < D; ++d) {
                        E &given = x.out.row(b, h, l)[d];
                        given = hw::from_float<E>((float)o[d]);
                        o[d] = (double)hw::to_float(given);  // delta is of what is given
                    }
                    double delta = dot(x.dout.row(b, h, l), o.data(), s.D);
                    if (s.dlse) delta -= (double)x.dlse[row];
                    for (int j = 0; j < keys; ++j) {
                        if (w[(size_t)j] == 0) continue;
                        const double ds = w[(size_t)j] * (dp[(size_t)j] - delta) * (double)s.scale;
                        const bool own = j >= length;
                        const size_t to = own ? (size_t)((b * s.Hkv + g) * s.S + j - length) * D
                                              : (size_t)((t * s.Hkv + g) * s.P + j) * D;
                        for (int d = 0; d < s.D; ++d) {
                            const size_t at = (size_t)j * D + (size_t)d, e = (size_t)d;
                            dq[row * D + e] += ds * K[at];
                            (own ? dk : dprefix_k)[to + e] += ds * x.q.at(b, h, l, d) * kept_k[at];
                            (own ? dv : dprefix_v)[to + e] += w[(size_t)j] * x.dout.at(b, h, l, d) * kept_v[at];
                        }
                    }
                }
            }
    }

  private:
    static double keep(const AttnParams &p, int row, int d, int head, int draw) {
        const Keep keep(p.prefix_dropout_p);
        const PhiloxWords words = philox4x32(dropout_seed(p), dropout_counter(row, d, head, draw));
        return words.x[dropout_word(d)] >= keep.threshold ? (double)keep.scale : 0.;
    }
    template <class E>
    static double bias(const Inputs<E> &x, int b, int h, int s) {
        if (s < 0 || !x.shape.mask) return 0;
        if (x.shape.mask == 1) return x.mask_bool[(size_t)(b * x.shape.S + s)] ? 0 : -1e300;
        const double value = (double)hw::to_float(x.mask_like_q.row(b, h, 0)[s]);
        return value < -1e30 ? -1e300 : value;
    }
    template <class E>
    static double dot(const E *a, const double *b, int n) {
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += (double)hw::to_float(a[i]) * b[i];
        return sum;
    }
};

}  // namespace prefixattn::cuda
