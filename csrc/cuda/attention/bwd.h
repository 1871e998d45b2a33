// The backward of one type and head size as a list of launches.
#pragma once
#include "cuda/attention/bwd_keys.h"
#include "cuda/attention/bwd_prefix.h"
#include "cuda/attention/bwd_queries.h"
#include "cuda/attention/bwd_short.h"
#include "cuda/steps.h"

namespace prefixattn::cuda {

// Scratch: tickets, then delta, then partial sums.
struct BwdScratch {
    int64_t tickets = 0, delta = 0, partial = 0;  // bytes

    static constexpr int64_t round(int64_t bytes) { return (bytes + 255) / 256 * 256; }
    int64_t bytes() const { return tickets + delta + partial; }
    void lay_out(BwdLaunch &p, void *at) const {
        const auto base = (uintptr_t)at;
        if (tickets) p.tickets = (uint32_t *)base;
        if (delta) p.delta = (float *)(base + tickets);
        if (partial) p.partial = (float *)(base + tickets + delta);
    }
};

struct BwdPlanned {
    BwdLaunch params;
    BwdScratch scratch;
    bool is_short;
};

template <int D>
BwdPlanned plan_bwd_of(const BwdParams &p, const Device &device) {
    BwdPlanned made{};
    static_cast<BwdParams &>(made.params) = p;
    BwdLaunch &x = made.params;
    x.drops = prefix_drops(p);
    x.sums_prefix = wants_prefix(p);
    made.is_short = Short::takes(p, device);
    const bool after = p.dq.data || wants_own(p);  // somebody reads delta
    x.members = (int)(p.H / p.Hkv);
    x.steps = ceil_div((int)p.L, made.is_short ? Short::kQueries : PrefixPass<D>::kQueries);
    int groups = 1, chunks = 1;
    if (made.is_short) {
        Short::fit(p, device, x.key_buffers, x.ds_buffers);
        x.runs = Short::runs(p, device);
        x.run = (int)p.B / x.runs, x.longer = (int)p.B % x.runs;
        x.slots = p.T == 1 ? x.runs : 1;
    } else {
        x.runs = PrefixPass<D>::runs(p, device);
        groups = PrefixPass<D>::groups(p), chunks = PrefixPass<D>::chunks(p);
        x.slots = (p.T == 1 ? x.runs : x.runs / (int)p.B) * groups;
        if (after) made.scratch.delta = BwdScratch::round(4 * p.B * p.H * p.L);
    }
    // a slot is written once, by one sample or by samples that have the same rows
    const bool once = p.T > 1 || p.B == 1 || (made.is_short ? one_prefix(p) : !(p.prefix_dropout_p > 0));
    x.direct = x.slots == 1 && once && !p.prefix_ids;
    if (x.sums_prefix && !x.direct) {
        const int64_t slots = p.T == 1 ? x.slots : p.B * x.slots;
        made.scratch.partial = BwdScratch::round(4 * slots * p.Hkv * 2 * p.P * p.D);
        made.scratch.tickets = BwdScratch::round(4 * chunks * p.T * p.Hkv);
    }
    return made;
}

inline int64_t bwd_workspace(const BwdParams &p, const Device &device) {
    return (p.D == 64 ? plan_bwd_of<64>(p, device) : plan_bwd_of<128>(p, device)).scratch.bytes();
}

// Gives each launch to `on`; null, or an error in words.
template <class E, int D, class On>
const char *bwd_launches(const BwdParams &p, void *workspace, const Device &device, On &&on) {
    BwdPlanned plan = plan_bwd_of<D>(p, device);
    BwdLaunch &x = plan.params;
    plan.scratch.lay_out(x, workspace);
    const char *error = nullptr;
    if (plan.scratch.tickets) error = on(Zero{x.tickets, plan.scratch.tickets});
    if (p.prefix_ids && x.sums_prefix) {  // rows of the bank that no sample uses
        for (const Strided *t : {&p.dprefix_k, &p.dprefix_v})
            if (!error && t->data) error = on(Zero{t->data, 2 * p.T * p.Hkv * p.P * p.D});
    }
    if (error) return error;
    if (plan.is_short) {
        const hw::Grid grid{(int)p.Hkv, x.runs};
        const int bytes = Short::shared_bytes(p, x.key_buffers, x.ds_buffers);
        if constexpr (D == 64)
            if (Short::tiles(Short::keys(p)) == 2) return on(Step<BwdShort<E, D, 2>>{grid, bytes, x});
        return on(Step<BwdShort<E, D, 1>>{grid, bytes, x});
    }
    const hw::Grid grid{x.runs, (int)p.Hkv, PrefixPass<D>::chunks(p)};
    error = on(Step<BwdPrefix<E, D>>{grid, PrefixPass<D>::shared_bytes(p), x});
    if (!error && wants_own(p))
        error = on(Step<BwdKeys<E, D>>{BwdKeys<E, D>::grid(p), BwdKeys<E, D>::shared_bytes(), x});
    if (!error && p.dq.data)
        error = on(Step<BwdQueries<E, D>>{BwdQueries<E, D>::grid(p), BwdQueries<E, D>::shared_bytes(), x});
    return error;
}

}  // namespace prefixattn::cuda
