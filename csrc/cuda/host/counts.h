// What launches have done since they were last reset, so that a test can count products and bytes.
#pragma once
#include <cstdint>

namespace prefixattn::host {

struct Counts {
    int64_t launches = 0, blocks = 0;
    int64_t mma = 0;                                        // of warps: 16 x 8 x 16 products each
    int64_t ldmatrix = 0, ldmatrix_conflicts = 0;           // 8 x 8 matrices, and passes beyond one for each
    int64_t shuffles = 0, barriers = 0;                     // of warps; votes are among the shuffles
    int64_t load_bytes = 0, store_bytes = 0;                // global memory, through load_global and store_global
    int64_t copy_bytes = 0;                                 // global memory, through asynchronous copies
    int64_t shared_load_bytes = 0, shared_store_bytes = 0;  // copies and ldmatrix apart
};

}  // namespace prefixattn::host
