// Keys or values as what products over tiles sum over, packed once for all that read them: rows of prefixes once a call
// and head, own keys once a head where a unit has all its queries. Other arithmetic reads or packs them as it goes.
#pragma once
#include "cpu/attention/operands.h"

namespace prefixattn {
namespace PA_ISA {

template <class Storage, class Dot>
class PrefixColumns {
    using Ops = Operands<Storage, Dot>;
    static constexpr int64_t kMostBytes = 4 << 20;  // of the calling thread's own memory

  public:
    explicit PrefixColumns(const AttnParams &p) : p_(p), head_(Ops::column_words(p.P, p.D)) {}

    // t: prefix_k or prefix_v. Nothing is packed where a row may be read once only, or differs by sample.
    void pack(const Strided &t, int threads) {
        const int64_t heads = p_.T * p_.Hkv, words = heads * head_;
        const bool again = p_.T < p_.B || query_blocks(p_.L) > 1 || p_.H > p_.Hkv;
        if (!Dot::kTiles || !again || p_.T > p_.B || p_.prefix_dropout_p > 0) return;
        if (words == 0 || 4 * words > kMostBytes) return;
        t_ = &t, words_ = (uint32_t *)call_scratch(4 * (size_t)words);
        parallel_for(heads, threads, pack_head, this);
    }

    // Whether rows p0 .. p0 + n are here. Where they end within a pair, the other row of it may lie past the prefix's
    // length, and hold a nan.
    bool has(int64_t p0, int n) const { return words_ && p0 % 32 == 0 && (n % 2 == 0 || p0 + n == p_.P); }

    typename Ops::Columns rows(int64_t row, int64_t g, int64_t p0) const {
        return {{}, words_ + (row * p_.Hkv + g) * head_ + p0 / 2 * p_.D};
    }

  private:
    static void pack_head(void *context, int64_t unit) {
        const PrefixColumns &x = *(const PrefixColumns *)context;
        const int P = (int)x.p_.P, D = (int)x.p_.D;
        Ops::columns(Ops::rows(*x.t_, unit / x.p_.Hkv, unit % x.p_.Hkv, 0, P, D, nullptr), P, D,
                     x.words_ + unit * x.head_);
    }

    const AttnParams &p_;
    const int64_t head_;  // words of one
    const Strided *t_ = nullptr;
    uint32_t *words_ = nullptr;
};

// Those of one sample and head, as its blocks of queries come to see them.
template <class Storage, class Dot>
class OwnColumns {
    using Ops = Operands<Storage, Dot>;
    static constexpr int64_t kMostBytes = 1 << 19;

  public:
    template <class Arena>
    void allocate(const AttnParams &p, Arena &arena) {
        const int64_t words = Dot::kTiles ? Ops::column_words(p.S, p.D) : 0;
        fits_ = words > 0 && 4 * words <= kMostBytes;
        words_ = arena.template take<uint32_t>(fits_ ? words : 0);
    }

    bool fits() const { return fits_; }

    // Rows s0 .. s0 + n of t [b, g], of which only those in `seen` are ever read; s0 lies a multiple of 32 behind the
    // first of these.
    typename Ops::Columns rows(const Strided &t, int64_t b, int64_t g, Range seen, int64_t s0, int n, int D) {
        const int64_t end = min_of((s0 + n - seen.begin + 31) / 32 * 32, seen.end - seen.begin);
        if (end > done_) {  // then done_ is a multiple of 32
            const int rows = (int)(end - done_);
            Ops::columns(Ops::rows(t, b, g, seen.begin + done_, rows, D, nullptr), rows, D, words_ + done_ / 2 * D);
            done_ = end;
        }
        return {{}, words_ + (s0 - seen.begin) / 2 * D};
    }

  private:
    int64_t done_ = 0;
    uint32_t *words_ = nullptr;
    bool fits_ = false;
};

}  // namespace PA_ISA
}  // namespace prefixattn
