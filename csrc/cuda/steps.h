// A pass as its launches, one after another: what plans them and what runs them walk the same list.
#pragma once
#include "cuda/hw/hw.h"
#include "cuda/plan.h"

namespace prefixattn::cuda {

template <class K>
struct Step {
    hw::Grid grid;
    int shared_bytes;
    const typename K::Params &params;
};

// Bytes to be zero before the launches after it.
struct Zero {
    void *at;
    int64_t bytes;
};

// Both say whether a list may go on: null, or an error in words.
struct Planner {
    Plan &made;

    template <class K>
    const char *operator()(const Step<K> &step) const {
        if (made.count == Plan::kMost) return "more launches than a plan holds";
        made.launches[made.count++] = {
            K::kName, {step.grid.x, step.grid.y, step.grid.z}, K::kThreads, step.shared_bytes};
        return nullptr;
    }
    const char *operator()(const Zero &) const { return nullptr; }
};

struct Runner {
    hw::Stream stream;

    template <class K>
    const char *operator()(const Step<K> &step) const {
        return hw::launch<K>(step.grid, step.shared_bytes, step.params, stream);
    }
    const char *operator()(const Zero &zero) const { return hw::clear(zero.at, (size_t)zero.bytes, stream); }
};

}  // namespace prefixattn::cuda
