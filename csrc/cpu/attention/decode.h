// Forward of one query a head: decoding. A vector of queries would be one query and padding, so here vectors run along
// the head size. A unit is one key head of a sample with all the query heads that share it: each key and value is
// fetched once. Without dropout and memory.
#pragma once
#include "cpu/attention/dot.h"
#include "cpu/attention/lse.h"
#include "cpu/attention/operands.h"
#include "cpu/parallel.h"

namespace prefixattn {
namespace PA_ISA {

template <class Storage>
class Decode {
    static constexpr int kKeys = 64;  // of a block: a multiple of VL; its keys and values stay in L1
    static constexpr int64_t kSize = sizeof(Storage);

  public:
    static void run(const CpuFwdParams &p, int threads) {
        parallel_for(p.B * p.Hkv, threads, unit, const_cast<CpuFwdParams *>(&p));
    }

  private:
    struct Head {
        float *query, *acc;  // [D]
        float *weights;      // [kKeys], scores before
        float max, sum[2];   // own, prefix
    };

    static void unit(void *context, int64_t unit) {
        const auto &whole = *(const CpuFwdParams *)context;
        const CpuFwdParams p = sample_of(whole, unit / whole.Hkv);
        if (p.L == 0) return;
        const int64_t bytes = Decode(p, unit, Arena::counting()).arena_.used();
        Decode(p, unit, Arena(thread_scratch(bytes))).work();
    }

    Decode(const CpuFwdParams &p, int64_t unit, Arena arena)
        : p_(p), b_(unit / p.Hkv), g_(unit % p.Hkv), D_((int)p.D), heads_((int)(p.H / p.Hkv)), arena_(arena) {
        rows_ = arena_.take<Head>(heads_);
        queries_ = arena_.take<float>((int64_t)heads_ * D_);
        accs_ = arena_.take<float>((int64_t)heads_ * D_);
        weights_ = arena_.take<float>((int64_t)heads_ * kKeys);
    }

    void work() {
        for (int i = 0; i < heads_; ++i) {
            Head &x = rows_[i];
            x = {queries_ + (int64_t)i * D_, accs_ + (int64_t)i * D_, weights_ + (int64_t)i * kKeys, kMinusInf, {0, 0}};
            widen((const Storage *)at(p_.q, b_, head(i), 0, kSize), x.query, D_);
            std::memset(x.acc, 0, sizeof(float) * D_);
        }
        const int64_t row = prefix_row(p_, b_), length = prefix_length(p_, b_);
        const QueryBlock q{0, 1, 1};
        const Range prefix = seen_keys(prefix_band(p_, length), {0, length}, q);
        for (int64_t p0 = prefix.begin; p0 < length; p0 += kKeys)
            block(at(p_.prefix_k, row, g_, p0, kSize), p_.prefix_k.stride2, at(p_.prefix_v, row, g_, p0, kSize),
                  p_.prefix_v.stride2, (int)min_of<int64_t>(kKeys, length - p0), -1);
        const bool shared = p_.mask.stride1 == 0;  // by all heads
        const Range own = seen_keys(own_band(p_), shared ? padded_range(p_, b_, 0) : Range{0, p_.S}, q);
        for (int64_t s0 = own.begin; s0 < own.end; s0 += kKeys)
            block(at(p_.k, b_, g_, s0, kSize), p_.k.stride2, at(p_.v, b_, g_, s0, kSize), p_.v.stride2,
                  (int)min_of<int64_t>(kKeys, own.end - s0), s0);
        for (int i = 0; i < heads_; ++i) store(head(i), rows_[i]);
    }

    int64_t head(int i) const { return g_ * heads_ + i; }

    // n keys and values, whose rows are so many elements apart; s0: the first own key, or -1 for the prefix.
    void block(const char *k, int64_t k_stride, const char *v, int64_t v_stride, int n, int64_t s0) {
        for (int i = 0; i < heads_; ++i) {
            for (int r = 0; r < n; r += VL)
                vstore(rows_[i].weights + r, dot_keys<Storage>(rows_[i].query, k + r * k_stride * kSize,
                                                               k_stride * kSize, min_of(VL, n - r), D_));
            finish_scores(head(i), rows_[i], n, s0);
            softmax(rows_[i], n, s0 < 0);
            int d = 0;
            for (; d + 4 * VL <= D_; d += 4 * VL) accumulate<4>(rows_[i], (const Storage *)v + d, v_stride, n, d);
            for (; d < D_; d += VL) accumulate<1>(rows_[i], (const Storage *)v + d, v_stride, n, d);
        }
    }

    void finish_scores(int64_t h, Head &x, int n, int64_t s0) {
        const int padded = (n + VL - 1) / VL * VL;
        if (p_.softcap > 0)
            cap_scores(x.weights, padded, p_.scale, p_.softcap, nullptr);
        else
            for (int r = 0; r < padded; r += VL) vstore(x.weights + r, vload(x.weights + r) * vset(p_.scale));
        if (s0 >= 0 && p_.mask_kind != MaskKind::kNone) {
            const int64_t size = mask_element(p_);
            const char *mask = at(p_.mask, b_, h, 0, size) + s0 * p_.mask_stride3 * size;
            for (int r = 0; r < n; ++r) {
                const float value = mask_value(p_, mask + r * p_.mask_stride3 * size);
                x.weights[r] = value == kMinusInf ? kMinusInf : x.weights[r] + value;  // a nan that is hidden is gone
            }
        }
        for (int r = n; r < padded; ++r) x.weights[r] = kMinusInf;
    }

    void softmax(Head &x, int n, bool prefix) {
        vf most = vset(x.max);
        for (int r = 0; r < n; r += VL) most = vmax(most, vload(x.weights + r));
        alignas(64) float lanes[VL];
        vstore(lanes, most);
        float highest = lanes[0];
        for (int i = 1; i < VL; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
        const float pivot = max_of(highest, -0x1p126f);  // a query that has met no key: -inf - -inf is nan
        if (highest > x.max && x.max != kMinusInf) {
            vstore(lanes, vexp(vset(x.max - pivot)));
            for (float &sum : x.sum) sum *= lanes[0];
            for (int d = 0; d < D_; d += VL) vstore(x.acc + d, vload(x.acc + d) * vset(lanes[0]));
        }
        x.max = highest;
        vf sum = vzero();
        for (int r = 0; r < n; r += VL) {
            const vf weight = vexp(vload(x.weights + r) - vset(pivot));
            vstore(x.weights + r, weight);
            sum = sum + weight;
        }
        x.sum[prefix] += vsum(sum);
    }

    template <int NV>
    void accumulate(Head &x, const Storage *v, int64_t stride, int n, int d0) {
        vf acc[NV];
        for (int c = 0; c < NV; ++c) acc[c] = vzero();
        for (int r = 0; r < n; ++r) {
            const vf weight = vset(x.weights[r]);
#pragma GCC unroll 4
            for (int c = 0; c < NV; ++c) acc[c] = vfma(weight, vload_as(v + r * stride + c * VL), acc[c]);
        }
        for (int c = 0; c < NV; ++c) {
            float *to = x.acc + d0 + c * VL;
            vstore(to, vload(to) + acc[c]);
        }
    }

    void store(int64_t h, Head &x) {
        const float sum = x.sum[0] + x.sum[1], inverse = sum != 0 ? 1 / sum : 0;  // a nan stays one
        const int64_t row = first_row(p_, b_, h);
        ((Lse<Storage> *)p_.lse)[row] = log_of_sum<Storage>(x.max, sum);
        if (p_.mass) p_.mass[row] = x.sum[1] * inverse;
        for (int d = 0; d < D_; d += VL) vstore(x.acc + d, vload(x.acc + d) * vset(inverse));
        narrow(x.acc, (Storage *)at(p_.out, b_, h, 0, kSize), D_);
    }

    const CpuFwdParams &p_;
    const int64_t b_, g_;
    const int D_, heads_;
    Arena arena_;
    Head *rows_;
    float *queries_, *accs_, *weights_;
};

}  // namespace PA_ISA
}  // namespace prefixattn
