// Calls as the CPU kernels get them: with sliding windows, which device code refuses and does not read.
#pragma once
#include "api/prefix_attn.h"

namespace prefixattn {

// Query l lies at position l + S - L, own key s at s. -1: all there are on that side; left of all, too, if causal.
template <class Params>
struct Windowed : Params {
    int64_t window_left, window_right;  // how far from its own position a query sees own keys
    bool prefix_in_window;              // prefix row i of a sample lies at i - its length; false: seen by every query
};

using CpuFwdParams = Windowed<FwdParams>;
using CpuBwdParams = Windowed<BwdParams>;

}  // namespace prefixattn
