// Forward over tiles. A unit of work is some blocks of 32 queries of one key head. The head's virtual keys, prefix
// first, are packed in chunks, once for all of them.
#pragma once
#include "cpu/attention/lse.h"
#include "cpu/attention/softmax_tiles.h"

namespace prefixattn {
namespace PA_ISA {

template <class Storage, class Dot>
class TileForward {
    using Ops = Operands<Storage, Dot>;
    using Keys = RowTiles<Dot>;
    using Values = ColumnTiles<Dot>;
    static constexpr int kKeys = 256;              // most keys of a chunk
    static constexpr int kRows = 96;               // whose scores stand at once, and stay in L1 with what is beside
    static constexpr int64_t kAccBytes = 1 << 18;  // of the outputs of a unit's blocks, where there are several chunks
    static constexpr int64_t kWindowBlocks = 8;    // of a unit, where there is a window

  public:
    static void run(const CpuFwdParams &p, int threads) {
        if (p.B * p.H * p.L == 0) return;
        PrefixTiles<Dot> prefix(p);
        prefix.pack(threads);
        Job job{p, prefix, 1, 1};
        // Heads that share keys are a unit's too, unless padding could tell them apart.
        job.heads = p.mask_kind == MaskKind::kNone || p.mask.stride1 == 0 ? p.H / p.Hkv : 1;
        const int64_t items = job.heads * blocks(p), heads = p.B * p.H / job.heads;
        const int64_t most = max_of<int64_t>(1, kAccBytes / (4 * kTileLanes * up(p.D, kTile)));
        const int64_t wanted = min_of(items, (4 * threads + heads - 1) / heads);
        job.groups = max_of(wanted, p.P + p.S > kKeys ? (items + most - 1) / most : 1);
        // A window leaves a unit the keys that its blocks see, and chunks are cut from the first of them. So which
        // blocks are together may depend neither on the batch nor on the threads.
        if (has_window(p)) job.groups = (items + kWindowBlocks - 1) / kWindowBlocks;
        parallel_for(heads * job.groups, threads, unit, &job, Dot::region());
    }

  private:
    struct Job {
        const CpuFwdParams &p;
        const PrefixTiles<Dot> &prefix;
        int64_t heads, groups;  // query heads that a unit may hold, and units of them
    };

    static bool has_window(const CpuFwdParams &p) { return p.window_left >= 0 || p.window_right >= 0; }
    static int64_t blocks(const CpuFwdParams &p) { return (p.L + kTileLanes - 1) / kTileLanes; }

    static void unit(void *context, int64_t unit) {
        const Job &job = *(const Job *)context;
        const CpuFwdParams p = sample_of(job.p, unit / job.groups * job.heads / job.p.H);
        Arena counted = Arena::counting();
        const int64_t bytes = TileForward(job, p, unit, counted).arena_.used();
        TileForward(job, p, unit, Arena(thread_scratch(bytes))).work();
    }

    TileForward(const Job &job, const CpuFwdParams &p, int64_t unit, Arena arena) : job_(job), p_(p), arena_(arena) {
        const int64_t items = job.heads * blocks(p), n = job.groups, head = unit / n * job.heads;
        begin_ = items * (unit % n) / n, end_ = items * (unit % n + 1) / n;
        if (has_window(p))  // packed sequences have n of the longest, but the same blocks
            begin_ = min_of(items, unit % n * kWindowBlocks), end_ = min_of(items, begin_ + kWindowBlocks);
        b_ = head / p.H, h0_ = head % p.H, g_ = h0_ / (p.H / p.Hkv), D_ = (int)p.D;
        softmax_.gain = prefix_gain(p.prefix_dropout_p);
        scaled_ = has_float_mask(p) || p.softcap > 0;
        length_ = prefix_length(p, b_);
        const int64_t most = min_of<int64_t>(p.P + p.S, kKeys), rows = max_of<int64_t>(up(most, kGroup), kGroup);
        online_ = p.P + p.S > kKeys, slots_ = online_ ? end_ - begin_ : 1;
        items_ = arena_.take<TileBlock>(slots_);
        query_words_ = Ops::query_words(D_, kTileLanes);
        acc_floats_ = up(D_, kTile) * kTileLanes;
        queries_ = arena_.take<float>(slots_ * query_words_);
        acc_ = arena_.take<float>(slots_ * acc_floats_);
        keys_ = arena_.take<char>(Keys::bytes(rows, D_));
        values_ = arena_.take<char>(Values::bytes(rows, D_));
        memory_ = arena_.take<char>(p.memory.data ? Values::bytes(D_, D_) : 0);
        softmax_.scores = arena_.take<float>(max_of<int64_t>((kRows + 2) * kTileLanes, kTileLanes * up(D_, 16)));
        rows_ = softmax_.scores;
        softmax_.plane = max_of<int64_t>(rows, p.memory.data ? up(D_, kGroup) : 0) / 2 * kTileLanes;
        pairs_ = arena_.take<uint32_t>(Dot::kPlanes * softmax_.plane);
        if (p.prefix_dropout_p > 0) {
            kept_.allocate(arena_, kKeys, D_);
            copies_ = arena_.take<Storage>(2 * rows * D_);
        }
        mask_ = arena_.take<float>(Masker::scratch_floats(p, kRows));
        softmax_.multipliers = p.dropout_p > 0 ? arena_.take<float>((kRows + 2) * kTileLanes) : nullptr;
    }

    void work() {
        if (begin_ == end_) return;  // of a packed sequence that is shorter than the longest
        own_ = own_keys();
        const int64_t total = length_ + own_.end - own_.begin, chunks = (total + kKeys - 1) / kKeys;
        const int64_t chunk = chunks ? up((total + chunks - 1) / chunks, kGroup) : 0;  // of equal size
        const int64_t items = end_ - begin_;
        if (!online_) {
            load(0, (int)total);
            for (int64_t i = 0; i < items; ++i) {
                TileBlock &x = start(begin_ + i, 0);
                attend(x);
                store(x);
            }
            return;
        }
        for (int64_t i = 0; i < items; ++i) start(begin_ + i, i);
        for (int64_t c = 0; c < total; c += chunk) {
            load(c, (int)min_of(chunk, total - c));
            for (int64_t i = 0; i < items; ++i) attend(items_[i]);
        }
        for (int64_t i = 0; i < items; ++i) store(items_[i]);
    }

    QueryBlock queries_of(int64_t index) const {
        const int64_t l0 = index % blocks(p_) * kTileLanes;
        return {l0, (int)min_of<int64_t>(kTileLanes, p_.L - l0), kTileLanes};
    }

    // Of own keys those that padding leaves, and windows to any of the unit's blocks.
    Range own_keys() const {
        const Range all = padded_range(p_, b_, h0_);
        if (!has_window(p_)) return all;
        Range seen{all.end, all.begin};
        for (int64_t i = begin_; i < end_; ++i) {
            const Range x = seen_keys(own_band(p_), all, queries_of(i));
            seen = {min_of(seen.begin, x.begin), max_of(seen.end, x.end)};
        }
        return {min_of(seen.begin, seen.end), seen.end};
    }

    TileBlock &start(int64_t index, int64_t slot) {
        TileBlock &x = items_[slot];
        x.h = h0_ + index / blocks(p_), x.q = queries_of(index);
        const Range own = seen_keys(own_band(p_), own_, x.q);
        x.prefix_begin = seen_keys(prefix_band(p_, length_), {0, length_}, x.q).begin;
        x.own_begin = length_ + own.begin - own_.begin, x.own_end = length_ + own.end - own_.begin;
        x.queries = queries_ + slot * query_words_, x.acc = acc_ + slot * acc_floats_;
        pack_queries(x);
        fetch_ahead<true>(p_.out, b_, x.h, x.q.l0, x.q.lanes, D_, Ops::kSize);
        for (int i = 0; i < kTileLanes; ++i) x.pivot[i] = kMinusInf, x.prefix_sum[i] = x.own_sum[i] = 0;
        if (online_) std::memset(x.acc, 0, sizeof(float) * acc_floats_);
        return x;
    }

    void pack_queries(TileBlock &x) {
        factor_ = p_.scale;
        turn_queries(x);
        if (!scaled_) factor_ = Ops::positive_scale(p_.scale, x.queries, query_words_);
    }

    void turn_queries(TileBlock &x) {
        if (x.q.lanes < kTileLanes || D_ % kGroup) std::memset(x.queries, 0, sizeof(float) * query_words_);
        Ops::pack_queries(at(p_.q, b_, x.h, x.q.l0, Ops::kSize), p_.q.stride2 * Ops::kSize, x.q, D_, rows_, x.queries,
                          Ops::query_plane(D_, kTileLanes));
    }

    // Virtual keys c .. c + n, which blocks attend to next.
    void load(int64_t c, int n) {
        const int64_t row = prefix_row(p_, b_), packed = job_.prefix.rows(length_);
        first_ = c, loaded_ = n;
        shared_ = (int)max_of<int64_t>(0, min_of<int64_t>(packed - c, n));
        const int64_t v0 = c + shared_, p0 = min_of(v0, length_), s0 = own_.begin + max_of<int64_t>(v0 - length_, 0);
        const int np = (int)max_of<int64_t>(0, min_of<int64_t>(length_ - v0, n - shared_));
        if (shared_ > 0) {
            shared_keys_ = job_.prefix.keys(row, g_) + Keys::bytes(c, D_);  // whole groups of rows
            shared_values_ = job_.prefix.values(row, g_) + Values::bytes(c, D_);
        }
        if (np > 0 && p_.prefix_dropout_p > 0)
            kept_.draw(dropout_seed(p_), p_.prefix_dropout_p, b_ * p_.Hkv + g_, p0, np, p0 + np);
        const auto joined = [&](const Strided &prefix, const Strided &own, int draw, Storage *copy) {
            const auto rows =
                np ? Ops::prefix_rows(p_, prefix, kept_, b_, g_, p0, np, draw, copy) : typename Ops::Rows{};
            const char *first = at(own, b_, g_, s0, Ops::kSize);
            return JoinedRows{rows.data, rows.stride, np, first, (ptrdiff_t)(own.stride2 * Ops::kSize), n - shared_};
        };
        Keys::pack(joined(p_.prefix_k, p_.k, kDropsPrefixK, copies_), D_, keys_);
        Values::pack(joined(p_.prefix_v, p_.v, kDropsPrefixV, copies_), D_, values_);
    }

    // Adds to a block what it sees of the chunk: of the prefix, then of own keys, in whole groups.
    void attend(TileBlock &x) {
        const auto in_chunk = [&](int64_t i) { return (int)max_of<int64_t>(0, min_of<int64_t>(loaded_, i - first_)); };
        const int p0 = in_chunk(x.prefix_begin) / kGroup * kGroup, p1 = in_chunk(length_);
        const int s0 = in_chunk(x.own_begin) / kGroup * kGroup, s1 = in_chunk(x.own_end);
        if (s0 <= p1) return attend(x, p0, s1, first_ > 0);
        attend(x, p0, p1, first_ > 0);
        if (s0 < s1) attend(x, s0, s1, true);
    }

    // Adds rows r0 .. n of the chunk, some keys after others. Their weights are multiplied with values together, unless
    // a maximum rises so far that those before are to be scaled.
    void attend(TileBlock &x, int r0, int n, bool adds) {
        int added = r0;
        for (int r = r0; r < n; r += kRows) {
            const int rows = min_of(kRows, n - r);
            const int np = (int)max_of<int64_t>(0, min_of<int64_t>(length_ - first_ - r, rows));
            score(x, r, rows);
            prepare(x, r, rows, np);
            vf rescale[kTileLanes / VL];
            if (softmax_.raise_pivot(x, rows, np, rescale) && (adds || added < r)) {
                if (added < r) accumulate(x, added, r, adds);
                for (int d = 0; d < D_; ++d)
                    for (int v = 0; v < kTileLanes / VL; ++v) {
                        float *at = x.acc + d * kTileLanes + v * VL;
                        vstore(at, vload(at) * rescale[v]);
                    }
                adds = true, added = r;
            }
            softmax_.run(x, np, rows, rescale, pairs_ + r / 2 * kTileLanes);
        }
        if (added < n || !adds) {
            const int even = (n + 1) / 2, all = (int)up(n, kGroup) / 2;
            for (int plane = 0; plane < Dot::kPlanes; ++plane)
                std::memset(pairs_ + plane * softmax_.plane + even * kTileLanes, 0,
                            sizeof(uint32_t) * (all - even) * kTileLanes);
            accumulate(x, added, n, adds);
        }
    }

    // softmax_.scores [rows up to whole tiles][32] of the chunk's keys from r on
    void score(const TileBlock &x, int r, int rows) {
        const int K = (int)Keys::steps(D_), apart = max_of(0, min_of(shared_ - r, rows));
        const TileStream b{(const char *)x.queries, 4 * kTileLanes, 64, 4 * kTileLanes * kTile,
                           4 * Ops::query_plane(D_, kTileLanes)};
        const auto multiply = [&](const char *keys, int from, int n, float *to) {
            add_product<Dot>(tiles(n), tiles(x.q.lanes), K, Keys::stream(keys, from, D_), b, to, kTileLanes, false);
        };
        if (apart > 0) multiply(shared_keys_, r, apart, softmax_.scores);
        if (apart < rows) multiply(keys_, r + apart - shared_, rows - apart, softmax_.scores + apart * kTileLanes);
    }

    static int tiles(int n) { return (n + kTile - 1) / kTile; }

    // Scores as tiles left them to those that the softmax reads: scaled where it must be, masked.
    void prepare(TileBlock &x, int r, int rows, int np) {
        softmax_.own_factor = factor_, softmax_.prefix_factor = factor_ * softmax_.gain;
        float *own_scores = softmax_.scores + (int64_t)np * kTileLanes;
        if (scaled_) {
            scale_scores(softmax_.scores, np * kTileLanes, softmax_.prefix_factor, p_.softcap);
            scale_scores(own_scores, (rows - np) * kTileLanes, softmax_.own_factor, p_.softcap);
            softmax_.own_factor = softmax_.prefix_factor = 1;
        }
        const int64_t s0 = own_.begin + max_of<int64_t>(first_ + r - length_, 0);
        if (rows > np) {
            const Strips strips(own_band(p_), x.q, s0, rows - np, kTileLanes, 1);
            Masker(p_, b_, x.h, mask_).apply(x.q, strips, s0, rows - np, own_scores);
        }
        Masker::hide(x.q, Strips(prefix_band(p_, length_), x.q, first_ + r, np, kTileLanes, 1), np, softmax_.scores);
        if (rows % 2)
            for (int i = 0; i < kTileLanes; ++i) softmax_.scores[(int64_t)rows * kTileLanes + i] = kMinusInf;
        if (p_.dropout_p > 0) fill_multipliers(x, first_ + r, np, s0, rows);
    }

    // x.acc (+)= rows r0 .. r1 of the chunk's values, transposed, times their weights
    void accumulate(TileBlock &x, int r0, int r1, bool adds) {
        const int seam = max_of(r0, min_of(shared_, r1));
        if (seam > r0) add_values(x, shared_values_, r0, r0, seam, adds);
        if (seam < r1 || seam == r0) add_values(x, values_, seam - shared_, seam, r1, adds || seam > r0);
    }

    // x.acc [D][32] (+)= rows of values from the row `from` on, transposed, times rows r0 .. r1 of pairs_
    void add_values(TileBlock &x, const char *values, int from, int r0, int r1, bool adds) {
        const TileStream weights{(const char *)(pairs_ + r0 / 2 * kTileLanes), 4 * kTileLanes, 64,
                                 4 * kTileLanes * kTile, 4 * softmax_.plane};
        add_product<Dot>(tiles(D_), tiles(x.q.lanes), (r1 - r0 + kGroup - 1) / kGroup, Values::stream(values, from, D_),
                         weights, x.acc, kTileLanes, adds);
    }

    void fill_multipliers(const TileBlock &x, int64_t first, int np, int64_t s0, int n) {
        AttentionDropout dropout(dropout_seed(p_), p_.dropout_p, b_ * p_.H + x.h, x.q.l0, kTileLanes);
        for (int r = 0; r < n; ++r)
            dropout.row(r < np ? first + r : p_.P + s0 + r - np, softmax_.multipliers + (int64_t)r * kTileLanes);
        if (n % 2)
            for (int i = 0; i < kTileLanes; ++i) softmax_.multipliers[(int64_t)n * kTileLanes + i] = 1;
    }

    void store(TileBlock &x) {
        const int64_t row0 = first_row(p_, b_, x.h) + x.q.l0;
        alignas(64) float sum[kTileLanes], inverse[kTileLanes], lse[kTileLanes];
        for (int i = 0; i < kTileLanes; ++i) {
            sum[i] = x.prefix_sum[i] + x.own_sum[i];
            inverse[i] = sum[i] != 0 ? 1 / sum[i] : 0;  // a nan stays one
        }
        for (int i = 0; i < kTileLanes; i += VL) vstore(lse + i, vload(x.pivot + i) + vlog(vload(sum + i)));
        for (int i = 0; i < x.q.lanes; ++i) {
            auto *to = (Lse<Storage> *)p_.lse + row0 + i;
            if constexpr (sizeof(Storage) == 4)
                *to = log_of_sum<Storage>(x.pivot[i], sum[i]);
            else
                *to = sum[i] != 0 ? lse[i] : kMinusInf;
            if (p_.mass) p_.mass[row0 + i] = x.prefix_sum[i] * inverse[i];
        }
        if (!p_.memory.data && !p_.attended.data) return write(x, p_.out, inverse);
        for (int d = 0; d < D_; ++d)
            for (int i = 0; i < kTileLanes; i += VL) {
                float *at = x.acc + d * kTileLanes + i;
                vstore(at, vload(at) * vload(inverse + i));
            }
        if (p_.attended.data) write(x, p_.attended, nullptr);
        if (p_.memory.data) with_phi(p_.phi, [&](auto phi) { add_memory<decltype(phi)>(x); });
        write(x, p_.out, nullptr);
    }

    // acc += memory^T phi(q)^T: rows of the memory are values, and phi(q) their weights.
    template <class Phi>
    void add_memory(TileBlock &x) {
        if (p_.scale <= 0) turn_queries(x);
        for (int d = 0; d < up(D_, kGroup); d += 2)
            for (int i = 0; i < kTileLanes; i += VL) {
                vf first = vzero(), second = vzero();
                if (d < D_) {
                    load_query_rows<Ops>(x.queries, kTileLanes, d, i, first, second, Ops::query_plane(D_, kTileLanes));
                    first = Phi::value(first), second = Phi::value(second);
                }
                Ops::put_pairs(pairs_ + d / 2 * kTileLanes + i, softmax_.plane, first, second);
            }
        const Strided &t = p_.memory;
        const char *first = at(t, memory_row(p_, b_), x.h, 0, Ops::kSize);
        const JoinedRows rows{first, (ptrdiff_t)(t.stride2 * Ops::kSize), D_, nullptr, 0, D_};
        Values::pack(rows, D_, memory_);
        add_values(x, memory_, 0, 0, D_, true);
    }

    void write(const TileBlock &x, const Strided &t, const float *factors) {
        const int ld = (int)up(D_, 16);
        transpose(x.acc, 4 * kTileLanes, D_, x.q.lanes, rows_, ld);
        for (int i = 0; i < x.q.lanes; ++i) {
            float *row = rows_ + (int64_t)i * ld;
            if (factors)
                for (int d = 0; d < ld; d += VL) vstore(row + d, vload(row + d) * vset(factors[i]));
            narrow(row, (Storage *)at(t, b_, x.h, x.q.l0 + i, Ops::kSize), D_);
        }
    }

    const Job &job_;
    const CpuFwdParams &p_;
    Arena arena_;
    int64_t begin_, end_;  // of the unit's items
    int64_t b_, h0_, g_, length_, slots_;
    int D_;
    Range own_{};   // own keys that padding leaves
    bool online_;   // there may be several chunks
    bool scaled_;   // scores are scaled before they meet a float mask or a cap, not with the exponential
    float factor_;  // queries . keys times this is the score
    TileSoftmax<Ops> softmax_;
    TileBlock *items_;
    int64_t query_words_, acc_floats_;
    float *queries_, *acc_;
    char *keys_, *values_;  // of the chunk, but for its first `shared_`
    char *memory_;
    const char *shared_keys_ = nullptr, *shared_values_ = nullptr;
    int64_t first_ = 0;  // virtual key of the chunk
    int loaded_ = 0, shared_ = 0;
    float *rows_, *mask_;
    uint32_t *pairs_;  // [keys / 2][32], weights in pairs of keys
    KeptPrefix kept_;
    Storage *copies_ = nullptr;
};

}  // namespace PA_ISA
}  // namespace prefixattn
