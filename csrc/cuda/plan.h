// What a launch is decided by, and what it is, in plain numbers: no CUDA, so that both sides of launch.h know it.
#pragma once
#include <cstdint>

namespace prefixattn::cuda {

struct Device {
    int shared_bytes = 0;  // of a block, when it asks for more than it gets unasked
    int processors = 0;
};

struct Launch {
    const char *kernel = "";
    int grid[3] = {1, 1, 1};
    int threads = 0, shared_bytes = 0;
};

struct Plan {
    static constexpr int kMost = 8;
    int count = 0;
    Launch launches[kMost] = {};
    int64_t workspace = 0;  // bytes of scratch that the launches share, at an address that is a multiple of 256
};

}  // namespace prefixattn::cuda
