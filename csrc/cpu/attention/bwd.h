// Backward. Two schedules over the same tiles:
//   fused  a unit is one key head with the samples that share a prefix row; every tile is computed once (5 products),
//          gradients of the prefix stay in the thread's scratch from sample to sample and leave already summed.
//   split  when that scratch would pass its budget, or there are too few units, or no dq is wanted: passes over own
//          keys, over the prefix, and over queries, each with as many units as it has chunks (7 products in all).
// Either way a sum runs over samples, heads, queries and keys in the order of their indices, so the bits depend neither
// on the number of threads nor on which gradients are wanted. In float32 sums over many tiles are KeySums'; that of
// 16-bit types would lose nothing that their rounding leaves.
#pragma once
#include <initializer_list>

#include "cpu/attention/bwd_tiles.h"
#include "cpu/attention/key_sums.h"
#include "cpu/parallel.h"

namespace prefixattn {
namespace PA_ISA {

template <class Storage, class Dot>
class Backward {
    using Ops = Operands<Storage, Dot>;
    using Queries = QuerySide<Storage, Dot>;
    using Keys = KeySide<Storage, Dot>;
    static constexpr int64_t kBudget = 1 << 20;  // bytes of scratch a thread may hold, KeySums' totals aside
    static constexpr int kMaxSlots = 64;         // query blocks kept packed
    static constexpr int kMemoryRows = 32;       // of a unit: more units than heads
    static constexpr bool kFloat32 = sizeof(Storage) == 4;

  public:
    static void run(const CpuBwdParams &p, int threads) {
        if (p.Hkv == 0) return;  // every gradient is empty
        const bool own = p.dk.data || p.dv.data, prefix = (p.dprefix_k.data || p.dprefix_v.data) && p.P > 0;
        Job job{p, chunk_keys(p)};
        if (p.dmemory.data)
            parallel_for(p.memories * p.H * memory_chunks(p), threads, memory_unit, &job, Dot::region());
        const int64_t rows = p.T * p.Hkv;
        if (p.dq.data && (own || prefix) && (rows >= threads || rows >= p.B * p.Hkv) && fused_fits(p))
            return parallel_for(rows, threads, fused_unit, &job, Dot::region());
        if (own) parallel_for(p.B * p.Hkv * chunks(p, p.S), threads, own_unit, &job, Dot::region());
        if (prefix) parallel_for(p.T * p.Hkv * chunks(p, p.P), threads, prefix_unit, &job, Dot::region());
        if (p.dq.data)
            parallel_for(p.B * p.H * query_blocks(p.L, Ops::kLaneUnit), threads, query_unit, &job, Dot::region());
    }

  private:
    struct Job {
        const CpuBwdParams &p;
        int keys;  // of a chunk
    };

    static int chunk_keys(const CpuBwdParams &p) { return p.D <= 128 ? 128 : 64; }
    static int64_t chunks(const CpuBwdParams &p, int64_t n) { return (n + chunk_keys(p) - 1) / chunk_keys(p); }
    static int64_t memory_chunks(const CpuBwdParams &p) { return (p.D + kMemoryRows - 1) / kMemoryRows; }
    static int64_t padded(const CpuBwdParams &p) { return Ops::row_floats((int)p.D); }
    static int64_t heads(const CpuBwdParams &p) { return p.H / p.Hkv; }
    // Tiles that meet one key of a sample, and one prefix row of all samples that may use it.
    static int64_t tiles(const CpuBwdParams &p) { return query_blocks(p.L, Ops::kLaneUnit) * heads(p); }
    static int64_t prefix_tiles(const CpuBwdParams &p) { return (p.T == 1 || p.prefix_ids ? p.B : 1) * tiles(p); }
    static bool totals_own(const CpuBwdParams &p) { return kFloat32 && tiles(p) > 4 * KeySums::kRun; }
    static bool totals_prefix(const CpuBwdParams &p) { return kFloat32 && prefix_tiles(p) > KeySums::kRun; }
    static bool totals_memory(const CpuBwdParams &p) {
        return kFloat32 && p.B * query_blocks(p.L, Ops::kLaneUnit) > KeySums::kRun;
    }

    // Scratch of a unit; `fused` units also hold dq of a sample's head group and the prefix's gradients.
    Backward(const CpuBwdParams &p, bool fused, Arena arena) : whole_(p), p_(p), arena_(arena) {
        D_ = (int)p.D, Dp_ = (int)padded(p), keys_max_ = chunk_keys(p);
        tile_.allocate(p, arena_, keys_max_);
        keys_.allocate(p, arena_, keys_max_);
        rows_ = arena_.take<float>((int64_t)kLanes * (D_ + 15));
        const int64_t chunk = (int64_t)keys_max_ * Dp_, blocks = tiles(p);
        chunk_ = arena_.take<float>(2 * chunk);
        if (p.prefix_dropout_p > 0) dropped_ = arena_.take<float>(2 * chunk);
        dq_ = arena_.take<float>((fused ? blocks : 1) * Dp_ * kLanes);
        prefix_rows_ = Dot::kTiles ? (p.P + 31) / 32 * 32 : p.P;
        if (fused) {
            prefix_sums_ = arena_.take<float>(2 * prefix_rows_ * Dp_);
            prefix_added_ = arena_.take<int64_t>(chunks(p, p.P));
        }
        slots_ = 1;
        queries_[0].allocate(p, arena_);
        for (; fused && slots_ < blocks && slots_ < kMaxSlots; ++slots_) {  // keep as many packed as fit
            Arena next = arena_;
            queries_[slots_].allocate(p, next);
            if (next.used() > kBudget) break;
            arena_ = next;
        }
        budgeted_ = arena_.used();
        if (totals_own(p) || (!fused && (totals_prefix(p) || totals_memory(p))))
            chunk_totals_ = arena_.take<float>(2 * chunk);
        if (fused && totals_prefix(p)) prefix_totals_ = arena_.take<float>(2 * prefix_rows_ * Dp_);
    }

    static bool fused_fits(const CpuBwdParams &p) { return Backward(p, true, Arena::counting()).budgeted_ <= kBudget; }

    template <class F>
    static void with_scratch(const Job &job, bool fused, F f) {
        const int64_t bytes = Backward(job.p, fused, Arena::counting()).arena_.used();
        Backward work(job.p, fused, Arena(thread_scratch(bytes)));
        f(work);
    }

    static void fused_unit(void *context, int64_t unit) {
        const Job &job = *(const Job *)context;
        const CpuBwdParams &p = job.p;
        const int64_t g = unit % p.Hkv, t = unit / p.Hkv;
        with_scratch(job, true, [&](Backward &w) {
            for (int64_t p0 = 0; p0 < p.P; p0 += job.keys) w.prefix_sums(p0).clear();
            const auto next = [&](int64_t b) {
                for (++b; b < p.B && prefix_row(p, b) != t;) ++b;
                return b;
            };
            for (int64_t b = next(-1); b < p.B; b = w.next_) {
                w.next_ = next(b);
                w.sample(b, g);
            }
            for (int64_t p0 = 0; p0 < p.P; p0 += job.keys)
                w.store_prefix(t, g, p0, (int)min_of<int64_t>(job.keys, p.P - p0), w.prefix_sums(p0));
        });
    }

    static void own_unit(void *context, int64_t unit) {
        const Job &job = *(const Job *)context;
        const CpuBwdParams &p = job.p;
        const int64_t n = chunks(p, p.S), s0 = unit % n * job.keys, g = unit / n % p.Hkv, b = unit / n / p.Hkv;
        with_scratch(job, false, [&](Backward &w) {
            w.begin(b);
            const int count = (int)min_of<int64_t>(job.keys, w.p_.S - s0);
            if (count <= 0) return;
            w.keys_.load(w.p_, b, g, false, s0, count, false);
            w.own_chunk(b, g, s0, count, false);
        });
    }

    static void prefix_unit(void *context, int64_t unit) {
        const Job &job = *(const Job *)context;
        const CpuBwdParams &p = job.p;
        const int64_t n = chunks(p, p.P), p0 = unit % n * job.keys, g = unit / n % p.Hkv, t = unit / n / p.Hkv;
        with_scratch(job, false, [&](Backward &w) {
            const int count = (int)min_of<int64_t>(job.keys, p.P - p0);
            const KeySums sums = w.chunk_sums(count, totals_prefix(p));
            sums.clear();
            for (int64_t b = 0; b < p.B; ++b)
                if (prefix_row(p, b) == t) {
                    w.begin(b);
                    w.prefix_chunk(b, g, p0, count, sums, false);
                }
            w.store_prefix(t, g, p0, count, sums);
        });
    }

    static void query_unit(void *context, int64_t unit) {
        const Job &job = *(const Job *)context;
        const int64_t blocks = query_blocks(job.p.L, Ops::kLaneUnit), block = unit % blocks,
                      h = unit / blocks % job.p.H, b = unit / blocks / job.p.H;
        with_scratch(job, false, [&](Backward &w) {
            w.begin(b);
            const CpuBwdParams &p = w.p_;
            if (block >= query_blocks(p.L, Ops::kLaneUnit)) return;
            Queries &q = w.queries_[0];
            q.pack(p, b, h, block, w.rows_);
            std::memset(w.dq_, 0, sizeof(float) * w.Dp_ * q.q.width);
            const auto chunk = [&](bool prefix, int64_t j0, int64_t end) {
                w.keys_.load(p, b, h / heads(p), prefix, j0, (int)min_of<int64_t>(job.keys, end - j0), true);
                w.tile_.run(p, q, w.keys_, nullptr, nullptr, w.dq_);
            };
            const int64_t length = prefix_length(p, b);
            const Range prefix = seen_keys(prefix_band(p, length), {0, length}, q.q);
            for (int64_t p0 = prefix.begin / job.keys * job.keys; p0 < length; p0 += job.keys) chunk(true, p0, length);
            const Range own = seen_keys(own_band(p), padded_range(p, b, h), q.q);
            // chunks as in the other schedule, whatever padding hides
            for (int64_t s0 = own.begin / job.keys * job.keys; s0 < own.end; s0 += job.keys) chunk(false, s0, p.S);
            w.store_dq(q.b, q.h, q.q, w.dq_, &q);
        });
    }

    static void memory_unit(void *context, int64_t unit) {
        const Job &job = *(const Job *)context;
        const CpuBwdParams &p = job.p;
        const int64_t n = memory_chunks(p), d0 = unit % n * kMemoryRows, h = unit / n % p.H, t = unit / n / p.H;
        with_scratch(job, false, [&](Backward &w) {
            const int rows = (int)min_of<int64_t>(kMemoryRows, p.D - d0);
            Queries &q = w.queries_[0];
            KeySums sums = w.chunk_sums(rows, totals_memory(p));
            sums.dv = nullptr;
            sums.clear();
            for (int64_t b = 0; b < p.B; ++b) {
                if (memory_row(p, b) != t) continue;
                w.begin(b);
                for (int64_t i = 0; i < query_blocks(w.p_.L, Ops::kLaneUnit); ++i) {
                    q.pack_for_memory(w.p_, b, h, i, w.rows_, (int)d0, rows);
                    with_phi(p.phi, [&](auto phi) { w.tile_.template memory_rows<decltype(phi)>(q, rows, sums.dk); });
                    sums.added();
                }
            }
            sums.finish();
            w.store_rows(p.dmemory, t, h, d0, rows, sums.dk, 1);
        });
    }

    void begin(int64_t b) {
        if (whole_.cu_seqlens_q) p_ = sample_of(whole_, b);
    }

    // One sample of a fused unit.
    void sample(int64_t b, int64_t g) {
        begin(b);
        const int64_t blocks = tiles(p_);
        fetched_ = 0;
        std::memset(dq_, 0, sizeof(float) * blocks * Dp_ * kLanes);
        const int64_t length = prefix_length(p_, b);
        for (int64_t p0 = 0; p0 < length; p0 += keys_max_)
            prefix_chunk(b, g, p0, (int)min_of<int64_t>(keys_max_, p_.P - p0), prefix_sums(p0), true);
        for (int64_t s0 = 0; s0 < p_.S; s0 += keys_max_) {
            const int n = (int)min_of<int64_t>(keys_max_, p_.S - s0);
            keys_.load(p_, b, g, false, s0, n, true);
            own_chunk(b, g, s0, n, true);
        }
        for (int64_t i = 0; i < blocks; ++i)
            store_dq(b, g * heads(p_) + i / query_blocks(p_.L, Ops::kLaneUnit),
                     query_block(p_.L, i % query_blocks(p_.L, Ops::kLaneUnit), Ops::kLaneUnit), dq_ + i * Dp_ * kLanes,
                     p_.memory.data ? &packed(b, g, i) : nullptr);
    }

    // Some of what the unit's next sample reads, while this one is computed.
    void fetch_next(int64_t g) {
        const int64_t parts = tiles(p_) * (chunks(p_, p_.P) + chunks(p_, p_.S)), size = Ops::kSize;
        if (fetched_ == parts) return;
        const auto range = [&](int64_t n) { return Range{n * fetched_ / parts, n * (fetched_ + 1) / parts}; };
        const Range s = range(p_.S), l = range(p_.L * heads(p_));
        for (const Strided *t : {&p_.k, &p_.v}) fetch_ahead<false>(*t, next_, g, s.begin, s.end - s.begin, p_.D, size);
        for (int64_t i = l.begin; i < l.end; ++i)
            for (const Strided *t : {&p_.q, &p_.dout, &p_.out})
                fetch_ahead<false>(*t, next_, g * heads(p_) + i / p_.L, i % p_.L, 1, p_.D, size);
        ++fetched_;
    }

    // Block i of a key head's queries.
    Queries &packed(int64_t b, int64_t g, int64_t i) {
        Queries &q = queries_[i < slots_ ? i : slots_ - 1];
        q.pack(p_, b, g * heads(p_) + i / query_blocks(p_.L, Ops::kLaneUnit), i % query_blocks(p_.L, Ops::kLaneUnit),
               rows_);
        return q;
    }

    // Own keys s0 .. s0 + n, loaded.
    void own_chunk(int64_t b, int64_t g, int64_t s0, int n, bool with_dq) {
        if (!(p_.dk.data || p_.dv.data)) return all_queries(b, g, nullptr, nullptr, with_dq, [](int64_t) {});
        const KeySums sums = chunk_sums(n, totals_own(p_));
        sums.clear();
        all_queries(b, g, sums.dk, sums.dv, with_dq, [&](int64_t) { sums.added(); });
        sums.finish();
        store_rows(p_.dk, b, g, s0, n, sums.dk, p_.scale);
        store_rows(p_.dv, b, g, s0, n, sums.dv, 1);
    }

    // Adds one sample's share of prefix rows p0 .. p0 + n, of which it uses those below its length.
    void prefix_chunk(int64_t b, int64_t g, int64_t p0, int n, const KeySums &sums, bool with_dq) {
        n = (int)min_of<int64_t>(n, prefix_length(p_, b) - p0);
        if (n <= 0) return;
        keys_.load(p_, b, g, true, p0, n, with_dq);
        if (!(p_.dprefix_k.data || p_.dprefix_v.data))
            return all_queries(b, g, nullptr, nullptr, with_dq, [](int64_t) {});
        if (p_.prefix_dropout_p == 0)
            return all_queries(b, g, sums.dk, sums.dv, with_dq, [&](int64_t) { sums.added(); });
        // the sample's own mask: its gradients are made apart, then added through the mask
        float *own_k = dropped_, *own_v = own_k + (int64_t)keys_max_ * Dp_;
        const auto clear = [&] {
            std::memset(own_k, 0, sizeof(float) * n * Dp_);
            std::memset(own_v, 0, sizeof(float) * n * Dp_);
        };
        clear();
        all_queries(b, g, own_k, own_v, with_dq, [&](int64_t tile) {
            if ((tile + 1) % KeySums::kRun && tile + 1 < tiles(p_)) return;
            for (int64_t r = 0; r < n; ++r) {
                // dk has the gain already
                add_kept(own_k + r * Dp_, 1.f, keys_.kept.row(p0 + r, kDropsPrefixK), D_, sums.dk + r * Dp_);
                add_kept(own_v + r * Dp_, keys_.gain, keys_.kept.row(p0 + r, kDropsPrefixV), D_, sums.dv + r * Dp_);
            }
            clear();
            sums.added();
        });
    }

    template <class F>
    void all_queries(int64_t b, int64_t g, float *dk, float *dv, bool with_dq, F added) {
        for (int64_t i = 0; i < tiles(p_); ++i) {
            if (with_dq && next_ < p_.B && !p_.cu_seqlens_q) fetch_next(g);
            float *dq = with_dq ? dq_ + i * Dp_ * kLanes : nullptr;
            if (is_seen(b, i)) tile_.run(p_, packed(b, g, i), keys_, dk, dv, dq);
            added(i);
        }
    }

    // Whether causality and window leave block i of a key head's queries some of the loaded keys.
    bool is_seen(int64_t b, int64_t i) const {
        const QueryBlock q = query_block(p_.L, i % query_blocks(p_.L, Ops::kLaneUnit), Ops::kLaneUnit);
        const Range loaded{keys_.j0, keys_.j0 + keys_.n};
        const Range seen = seen_keys(keys_.prefix ? prefix_band(p_, prefix_length(p_, b)) : own_band(p_), loaded, q);
        return seen.begin < seen.end;
    }

    // Those of n rows, of which the sums of all are in scratch together.
    KeySums sums_of(float *sums, float *totals, int64_t all, int64_t first, int n, int64_t *added) const {
        const auto at = [&](float *x, int64_t row) { return x ? x + row * Dp_ : nullptr; };
        return {at(sums, first), at(sums, all + first), at(totals, first), at(totals, all + first), added, n * Dp_};
    }
    KeySums chunk_sums(int n, bool totals) {
        return sums_of(chunk_, totals ? chunk_totals_ : nullptr, keys_max_, 0, n, &chunk_added_);
    }
    KeySums prefix_sums(int64_t p0) {
        return sums_of(prefix_sums_, prefix_totals_, prefix_rows_, p0, (int)min_of<int64_t>(keys_max_, p_.P - p0),
                       prefix_added_ + p0 / keys_max_);
    }

    void store_rows(const Strided &t, int64_t i0, int64_t i1, int64_t j0, int n, float *src, float factor) {
        if (!t.data) return;
        for (int r = 0; r < n; ++r) {
            float *row = src + (int64_t)r * Dp_;
            for (int d = 0; d < D_; ++d) row[d] *= factor;
            narrow(row, (Storage *)at(t, i0, i1, j0 + r, Ops::kSize), D_);
        }
    }

    void store_prefix(int64_t t, int64_t g, int64_t p0, int n, const KeySums &sums) {
        sums.finish();
        store_rows(p_.dprefix_k, t, g, p0, n, sums.dk, p_.scale);
        store_rows(p_.dprefix_v, t, g, p0, n, sums.dv, 1);
    }

    // `from`: the block, packed; read only where there is a memory.
    void store_dq(int64_t b, int64_t h, const QueryBlock &q, float *dq, const Queries *from) {
        const int ld = (D_ + 15) / 16 * 16;
        for (int64_t i = 0; i < (int64_t)D_ * q.width; i += VL) vstore(dq + i, vload(dq + i) * vset(p_.scale));
        for (int d0 = 0; p_.memory.data && d0 < D_; d0 += keys_max_) {
            keys_.load_memory(p_, b, h, d0, min_of(keys_max_, D_ - d0));
            with_phi(p_.phi, [&](auto phi) { tile_.template memory_dq<decltype(phi)>(*from, keys_, dq); });
        }
        transpose(dq, 4 * q.width, D_, q.lanes, rows_, ld);
        for (int i = 0; i < q.lanes; ++i)
            narrow(rows_ + (int64_t)i * ld, (Storage *)at(p_.dq, b, h, q.l0 + i, Ops::kSize), D_);
    }

    const CpuBwdParams &whole_;
    CpuBwdParams p_;  // as the sample sees it that is computed
    int D_, Dp_, keys_max_, slots_;
    Arena arena_;
    BwdTile<Storage, Dot> tile_;
    Keys keys_;
    Queries queries_[kMaxSlots];
    int64_t budgeted_, prefix_rows_;
    int64_t next_ = INT64_MAX, fetched_ = 0;  // sample of a fused unit, and how much of it was asked for
    float *rows_, *dq_, *dropped_ = nullptr;
    // KeySums': of keys, then of values
    float *chunk_, *chunk_totals_ = nullptr, *prefix_sums_ = nullptr, *prefix_totals_ = nullptr;
    int64_t chunk_added_ = 0, *prefix_added_ = nullptr;
};

}  // namespace PA_ISA
}  // namespace prefixattn
