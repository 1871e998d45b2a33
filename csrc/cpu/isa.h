// The instruction sets that the kernels are compiled for: a row each, with both ops.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace prefixattn {

struct Isa {
    const char *name;
    std::string (*lacks)();  // what this CPU or its system lacks; empty: nothing
    const AttentionKernels *attention;
    const ReparamKernels *reparam;
};

const std::vector<const Isa *> &all_isas();  // best first; behind "portable" those that run by name only
std::string isa_objection(const Isa &);      // why it does not run here, in words; empty: it does
std::vector<const Isa *> usable_isas();      // those without an objection
const Isa &isa_in_use();
void set_isa(const std::string &name);  // one of usable_isas()

}  // namespace prefixattn
