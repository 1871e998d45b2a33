// Who runs. The lanes of a warp run one after the other, in an order drawn from the seed, until each waits at a
// collective; the last to come does it for all. At a barrier, and now and then elsewhere, another warp of the block
// goes on; which one is drawn too.
#pragma once
#include "cuda/host/state.h"

namespace prefixattn::host {

inline Warp &warp_of_block(int i) { return *the.warps[(size_t)i]; }

inline Lane &lane_in_order(Warp &w) {
    return w.lanes[(w.order_start + w.order_step * (uint32_t)w.position) & (kLanes - 1)];
}
inline void begin_round(Warp &w) {
    const uint64_t drawn = the.random.next();
    w.position = 0;
    w.order_start = (uint32_t)drawn & (kLanes - 1);
    w.order_step = (uint32_t)(drawn >> 32) | 1;
}
inline void run_lane(Lane &next) {
    Lane *before = the.lane;
    if (before == &next) return;
    the.lane = &next;
    switch_fiber(before->fiber, next.fiber);
}

[[noreturn]] inline void report_deadlock() {
    std::string words = "deadlock, no thread can go on";
    for (int id = 0; id < kBarriers; ++id) {
        const Barrier &b = the.barriers[id];
        if (b.threads)
            words +=
                format("; barrier %d (%s) has %d of %d threads", id, text_of(b.here).c_str(), b.arrived, b.threads);
    }
    int ended = 0;
    const Lane *stuck = the.lane;
    for (int i = 0; i < the.warps_in_block; ++i) {
        ended += warp_of_block(i).ended;
        if (!warp_of_block(i).ended) stuck = &warp_of_block(i).lanes[0];
    }
    if (ended) words += format("; %d of %d warps have ended", ended, the.warps_in_block);
    fail(stuck->here, stuck->thread, std::move(words));
}

// Which warp goes on, or null when all have ended.
inline Warp *draw_warp() {
    Warp *ready[kMostWarps];
    uint32_t count = 0;
    bool all_ended = true;
    for (int i = 0; i < the.warps_in_block; ++i) {
        Warp &w = warp_of_block(i);
        all_ended &= w.ended;
        if (!w.ended && w.barrier < 0) ready[count++] = &w;
    }
    if (count) return ready[the.random.below(count)];
    if (!all_ended) report_deadlock();
    return nullptr;
}

inline void check_convergence(const Warp &w) {
    const Lane &first = w.lanes[0];
    for (const Lane &l : w.lanes) {
        if (l.op == first.op && l.here == first.here) continue;
        const Lane &named = l.op == Op::kEnd ? first : l, &other = l.op == Op::kEnd ? l : first;
        if (other.op == Op::kEnd)
            fail(named.here, named.thread,
                 format("waits at %s, and thread %d of its warp has ended", name_of(named.op), other.thread));
        fail(named.here, named.thread,
             format("waits at %s, and thread %d of its warp at %s (%s)", name_of(named.op), other.thread,
                    name_of(other.op), text_of(other.here).c_str()));
    }
}

inline void end_epoch(Warp &w) { ++w.clock.seen[w.index]; }

// All that came see what each had seen.
inline void release(Barrier &b) {
    Clock joined{};
    for (int i = 0; i < the.warps_in_block; ++i)
        if (b.warps >> i & 1)
            for (int j = 0; j < the.warps_in_block; ++j)
                if (warp_of_block(i).clock.seen[j] > joined.seen[j]) joined.seen[j] = warp_of_block(i).clock.seen[j];
    for (int i = 0; i < the.warps_in_block; ++i)
        if (b.warps >> i & 1) {
            Warp &w = warp_of_block(i);
            w.barrier = -1;
            w.clock = joined;
            end_epoch(w);
        }
    b = Barrier{};
}

struct BarrierOperands {
    int id, threads;
};
inline void arrive(Warp &w) {
    const Lane &first = w.lanes[0];
    const BarrierOperands want = *static_cast<const BarrierOperands *>(first.operands);
    const int most = the.warps_in_block * kLanes;
    for (const Lane &l : w.lanes) {
        const BarrierOperands other = *static_cast<const BarrierOperands *>(l.operands);
        if (other.id != want.id || other.threads != want.threads)
            fail(l.here, l.thread,
                 format("names barrier %d of %d threads, and thread %d of its warp barrier %d of %d", other.id,
                        other.threads, first.thread, want.id, want.threads));
    }
    if (want.id < 0 || want.id >= kBarriers) fail(first.here, first.thread, format("there is no barrier %d", want.id));
    if (want.threads <= 0 || want.threads % kLanes || want.threads > most)
        fail(first.here, first.thread,
             format("barrier %d of %d threads, which are not whole warps of the block's %d", want.id, want.threads,
                    most));
    Barrier &b = the.barriers[want.id];
    if (b.threads && b.threads != want.threads)
        fail(first.here, first.thread,
             format("barrier %d of %d threads, of which %s says %d", want.id, want.threads, text_of(b.here).c_str(),
                    b.threads));
    b.threads = want.threads;
    b.here = first.here;
    b.arrived += kLanes;
    b.warps |= 1u << w.index;
    w.barrier = want.id;
    ++the.counts.barriers;
    if (b.arrived == b.threads) release(b);
}

constexpr uint32_t kMeetingsATurn = 16;  // of a warp, on average, before another's turn

// What the lane that came last does for its warp, and who goes on.
inline void conclude(Warp &w, void (*perform)(Warp &)) {
    check_convergence(w);
    bool turn_ends = the.random.below(kMeetingsATurn) == 0;
    switch (w.lanes[0].op) {
        case Op::kEnd:
            w.ended = turn_ends = true;
            break;
        case Op::kSyncBlock:
        case Op::kSyncNamed:
            arrive(w);
            turn_ends = true;
            break;
        case Op::kSyncWarp:
            end_epoch(w);
            break;
        default:
            perform(w);
    }
    if (turn_ends) {
        Warp *next = draw_warp();
        if (!next) {
            switch_fiber(the.lane->fiber, the.main);
            __builtin_unreachable();
        }
        the.warp = next;
    }
    begin_round(*the.warp);
    run_lane(lane_in_order(*the.warp));
}

// The lane waits until all of its warp are here and `perform` has been done for them.
inline void meet(Op op, Here here, void *operands, void (*perform)(Warp &)) {
    Warp &w = *the.warp;
    Lane &l = *the.lane;
    l.op = op;
    l.here = here;
    l.operands = operands;
    if (++w.position < kLanes)
        run_lane(lane_in_order(w));
    else
        conclude(w, perform);
}

}  // namespace prefixattn::host
