// Small kernels by their bodies, for the programs of this folder: what the machine must say of each, at several seeds.
#pragma once
#include <string>

#include "cuda/hw/hw.h"
#include "tests/check.h"

namespace cases {

namespace hw = prefixattn::hw;
namespace host = prefixattn::host;

constexpr int kSeeds = 12;

struct Data {
    float *floats;
    uint32_t *counter;
};

template <int threads, void (*body)(const Data &)>
struct Case {
    using Params = Data;
    static constexpr int kThreads = threads, kMinBlocks = 1;
    static constexpr const char *kName = "case";
    PA_DEVICE static void run(const Params &p) { body(p); }
};

// A body notes the line at which the machine must stop it: MARK stands in that line, before the call.
inline int marked = 0;
#define MARK (cases::marked = __LINE__)

struct Memory {  // that bodies may touch
    alignas(16) float floats[4096];
    float between[16];
    uint32_t counter = 0;
    Memory() {
        for (int i = 0; i < 4096; ++i) floats[i] = (float)i;
    }
};

template <int threads, void (*body)(const Data &)>
std::string run(int seed, hw::Grid grid, int shared_bytes, Memory &memory) {
    host::set_seed((uint64_t)seed);
    host::forget_tensors();
    host::allow(memory.floats, sizeof memory.floats, true);
    host::allow(&memory.counter, sizeof memory.counter, true);
    const char *error = hw::launch<Case<threads, body>>(grid, shared_bytes, {memory.floats, &memory.counter}, nullptr);
    return error ? error : "";
}

// An error at each seed. The order decides which of several it is: `words` are those of one seed at least.
template <int threads, void (*body)(const Data &)>
void fails(const char *name, const char *words, hw::Grid grid = {}) {
    std::string error;
    bool said = false;
    for (int seed = 0; seed < kSeeds; ++seed) {
        Memory memory;
        marked = 0;
        error = run<threads, body>(seed, grid, 4096, memory);
        CHECK(!error.empty(), "%s, seed %d: no error", name, seed);
        said |= error.find(words) != std::string::npos;
        const std::string line = ":" + std::to_string(marked) + ", block (";
        CHECK(!marked || error.find(line) != std::string::npos, "%s, seed %d: '%s', not at line %d", name, seed,
              error.c_str(), marked);
    }
    CHECK(said, "%s: no seed says '%s', and the last '%s'", name, words, error.c_str());
}

// No error, and the same numbers at each seed.
template <int threads, void (*body)(const Data &)>
void passes(const char *name, hw::Grid grid = {}) {
    Memory first;
    for (int seed = 0; seed < kSeeds; ++seed) {
        Memory memory;
        Memory &now = seed ? memory : first;
        const std::string error = run<threads, body>(seed, grid, 4096, now);
        CHECK(error.empty(), "%s, seed %d: '%s'", name, seed, error.c_str());
        CHECK(!std::memcmp(now.floats, first.floats, sizeof first.floats), "%s: seed %d differs", name, seed);
    }
}

#define FAILS(threads, body, ...) cases::fails<threads, body>(#body, __VA_ARGS__)
#define PASSES(threads, body) cases::passes<threads, body>(#body)

}  // namespace cases
