// A launch: its blocks run one after the other, in an order drawn from the seed.
#pragma once
#include "cuda/host/copies.h"
#include "cuda/host/schedule.h"

namespace prefixattn::host {

inline void lane_entry() {
    the.body(the.params);
    check_no_copy_is_left(*the.lane);
    meet(Op::kEnd, Here{"", 0}, nullptr, nullptr);
    __builtin_unreachable();
}

inline void start_lane(Lane &lane, int thread) {
    lane.thread = thread;
    lane.copies.clear();
    lane.groups.clear();
    lane.copies_arrived = lane.groups_arrived = 0;
    lane.fences.clear();
    start_fiber(lane.fiber, the.stacks[(size_t)thread], Stacks::bytes((size_t)thread), lane_entry);
}

inline void run_block(uint32_t index, uint32_t shared_bytes) {
    the.block_index = index;
    the.block[0] = (int)(index % (uint32_t)the.grid[0]);
    the.block[1] = (int)(index / (uint32_t)the.grid[0] % (uint32_t)the.grid[1]);
    the.block[2] = (int)(index / (uint32_t)the.grid[0] / (uint32_t)the.grid[1]);
    shared.start(shared_bytes);
    global.start_block();
    for (int i = 0; i < the.warps_in_block; ++i) {
        Warp &w = warp_of_block(i);
        w.index = i;
        w.ended = false;
        w.barrier = -1;
        w.clock = Clock{};
        end_epoch(w);
        for (int l = 0; l < kLanes; ++l) start_lane(w.lanes[l], i * kLanes + l);
    }
    for (Barrier &b : the.barriers) b = Barrier{};
    the.warp = draw_warp();
    begin_round(*the.warp);
    the.lane = &lane_in_order(*the.warp);
    switch_fiber(the.main, the.lane->fiber);
    the.lane = nullptr;
    ++the.counts.blocks;
}

constexpr int kMostShared = 227 * 1024;  // bytes of a block, on any GPU so far

inline std::string objection(const char *kernel, int threads, const int (&grid)[3], int shared_bytes) {
    if (shared_bytes < 0 || shared_bytes > kMostShared)
        return format("%s: no GPU has %d bytes of shared memory for a block", kernel, shared_bytes);
    if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[1] > 65535 || grid[2] > 65535)
        return format("%s: no GPU takes a grid of (%d, %d, %d)", kernel, grid[0], grid[1], grid[2]);
    if (!the.stacks.reserve((size_t)threads))
        return format("%s: no memory for the stacks of %d threads", kernel, threads);
    return "";
}

// Null, or the first error in words, which lives until this thread's next launch.
inline const char *run_grid(const char *kernel, int threads, const int (&grid)[3], int shared_bytes,
                            void (*body)(const void *), const void *params) {
    static thread_local std::string said;
    const std::lock_guard<std::mutex> alone(the.one_at_a_time);
    said = objection(kernel, threads, grid, shared_bytes);
    if (!said.empty()) return said.c_str();
    the.kernel = kernel;
    the.body = body;
    the.params = params;
    the.warps_in_block = threads / kLanes;
    the.error.clear();
    the.random = Random(the.seed);
    for (int i = 0; i < 3; ++i) the.grid[i] = grid[i];
    while (the.warps.size() < (size_t)the.warps_in_block) the.warps.push_back(std::make_unique<Warp>());
    global.start_launch();
    std::vector<uint32_t> order((size_t)grid[0] * (size_t)grid[1] * (size_t)grid[2]);
    for (uint32_t i = 0; i < order.size(); ++i) {
        const uint32_t j = the.random.below(i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    ++the.counts.launches;
    for (size_t i = 0; i < order.size() && the.error.empty(); ++i) run_block(order[i], (uint32_t)shared_bytes);
    said = the.error;
    return said.empty() ? nullptr : said.c_str();
}

// Of the launches that follow.
inline void set_seed(uint64_t seed) { the.seed = seed; }
inline Counts counts() { return the.counts; }
inline void reset_counts() { the.counts = Counts{}; }
// As soon as one tensor is named, kernels may touch no other global memory.
inline void allow(const void *at, size_t bytes, bool writable) {
    const auto *begin = static_cast<const unsigned char *>(at);
    global.allow({begin, begin + bytes, writable});
}
inline void forget_tensors() { global.forget_regions(); }

}  // namespace prefixattn::host
