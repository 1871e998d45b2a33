// What the programs of this folder share: the instruction set that they are compiled for, and what they say of a
// failure. One program a file and an instruction set; tests/native/test_native.py compiles and runs them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

// As the compiler's flags say, which are those of csrc/cpu/<op>/<isa>.cpp.
#if defined(__AVX512BF16__)
#define PA_ISA avx512_bf16
#define PA_AVX512
#define PA_BF16DOT
#elif defined(__AVX512F__)
#define PA_ISA avx512
#define PA_AVX512
#elif defined(__AVX2__)
#define PA_ISA avx2
#define PA_AVX2
#else
#define PA_ISA portable
#endif

namespace check {

inline int failures = 0;

// printf's arguments say what differs; the first ten failures are printed.
#define CHECK(condition, ...)                           \
    do {                                                \
        if (!(condition) && ++check::failures <= 10) {  \
            std::printf("%s:%d: ", __FILE__, __LINE__); \
            std::printf(__VA_ARGS__);                   \
            std::printf("\n");                          \
        }                                               \
    } while (false)

// What main() returns.
inline int result() {
    if (failures) std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}

inline std::mt19937 &generator() {
    static std::mt19937 made(0);
    return made;
}

inline int below(int n) { return (int)(generator()() % (unsigned)n); }

}  // namespace check
