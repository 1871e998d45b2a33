// Forward: a unit of work is one (sample, head, block of queries); online softmax over blocks of keys, prefix first.
#pragma once
#include "cpu/attention/lse.h"
#include "cpu/attention/operands.h"
#include "cpu/parallel.h"

namespace prefixattn {
namespace PA_ISA {

template <class Storage, class Dot>
class Forward {
    using Ops = Operands<Storage, Dot>;
    using Rows = typename Ops::Rows;
    using Columns = typename Ops::Columns;
    static constexpr int kKeys = 128;  // keys of a block: its scores (32 KB) stay in L1

  public:
    static void run(const CpuFwdParams &p, int threads) {
        if (p.L == 0) return;
        // What prefix dropout keeps is drawn once for all queries of a head, if there are heads enough to go round.
        const bool heads = p.prefix_dropout_p > 0 && p.B * p.H >= 4 * threads;
        Job job{p, heads ? query_blocks(p.L) : 1};
        parallel_for(p.B * p.H * (query_blocks(p.L) / job.blocks), threads, unit, &job);
    }

  private:
    static constexpr int64_t kKeptRows = 1024;  // most rows of a prefix whose dropout is drawn ahead

    struct Job {
        const CpuFwdParams &p;
        int64_t blocks;  // of a unit
    };

    static void unit(void *context, int64_t unit) {
        const Job &job = *(const Job *)context;
        const int64_t n = job.blocks, first = unit * n, blocks = query_blocks(job.p.L), bh = first / blocks;
        const CpuFwdParams p = sample_of(job.p, bh / job.p.H);
        const int64_t begin = first % blocks, end = min_of(begin + n, query_blocks(p.L));
        if (begin >= end) return;  // of a packed sequence with fewer queries than the longest, or none
        KeptPrefix kept;
        Arena counted = Arena::counting();
        allocate_kept(p, counted, kept);
        const int64_t bytes = Forward(p, 0, 0, counted, kept).arena_.used();
        Arena arena(thread_scratch(bytes));
        allocate_kept(p, arena, kept);
        for (int64_t i = begin; i < end; ++i) Forward(p, bh, i, arena, kept).work();
    }

    static void allocate_kept(const CpuFwdParams &p, Arena &arena, KeptPrefix &kept) {
        if (p.prefix_dropout_p > 0) kept.allocate(arena, max_of<int64_t>(kKeys, min_of(p.P, kKeptRows)), p.D);
    }

    Forward(const CpuFwdParams &p, int64_t bh, int64_t block, Arena arena, KeptPrefix &kept)
        : p_(p), b_(bh / p.H), h_(bh % p.H), D_((int)p.D), q_(query_block(p.L, block)), arena_(arena), kept_(kept) {
        gain_ = prefix_gain(p.prefix_dropout_p);
        scaled_ = has_float_mask(p) || p.softcap > 0;
        queries_ = arena_.take<float>((int64_t)Ops::words(D_) * kLanes);
        scores_ = arena_.take<float>((int64_t)(kKeys + 2) * kLanes);
        acc_ = arena_.take<float>((int64_t)D_ * kLanes);
        rows_ = arena_.take<float>((int64_t)kLanes * (D_ + 15));
        pairs_ = arena_.take<uint32_t>(Ops::kPairs ? (kKeys / 2 + 1) * (int64_t)kLanes : 0);
        value_columns_ = arena_.take<uint32_t>(Ops::column_words(kKeys, D_));
        const bool copies = Ops::kWiden || p.prefix_dropout_p > 0;
        key_copy_ = arena_.take<float>(copies ? (int64_t)kKeys * D_ : 0);
        value_copy_ = arena_.take<float>(copies ? (int64_t)kKeys * D_ : 0);
        mask_ = arena_.take<float>(Masker::scratch_floats(p, kKeys));
        multipliers_ = arena_.take<float>(p.dropout_p > 0 ? (int64_t)(kKeys + 2) * kLanes : 0);
    }

    void work() {
        pack_queries();
        for (int i = 0; i < kLanes; ++i) row_max_[i] = kMinusInf, own_sum_[i] = prefix_sum_[i] = 0;
        std::memset(acc_, 0, sizeof(float) * D_ * q_.width);

        const int64_t length = prefix_length(p_, b_);
        const Range own = seen_keys(own_band(p_), padded_range(p_, b_, h_), q_);
        const Range prefix = seen_keys(prefix_band(p_, length), {0, length}, q_);
        const int64_t rows = prefix.end - prefix.begin, total = rows + own.end - own.begin;
        const int64_t blocks = (total + kKeys - 1) / kKeys;
        const int64_t per_block = blocks ? ((total + blocks - 1) / blocks + 3) / 4 * 4 : 0;  // blocks of equal size
        for (int64_t done = 0; done < total; done += per_block) {
            const int64_t end = min_of(done + per_block, total);
            const int64_t p0 = min_of(done, rows), p1 = min_of(end, rows);
            const int64_t s0 = max_of<int64_t>(done - rows, 0), s1 = max_of<int64_t>(end - rows, 0);
            attend(prefix.begin + p0, (int)(p1 - p0), own.begin + s0, (int)(s1 - s0));
        }
        store();
    }

    void pack_queries() {
        factor_ = p_.scale;
        Ops::pack_queries(query_rows(), p_.q.stride2 * Ops::kSize, q_, D_, rows_, queries_);
        if (!scaled_) factor_ = Ops::positive_scale(p_.scale, queries_, (int64_t)Ops::words(D_) * q_.width);
    }

    const char *query_rows() const { return at(p_.q, b_, h_, q_.l0, Ops::kSize); }

    // Prefix rows p0 .. p0 + np, then own keys s0 .. s0 + ns.
    void attend(int64_t p0, int np, int64_t s0, int ns) {
        const int64_t g = h_ / (p_.H / p_.Hkv);
        const int np_even = (np + Ops::kRowAlign - 1) / Ops::kRowAlign * Ops::kRowAlign;
        const int n = np_even + (ns + Ops::kRowAlign - 1) / Ops::kRowAlign * Ops::kRowAlign;
        const Strips strips(own_band(p_), q_, s0, ns, Ops::kStrip, Ops::kStripAlign);
        float *own_scores = scores_ + (int64_t)np_even * q_.width;
        float *own_keys = key_copy_ + (int64_t)np * D_, *own_values = value_copy_ + (int64_t)np * D_;

        if (np > 0) {
            if (p_.prefix_dropout_p > 0)
                kept_.draw(dropout_seed(p_), p_.prefix_dropout_p, b_ * p_.Hkv + g, p0, np, prefix_length(p_, b_));
            const Rows k = Ops::prefix_rows(p_, p_.prefix_k, kept_, b_, g, p0, np, kDropsPrefixK, key_copy_);
            gemm<Dot, true>(np, q_.width, Ops::words(D_), k.by_row(0), queries_, q_.width, scores_, q_.width, false);
        }
        if (ns > 0) {
            const Rows k = Ops::rows(p_.k, b_, g, s0, ns, D_, own_keys);
            strips.each([&](int r, int rows, int skip) {
                gemm<Dot, true>(rows, q_.width - skip, Ops::words(D_), k.by_row(r), queries_ + skip, q_.width,
                                own_scores + (int64_t)r * q_.width + skip, q_.width, false);
            });
        }
        const Masker masker(p_, b_, h_, mask_);
        float factor = factor_, prefix_factor = factor_ * gain_;
        if (scaled_) {
            scale_scores(scores_, (int64_t)np * q_.width, prefix_factor, p_.softcap);
            scale_scores(own_scores, (int64_t)ns * q_.width, factor, p_.softcap);
            factor = prefix_factor = 1;
        }
        masker.apply(q_, strips, s0, ns, own_scores);
        const Band band = prefix_band(p_, prefix_length(p_, b_));
        Masker::hide(q_, Strips(band, q_, p0, np, Ops::kStrip, Ops::kStripAlign), np, scores_);
        if (np_even > np) hide_row(scores_, np);
        if (n > np_even + ns) hide_row(own_scores, ns);
        const bool drops = p_.dropout_p > 0;
        if (drops) fill_multipliers(p0, np, np_even, s0, ns, n);

        for (int i = 0; i < q_.width; i += VL)
            if (is_power_of_2(prefix_factor) && is_power_of_2(factor))
                drops ? softmax<true, true>(i, np_even, n, prefix_factor, factor)
                      : softmax<false, true>(i, np_even, n, prefix_factor, factor);
            else
                drops ? softmax<true, false>(i, np_even, n, prefix_factor, factor)
                      : softmax<false, false>(i, np_even, n, prefix_factor, factor);

        if (np > 0) {
            const Rows v = Ops::prefix_rows(p_, p_.prefix_v, kept_, b_, g, p0, np, kDropsPrefixV, value_copy_);
            accumulate(Ops::columns(v, np, D_, value_columns_), 0, np, 0, 0);
        }
        if (ns > 0) {
            const Rows v = Ops::rows(p_.v, b_, g, s0, ns, D_, own_values);
            const Columns columns = Ops::columns(v, ns, D_, value_columns_);
            strips.each([&](int r, int rows, int skip) { accumulate(columns, r, rows, skip, np_even); });
        }
    }

    void hide_row(float *S, int r) {
        for (int i = 0; i < q_.width; ++i) S[(int64_t)r * q_.width + i] = kMinusInf;
    }

    void fill_multipliers(int64_t p0, int np, int np_even, int64_t s0, int ns, int n) {
        AttentionDropout dropout(dropout_seed(p_), p_.dropout_p, b_ * p_.H + h_, q_.l0, q_.width);
        for (int64_t i = 0; i < (int64_t)n * q_.width; ++i) multipliers_[i] = 1;  // rows that only fill a pair
        for (int r = 0; r < np; ++r) dropout.row(p0 + r, multipliers_ + (int64_t)r * q_.width);
        for (int r = 0; r < ns; ++r) dropout.row(p_.P + s0 + r, multipliers_ + (int64_t)(np_even + r) * q_.width);
    }

    // One vector of queries over the n rows of the block, the prefix's np first; leaves weights for the second product.
    template <bool kDrop, bool kExact>
    void softmax(int lane, int np, int n, float prefix_factor, float factor) {
        const int64_t ld = q_.width;
        const vf highest = vmax(maximum(lane, 0, np) * vset(prefix_factor), maximum(lane, np, n) * vset(factor));
        const vf old_max = vload(row_max_ + lane);
        const vf new_max = vmax(old_max, highest);
        const vf pivot = vmax(new_max, vset(-0x1p126f));  // a query that has met no key: -inf - -inf is nan
        const vf rescale = vexp2((old_max - pivot) * vset(kLog2e));
        vstore(row_max_ + lane, new_max);

        const vf prefix = gain_ != 1 ? exponentials<kDrop, kExact, true>(lane, 0, np, prefix_factor, pivot)
                                     : exponentials<kDrop, kExact, false>(lane, 0, np, prefix_factor, pivot);
        vstore(prefix_sum_ + lane, vload(prefix_sum_ + lane) * rescale + prefix);
        vstore(own_sum_ + lane,
               vload(own_sum_ + lane) * rescale + exponentials<kDrop, kExact, false>(lane, np, n, factor, pivot));
        for (int d = 0; d < D_; ++d) vstore(acc_ + d * ld + lane, vload(acc_ + d * ld + lane) * rescale);
    }

    vf maximum(int lane, int begin, int end) const {
        const int64_t ld = q_.width;
        const float *S = scores_ + lane;
        vf max0 = vset(kMinusInf), max1 = max0, max2 = max0, max3 = max0;
        int r = begin;
        for (; r + 4 <= end; r += 4) {
            max0 = vmax(max0, vload(S + r * ld));
            max1 = vmax(max1, vload(S + (r + 1) * ld));
            max2 = vmax(max2, vload(S + (r + 2) * ld));
            max3 = vmax(max3, vload(S + (r + 3) * ld));
        }
        for (; r < end; ++r) max0 = vmax(max0, vload(S + r * ld));
        return vmax(vmax(max0, max1), vmax(max2, max3));
    }

    // Scores of rows begin .. end to weights, with kGain times the gain of prefix dropout; returns their sum without
    // it, from four chains to keep rounding and latency low. A score is rounded before the pivot, a rounded score, is
    // taken away: of large ones the difference would be what rounding left. The backward does the same. kExact: there
    // is nothing to round.
    template <bool kDrop, bool kExact, bool kGain>
    vf exponentials(int lane, int begin, int end, float factor, vf pivot) {
        const int64_t ld = q_.width;
        const vf f = vset(factor), g = vset(gain_), minus_pivot = vzero() - pivot;
        vf sum[4] = {vzero(), vzero(), vzero(), vzero()};
        const auto weight = [&](int r, vf &total) {
            const vf product = vload(scores_ + r * ld + lane);
            const vf score = kExact ? vfma(product, f, minus_pivot) : vrounded(product * f) - pivot;
            vf x = vexp2(score * vset(kLog2e));
            total = total + x;
            if (kGain) x = x * g;
            return kDrop ? x * vload(multipliers_ + r * ld + lane) : x;
        };
        int r = begin;
        for (; r + 4 <= end; r += 4) {
            const vf w0 = weight(r, sum[0]), w1 = weight(r + 1, sum[1]), w2 = weight(r + 2, sum[2]),
                     w3 = weight(r + 3, sum[3]);
            put(r, lane, w0, w1);
            put(r + 2, lane, w2, w3);
        }
        for (; r + 2 <= end; r += 2) {
            const vf w0 = weight(r, sum[0]), w1 = weight(r + 1, sum[1]);
            put(r, lane, w0, w1);
        }
        if (r < end) vstore(scores_ + r * ld + lane, weight(r, sum[0]));  // floats only: pairs are padded to whole ones
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    void put(int r, int lane, vf w0, vf w1) {
        const int64_t ld = q_.width;
        if constexpr (Ops::kPairs) return store_pairs<Storage>(pairs_ + (r / 2) * ld + lane, w0, w1);
        vstore(scores_ + r * ld + lane, w0);
        vstore(scores_ + (r + 1) * ld + lane, w1);
    }

    // acc += values[r .. r + n]^T weights, which stand from row `first + r` of the block.
    void accumulate(const Columns &v, int r, int n, int skip, int first) {
        const float *weights = Ops::kPairs ? (const float *)pairs_ + (int64_t)(first + r) / 2 * q_.width
                                           : scores_ + (int64_t)(first + r) * q_.width;
        Ops::add_product(v, r, n, D_, q_.width - skip, weights + skip, q_.width, acc_ + skip, q_.width);
    }

    void store() {
        const int64_t row0 = first_row(p_, b_, h_) + q_.l0;
        float sum[kLanes], inverse[kLanes];
        for (int i = 0; i < q_.width; ++i) {
            sum[i] = prefix_sum_[i] + own_sum_[i];
            inverse[i] = sum[i] != 0 ? 1 / sum[i] : 0;  // a nan stays one
        }
        for (int i = 0; i < q_.lanes; ++i) {
            ((Lse<Storage> *)p_.lse)[row0 + i] = log_of_sum<Storage>(row_max_[i], sum[i]);
            if (p_.mass) p_.mass[row0 + i] = prefix_sum_[i] * inverse[i];
        }
        for (int d = 0; d < D_; ++d)
            for (int i = 0; i < q_.width; i += VL)
                vstore(acc_ + (int64_t)d * q_.width + i, vload(acc_ + (int64_t)d * q_.width + i) * vload(inverse + i));
        if (p_.attended.data) write(p_.attended);
        if (p_.memory.data) with_phi(p_.phi, [&](auto phi) { add_memory<decltype(phi)>(); });
        write(p_.out);
    }

    // acc += memory^T phi(q)^T: rows of the memory are values, and phi(q) their weights.
    template <class Phi>
    void add_memory() {
        if (p_.scale <= 0) Ops::pack_queries(query_rows(), p_.q.stride2 * Ops::kSize, q_, D_, rows_, queries_);
        for (int d0 = 0; d0 < D_; d0 += kKeys) {
            const int n = min_of(kKeys, D_ - d0);
            for (int r = 0; r < n; r += 2)
                for (int i = 0; i < q_.width; i += VL) {
                    vf first, second;
                    load_query_rows<Ops>(queries_, q_.width, d0 + r, i, first, second);
                    put(r, i, Phi::value(first), Phi::value(second));
                }
            const Rows rows = Ops::rows(p_.memory, memory_row(p_, b_), h_, d0, n, D_, value_copy_);
            accumulate(Ops::columns(rows, n, D_, value_columns_), 0, n, 0, 0);
        }
    }

    void write(const Strided &t) {
        const int ld = (D_ + 15) / 16 * 16;
        transpose(acc_, 4 * q_.width, D_, q_.lanes, rows_, ld);
        for (int i = 0; i < q_.lanes; ++i)
            narrow(rows_ + (int64_t)i * ld, (Storage *)at(t, b_, h_, q_.l0 + i, Ops::kSize), D_);
    }

    const CpuFwdParams &p_;
    const int64_t b_, h_;
    const int D_;
    const QueryBlock q_;
    Arena arena_;
    KeptPrefix &kept_;
    bool scaled_;      // scores are scaled before they meet a float mask or a cap, not with the exponential
    float factor_;     // queries_ . keys times this is the score
    float gain_;       // what prefix dropout multiplies kept elements by
    float *queries_;   // [words(D)][width]
    float *scores_;    // [keys][width], then the weights
    float *acc_;       // [D][width], out transposed
    float *rows_;      // [lanes][D]
    uint32_t *pairs_;  // [keys / 2][width], weights in pairs of keys
    uint32_t *value_columns_;
    float *key_copy_, *value_copy_, *mask_, *multipliers_;
    alignas(64) float row_max_[kLanes], own_sum_[kLanes], prefix_sum_[kLanes];
};

}  // namespace PA_ISA
}  // namespace prefixattn
