// Asynchronous copies arrive as late as the waits allow: their source is read at the wait, and until then the target
// holds NaN and may not be touched.
#pragma once
#include "cuda/host/global.h"
#include "cuda/host/shared.h"

namespace prefixattn::host {

inline void copy_async(uint32_t to, const void *from, uint32_t bytes, bool inside, Here here) {
    if (inside) {
        global.check_load(from, bytes, Load::kPlain, here, "copies");
        the.counts.copy_bytes += bytes;
    }
    shared.write(to, bytes, *the.lane, here, Cell::kPending);
    shared.poison(to, bytes);
    the.lane->copies.push_back({to, bytes, inside ? from : nullptr, here});
}

inline void copy_commit() { the.lane->groups.push_back((uint32_t)the.lane->copies.size()); }

// All groups of the thread but the newest `pending` have arrived.
inline void copy_wait(int pending) {
    Lane &lane = *the.lane;
    while ((int)(lane.groups.size() - lane.groups_arrived) > pending) {
        const uint32_t end = lane.groups[lane.groups_arrived++];
        for (; lane.copies_arrived < end; ++lane.copies_arrived) {
            const Copy &copy = lane.copies[lane.copies_arrived];
            unsigned char *to = shared.arrive(copy.to, copy.bytes, lane);
            if (copy.from) {
                global.check_load(copy.from, copy.bytes, Load::kPlain, copy.here, "copies");
                std::memcpy(to, copy.from, copy.bytes);
            } else {
                std::memset(to, 0, copy.bytes);
            }
        }
    }
    if (lane.copies_arrived == lane.copies.size() && lane.groups_arrived == lane.groups.size()) {
        lane.copies.clear();
        lane.groups.clear();
        lane.copies_arrived = lane.groups_arrived = 0;
    }
}

inline void check_no_copy_is_left(const Lane &lane) {
    if (lane.copies_arrived < lane.copies.size())
        fail(lane.copies[lane.copies_arrived].here, "ends before it has waited for this asynchronous copy");
}

}  // namespace prefixattn::host
