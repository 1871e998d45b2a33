// Compiled once for the base instruction set, like all that runs before one is chosen.
#include "cpu/isa.h"

#include <cerrno>
#include <stdexcept>
#include <system_error>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prefixattn {
namespace {

#if defined(__x86_64__)
std::string without(bool present, const char *words) { return present ? "" : std::string("this CPU has no ") + words; }

std::string lacks_avx2() {
    __builtin_cpu_init();
    return without(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
                   "AVX2");
}
std::string lacks_avx512() {
    return without(lacks_avx2().empty() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
                   "AVX-512");
}
std::string lacks_avx512_bf16() {
    return without(
        lacks_avx512().empty() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"),
        "AVX512_BF16");
}

#if defined(__linux__)
// Linux gives tile registers to a process that asks, and to all its threads, those made later too.
std::string lacks_tile_permission() {
    static const std::string refusal = [] {
        constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return std::string();
        return "the system refuses tile registers: " + std::generic_category().message(errno) +
               " (Linux gives them from 5.16 on, where no sandbox forbids it and no signal stack is too small)";
    }();
    return refusal;
}
#else
std::string lacks_tile_permission() { return "the system refuses tile registers: only Linux is asked for them"; }
#endif

std::string lacks_amx_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    // GCC 12 does not know the name of amx_fp16 in __builtin_cpu_supports; whether the system has tiles is asked below
    const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile);
    const std::string objection = without(has && lacks_avx512_bf16().empty(), "AMX for bfloat16");
    return objection.empty() ? lacks_tile_permission() : objection;
}
std::string lacks_amx_fp16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kFp16 = 1u << 21;
    const std::string objection = without(__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kFp16), "AMX for float16");
    return objection.empty() ? lacks_amx_bf16() : objection;
}
#else
std::string not_x86() { return "this CPU is not x86"; }
constexpr auto lacks_avx2 = not_x86, lacks_avx512 = not_x86, lacks_avx512_bf16 = not_x86, lacks_amx_bf16 = not_x86,
               lacks_amx_fp16 = not_x86;
#endif
std::string lacks_nothing() { return ""; }

// Best first. What a CPU is asked for is all that the flags of setup.py's ISA_FLAGS allow. The network's parameters are
// float32, so no set has more for them than AVX-512. Behind "portable" are those that run by name only: plain tiles are
// slow, and float16 on tiles errs by more than the bar in some calls (bench/NOTES.md).
const Isa kIsas[] = {
    {"amx_bf16", lacks_amx_bf16, &amx_bf16_attention, &avx512_reparam},
    {"avx512_bf16", lacks_avx512_bf16, &avx512_bf16_attention, &avx512_reparam},
    {"avx512", lacks_avx512, &avx512_attention, &avx512_reparam},
    {"avx2", lacks_avx2, &avx2_attention, &avx2_reparam},
    {"portable", lacks_nothing, &portable_attention, &portable_reparam},
    {"amx_fp16", lacks_amx_fp16, &amx_fp16_attention, &avx512_reparam},
    {"amx_plain_avx512", lacks_avx512_bf16, &amx_plain_avx512_attention, &avx512_reparam},
    {"amx_plain", lacks_nothing, &amx_plain_attention, &portable_reparam},
};

const Isa *&chosen() {
    static const Isa *isa = usable_isas().front();
    return isa;
}

}  // namespace

const std::vector<const Isa *> &all_isas() {
    static const std::vector<const Isa *> all = [] {
        std::vector<const Isa *> rows;
        for (const Isa &isa : kIsas) rows.push_back(&isa);
        return rows;
    }();
    return all;
}

std::string isa_objection(const Isa &isa) {
    if (!isa.attention->fwd || !isa.reparam->fwd)
        return "it was not compiled: the compiler or its assembler does not know it";
    const std::string objection = isa.lacks();
    if (!objection.empty() || !isa.attention->multiplies || isa.attention->multiplies()) return objection;
    return "its tiles gave wrong products of small integers; please report the CPU";
}

std::vector<const Isa *> usable_isas() {
    std::vector<const Isa *> usable;
    for (const Isa *isa : all_isas())
        if (isa_objection(*isa).empty()) usable.push_back(isa);
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
