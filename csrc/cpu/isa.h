// The instruction sets that the kernels are compiled for: a row each, with both ops.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace prefixattn {

struct Isa {
    const char *name;
    bool (*runs_here)();  // asks the CPU
    const AttentionKernels *attention;
    const ReparamKernels *reparam;
};

std::vector<const Isa *> usable_isas();  // compiled in and run on this CPU, best first
const Isa &isa_in_use();
void set_isa(const std::string &name);  // one of usable_isas()

}  // namespace prefixattn
