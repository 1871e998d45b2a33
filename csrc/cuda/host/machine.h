// A block of threads on a CPU. A thread is a fiber. The lanes of a warp run one after the other, in an order drawn from
// the seed, until each waits at a collective; the last to come does it for all. At a barrier, and now and then
// elsewhere, another warp of the block goes on; which one is drawn too. Blocks run one after the other in an order
// drawn.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/host/counts.h"
#include "cuda/host/fiber.h"

namespace prefixattn::host {

constexpr int kLanes = 32, kMostWarps = 32, kBarriers = 16;

struct Here {
    const char *file;
    int line;
};

enum class Op : uint8_t { kNone, kEnd, kSyncBlock, kSyncNamed, kSyncWarp, kShuffle, kLdmatrix, kMma };
inline const char *name_of(Op op) {
    static const char *const names[] = {"nothing",   "its end",   "sync_block", "sync_named",
                                        "sync_warp", "a shuffle", "ldmatrix",   "mma"};
    return names[(int)op];
}

class Random {  // splitmix64
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    uint32_t below(uint32_t n) { return (uint32_t)((next() >> 32) * n >> 32); }

  private:
    uint64_t state_;
};

struct Lane {
    Fiber fiber;
    int thread;
    Op op;  // which it waits at
    Here here;
    void *operands;
};

struct Warp {
    Lane lanes[kLanes];
    int index;
    int position;                      // in the order, of the lane that runs
    uint32_t order_start, order_step;  // an odd step goes through all lanes
    bool ended;
    int barrier;  // which it waits at, or -1
};

struct Barrier {
    int threads = 0, arrived = 0;  // how many it waits for; 0: nobody has come
    Here here{};
    uint32_t warps = 0;
};

struct Machine {
    std::mutex one_at_a_time;
    uint64_t seed = 0;
    Counts counts;

    // of a launch
    const char *kernel = "";
    void (*body)(const void *) = nullptr;
    const void *params = nullptr;
    int grid[3] = {1, 1, 1}, block[3] = {0, 0, 0};
    int warps_in_block = 0;
    Random random{0};
    std::string error;

    // of a block
    Stacks stacks;
    std::vector<std::unique_ptr<Warp>> warps;
    Barrier barriers[kBarriers];
    Fiber main{};
    Warp *warp = nullptr;
    Lane *lane = nullptr;
    std::vector<unsigned char> shared_bytes;
    unsigned char *shared = nullptr;
    uint32_t shared_size = 0;
};
inline Machine the;

inline const char *base_name(const char *file) {
    const char *slash = std::strrchr(file, '/');
    return slash ? slash + 1 : file;
}
inline std::string text_of(Here here) { return std::string(base_name(here.file)) + ":" + std::to_string(here.line); }
__attribute__((format(printf, 1, 2))) inline std::string format(const char *words, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, words);
    std::vsnprintf(text, sizeof text, words, arguments);
    va_end(arguments);
    return text;
}

// Ends the launch; what it leaves on the stacks of its fibers owns nothing.
[[noreturn]] inline void fail(Here here, int thread, const std::string &words) {
    the.error = format("%s, %s, block (%d, %d, %d), thread %d: ", the.kernel, text_of(here).c_str(), the.block[0],
                       the.block[1], the.block[2], thread) +
                words;
    switch_fiber(the.lane->fiber, the.main);
    __builtin_unreachable();
}
[[noreturn]] inline void fail(Here here, const std::string &words) { fail(here, the.lane->thread, words); }

inline int lane_in_order(const Warp &w, int position) {
    return (int)((w.order_start + w.order_step * (uint32_t)position) & (kLanes - 1));
}
inline void run_lane(Lane &next) {
    Lane *before = the.lane;
    if (before == &next) return;
    the.lane = &next;
    switch_fiber(before->fiber, next.fiber);
}
inline void begin_round(Warp &w) {
    const uint64_t drawn = the.random.next();
    w.position = 0;
    w.order_start = (uint32_t)drawn & (kLanes - 1);
    w.order_step = (uint32_t)(drawn >> 32) | 1;
}

[[noreturn]] inline void report_deadlock() {
    std::string words = "deadlock: no thread can go on";
    for (int id = 0; id < kBarriers; ++id) {
        const Barrier &b = the.barriers[id];
        if (b.threads)
            words +=
                format("; barrier %d (%s) has %d of %d threads", id, text_of(b.here).c_str(), b.arrived, b.threads);
    }
    int ended = 0;
    for (int i = 0; i < the.warps_in_block; ++i) ended += the.warps[(size_t)i]->ended;
    if (ended) words += format("; %d warps have ended", ended);
    const Lane *stuck = the.lane;
    for (int i = 0; i < the.warps_in_block; ++i)
        if (!the.warps[(size_t)i]->ended) stuck = &the.warps[(size_t)i]->lanes[0];
    fail(stuck->here, stuck->thread, words);
}

// Which warp goes on, or nullptr when all have ended.
inline Warp *draw_warp() {
    Warp *ready[kMostWarps];
    uint32_t count = 0;
    bool all_ended = true;
    for (int i = 0; i < the.warps_in_block; ++i) {
        Warp *w = the.warps[(size_t)i].get();
        all_ended &= w->ended;
        if (!w->ended && w->barrier < 0) ready[count++] = w;
    }
    if (count) return ready[the.random.below(count)];
    if (!all_ended) report_deadlock();
    return nullptr;
}

inline void check_convergence(const Warp &w) {
    const Lane &first = w.lanes[0];
    for (const Lane &l : w.lanes) {
        if (l.op == first.op && l.here.line == first.here.line && l.here.file == first.here.file) continue;
        const Lane &named = l.op == Op::kEnd ? first : l, &other = l.op == Op::kEnd ? l : first;
        if (other.op == Op::kEnd)
            fail(named.here, named.thread,
                 format("waits at %s that thread %d has ended without", name_of(named.op), other.thread));
        fail(named.here, named.thread,
             format("waits at %s while thread %d of its warp waits at %s (%s)", name_of(named.op), other.thread,
                    name_of(other.op), text_of(other.here).c_str()));
    }
}

struct NamedOperands {
    int id, threads;
};
inline void arrive(Warp &w) {
    const Lane &first = w.lanes[0];
    const NamedOperands want = *static_cast<const NamedOperands *>(first.operands);
    const int most = the.warps_in_block * kLanes;
    for (const Lane &l : w.lanes) {
        const NamedOperands other = *static_cast<const NamedOperands *>(l.operands);
        if (other.id != want.id || other.threads != want.threads)
            fail(l.here, l.thread,
                 format("names barrier %d of %d threads, thread %d of its warp barrier %d of %d", other.id,
                        other.threads, first.thread, want.id, want.threads));
    }
    if (want.id < 0 || want.id >= kBarriers) fail(first.here, first.thread, format("there is no barrier %d", want.id));
    if (want.threads <= 0 || want.threads % kLanes || want.threads > most)
        fail(first.here, first.thread,
             format("barrier %d of %d threads: not whole warps of the block's %d", want.id, want.threads, most));
    Barrier &b = the.barriers[want.id];
    if (b.threads && b.threads != want.threads)
        fail(first.here, first.thread,
             format("barrier %d of %d threads, which %s waits at for %d", want.id, want.threads,
                    text_of(b.here).c_str(), b.threads));
    b.threads = want.threads;
    b.here = first.here;
    b.arrived += kLanes;
    b.warps |= 1u << w.index;
    w.barrier = want.id;
    ++the.counts.barriers;
    if (b.arrived < b.threads) return;
    for (int i = 0; i < the.warps_in_block; ++i)
        if (b.warps >> i & 1) the.warps[(size_t)i]->barrier = -1;
    b = Barrier{};
}

constexpr uint32_t kMeetingsATurn = 16;  // of a warp, before another's turn, on average

// What the lane that came last does for its warp, and who goes on.
inline void conclude(Warp &w, void (*perform)(Warp &)) {
    check_convergence(w);
    const Op op = w.lanes[0].op;
    if (op == Op::kEnd)
        w.ended = true;
    else if (op == Op::kSyncBlock || op == Op::kSyncNamed)
        arrive(w);
    else if (perform)
        perform(w);
    Warp *next = &w;
    if (w.ended || w.barrier >= 0 || op == Op::kSyncBlock || op == Op::kSyncNamed ||
        the.random.below(kMeetingsATurn) == 0)
        next = draw_warp();
    if (!next) {
        switch_fiber(the.lane->fiber, the.main);
        __builtin_unreachable();
    }
    the.warp = next;
    begin_round(*next);
    run_lane(next->lanes[lane_in_order(*next, 0)]);
}

// The lane waits until all of its warp are here and `perform` has been done for them.
inline void meet(Op op, Here here, void *operands, void (*perform)(Warp &)) {
    Warp &w = *the.warp;
    Lane &l = *the.lane;
    l.op = op;
    l.here = here;
    l.operands = operands;
    if (++w.position < kLanes)
        run_lane(w.lanes[lane_in_order(w, w.position)]);
    else
        conclude(w, perform);
}

inline void lane_entry() {
    the.body(the.params);
    meet(Op::kEnd, Here{"", 0}, nullptr, nullptr);
    __builtin_unreachable();
}

inline void run_block() {
    std::memset(the.shared, 0xff, the.shared_size);
    for (int i = 0; i < the.warps_in_block; ++i) {
        Warp &w = *the.warps[(size_t)i];
        w.index = i;
        w.ended = false;
        w.barrier = -1;
        for (int j = 0; j < kLanes; ++j) {
            const size_t thread = (size_t)(i * kLanes + j);
            w.lanes[j].thread = (int)thread;
            w.lanes[j].op = Op::kNone;
            start_fiber(w.lanes[j].fiber, the.stacks[thread], Stacks::bytes(thread), lane_entry);
        }
    }
    for (Barrier &b : the.barriers) b = Barrier{};
    the.warp = draw_warp();
    begin_round(*the.warp);
    the.lane = &the.warp->lanes[lane_in_order(*the.warp, 0)];
    switch_fiber(the.main, the.lane->fiber);
    the.lane = nullptr;
    ++the.counts.blocks;
}

// Null, or the first error in words, which lives until this thread's next launch.
inline const char *run_grid(const char *kernel, int threads, const int (&grid)[3], int shared_bytes,
                            void (*body)(const void *), const void *params) {
    constexpr int kMostShared = 227 * 1024;  // of a block, on any GPU so far
    const std::lock_guard<std::mutex> alone(the.one_at_a_time);
    static thread_local std::string said;
    said.clear();
    if (shared_bytes < 0 || shared_bytes > kMostShared)
        said = format("%s: no GPU has %d bytes of shared memory for a block", kernel, shared_bytes);
    for (int i = 0; i < 3; ++i)
        if (grid[i] < 1 || (i && grid[i] > 65535))
            said = format("%s: a grid of (%d, %d, %d)", kernel, grid[0], grid[1], grid[2]);
    if (!the.stacks.reserve((size_t)threads))
        said = format("%s: no memory for the stacks of %d threads", kernel, threads);
    if (!said.empty()) return said.c_str();
    the.kernel = kernel;
    the.body = body;
    the.params = params;
    the.warps_in_block = threads / kLanes;
    the.error.clear();
    the.random = Random(the.seed);
    while (the.warps.size() < (size_t)the.warps_in_block) the.warps.push_back(std::make_unique<Warp>());
    the.shared_bytes.resize((size_t)shared_bytes + 128);
    the.shared = reinterpret_cast<unsigned char *>(((uintptr_t)the.shared_bytes.data() + 127) & ~(uintptr_t)127);
    the.shared_size = (uint32_t)shared_bytes;
    for (int i = 0; i < 3; ++i) the.grid[i] = grid[i];
    const int64_t blocks = (int64_t)grid[0] * grid[1] * grid[2];
    std::vector<uint32_t> order((size_t)blocks);
    for (uint32_t i = 0; i < blocks; ++i) {
        const uint32_t j = the.random.below(i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    ++the.counts.launches;
    for (const uint32_t index : order) {
        the.block[0] = (int)(index % (uint32_t)grid[0]);
        the.block[1] = (int)(index / (uint32_t)grid[0] % (uint32_t)grid[1]);
        the.block[2] = (int)(index / (uint32_t)grid[0] / (uint32_t)grid[1]);
        run_block();
        if (!the.error.empty()) break;
    }
    said = the.error;
    return said.empty() ? nullptr : said.c_str();
}

inline Counts counts() { return the.counts; }
inline void reset_counts() { the.counts = Counts{}; }
inline void set_seed(uint64_t seed) { the.seed = seed; }

}  // namespace prefixattn::host
