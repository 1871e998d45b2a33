// What the machine that runs kernels on a CPU knows: the launch, the block that runs, its warps and lanes.
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

// Where a call stands in its source.
struct Here {
    const char *file;
    int line;
};
inline bool operator==(Here a, Here b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// What a warp's lanes do together.
enum class Op : uint8_t { kEnd, kSyncBlock, kSyncNamed, kSyncWarp, kShuffle, kVote, kLdmatrix, kMma };
inline const char *name_of(Op op) {
    static const char *const names[] = {"its end",   "sync_block", "sync_named", "sync_warp",
                                        "a shuffle", "a vote",     "ldmatrix",   "mma"};
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

// Order of accesses, by vector clocks of warps: a warp is in an epoch, which sync_warp and barriers end. Its lanes see
// epochs of its own that have ended, and of another warp those that a barrier has told of. Accesses of one epoch by
// different lanes have no order.
struct Clock {
    uint32_t seen[kMostWarps];  // that of the warp itself: the epoch it is in
};
inline bool is_before(int thread, uint32_t epoch, int other, const Clock &of_other) {
    if (thread == other) return true;
    const int warp = thread / kLanes;
    return warp == other / kLanes ? epoch < of_other.seen[warp] : epoch <= of_other.seen[warp];
}

struct Copy {  // an asynchronous one that has not arrived
    uint32_t to, bytes;
    const void *from;  // null: zeros
    Here here;
};

struct Lane {
    Fiber fiber;
    int thread;
    // which it waits at
    Op op;
    Here here;
    void *operands;
    // its copies in order, and where each committed group ends; `arrived` of each are done with
    std::vector<Copy> copies;
    std::vector<uint32_t> groups;
    uint32_t copies_arrived, groups_arrived;
    // the epochs it fenced in, and what it saw at the last
    std::vector<uint32_t> fences;
    Clock fenced;
};

struct Warp {
    Lane lanes[kLanes];
    int index;
    int position;                      // in the order, of the lane that runs
    uint32_t order_start, order_step;  // an odd step goes through all lanes
    bool ended;
    int barrier;  // which it waits at, or -1
    Clock clock;
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
    int grid[3] = {1, 1, 1};
    int warps_in_block = 0;
    Random random{0};
    std::string error;

    // of a block
    int block[3] = {0, 0, 0};
    uint32_t block_index = 0;
    Stacks stacks;
    std::vector<std::unique_ptr<Warp>> warps;
    Barrier barriers[kBarriers];
    Fiber main{};
    Warp *warp = nullptr;  // that runs, as does the lane
    Lane *lane = nullptr;
};
inline Machine the;

// Places of calls by small numbers, for what is kept of every access.
class Sites {
  public:
    uint16_t number(Here here) {
        Entry &e = recent_[((uintptr_t)here.file ^ (uintptr_t)here.line * 0x9E3779B1u) % kRecent];
        if (e.here.line != here.line || e.here.file != here.file) e = {here, find(here)};
        return e.number;
    }
    Here operator[](uint16_t number) const { return all_[number]; }

  private:
    static constexpr size_t kRecent = 1024;
    struct Entry {
        Here here;
        uint16_t number;
    };
    uint16_t find(Here here) {
        for (size_t i = 0; i < all_.size(); ++i)
            if (all_[i] == here) return (uint16_t)i;
        if (all_.size() > 0xffff) return 0;
        all_.push_back(here);
        return (uint16_t)(all_.size() - 1);
    }
    Entry recent_[kRecent] = {};
    std::vector<Here> all_{Here{"elsewhere", 0}};
};
inline Sites sites;

inline std::string text_of(Here here) {
    const char *slash = std::strrchr(here.file, '/');
    return std::string(slash ? slash + 1 : here.file) + ":" + std::to_string(here.line);
}
__attribute__((format(printf, 1, 2))) inline std::string format(const char *words, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, words);
    std::vsnprintf(text, sizeof text, words, arguments);
    va_end(arguments);
    return text;
}

// Ends the launch. What it leaves on the stacks of fibers owns nothing but a few words.
[[noreturn]] inline void fail(Here here, int thread, std::string words) {
    the.error = format("%s, %s, block (%d, %d, %d), thread %d: ", the.kernel, text_of(here).c_str(), the.block[0],
                       the.block[1], the.block[2], thread);
    the.error += words;
    std::string().swap(words);
    switch_fiber(the.lane->fiber, the.main);
    __builtin_unreachable();
}
[[noreturn]] inline void fail(Here here, std::string words) { fail(here, the.lane->thread, std::move(words)); }

}  // namespace prefixattn::host
