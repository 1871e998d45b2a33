// Calls as the CPU kernels get them: with sliding windows and packed sequences, which device code refuses and does not
// read.
#pragma once
#include "api/prefix_attn.h"

namespace prefixattn {

template <class Params>
struct OnCpu : Params {
    // Query l lies at position l + S - L, own key s at s. -1: all there are on that side; none behind it, if causal.
    int64_t window_left, window_right;  // how far from its own position a query sees own keys
    bool prefix_in_window;              // prefix row i of a sample lies at i - its length; false: seen by every query
    // Sequences packed one behind the other: B of them, of at most L queries and S keys. Null: samples of that length.
    const int64_t *cu_seqlens_q, *cu_seqlens_k;  // [B + 1], rows where a sequence begins
    int64_t total_q;                             // rows of a head in lse, dlse and mass
    // Where there are tiles: products of float32 are three of bfloat16. Both passes of a call have one arithmetic, as
    // the backward computes the scores again that lse was made of.
    bool splits_float32;
};

using CpuFwdParams = OnCpu<FwdParams>;
using CpuBwdParams = OnCpu<BwdParams>;

}  // namespace prefixattn
