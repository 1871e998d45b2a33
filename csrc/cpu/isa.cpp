// Compiled once for the base instruction set, like all that runs before one is chosen.
#include "cpu/isa.h"

#include <stdexcept>

namespace prefixattn {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif
bool has_nothing_special() { return true; }

// Best first. What a CPU is asked for is all that the flags of setup.py's ISA_FLAGS allow.
const Isa kIsas[] = {
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16_attention, &avx512_reparam},  // there parameters are float32
    {"avx512", has_avx512, &avx512_attention, &avx512_reparam},
    {"avx2", has_avx2, &avx2_attention, &avx2_reparam},
    {"portable", has_nothing_special, &portable_attention, &portable_reparam},
};

const Isa *&chosen() {
    static const Isa *isa = usable_isas().front();
    return isa;
}

}  // namespace

std::vector<const Isa *> usable_isas() {
    std::vector<const Isa *> usable;
    for (const Isa &isa : kIsas)
        if (isa.attention->fwd && isa.reparam->fwd && isa.runs_here()) usable.push_back(&isa);
    return usable;
}

const Isa &isa_in_use() { return *chosen(); }

void set_isa(const std::string &name) {
    std::string known;
    for (const Isa *isa : usable_isas()) {
        if (name == isa->name) {
            chosen() = isa;
            return;
        }
        known += known.empty() ? isa->name : std::string(", ") + isa->name;
    }
    throw std::invalid_argument("instruction set is '" + name + "', expected one that runs here: " + known);
}

}  // namespace prefixattn
