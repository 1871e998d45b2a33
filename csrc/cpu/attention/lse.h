// lse of a query from the maximum of its scores and the sum of what exceeds it, in natural units.
#pragma once
#include "api/semantics.h"
#include "cpu/vec.h"

namespace prefixattn {
namespace PA_ISA {

template <class Storage>
Lse<Storage> log_of_sum(float max, float sum) {
    return sum != 0 ? (Lse<Storage>)(max + __builtin_log((double)sum)) : (Lse<Storage>)kMinusInf;
}

}  // namespace PA_ISA
}  // namespace prefixattn
