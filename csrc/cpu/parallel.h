// Threads and scratch memory, compiled once for the base instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace prefixattn {

// What each thread does before its first unit of a loop and after its last, whatever a body threw; null: nothing.
struct Region {
    void (*enter)() = nullptr, (*leave)() = nullptr;
};

// Calls body(context, unit) for each unit in [0, units), on at most `threads` threads of the OpenMP runtime that is
// already in the process (torch's own). Units are handed out one by one; a result must not depend on who runs which.
// What a body throws ends the loop and is thrown again here, on the calling thread.
void parallel_for(int64_t units, int threads, void (*body)(void *context, int64_t unit), void *context,
                  Region region = {});

// A 64-byte aligned buffer of this thread, kept between calls so that its pages are touched once; never null. Throws a
// std::bad_alloc that says how much was wanted.
void *thread_scratch(size_t bytes);

// Another such buffer, for what a call makes before its loops and all their threads read.
void *call_scratch(size_t bytes);

// From now on both fail for more than this many bytes; 0: there is no limit. For tests.
void limit_scratch(size_t bytes);

// The file of the OpenMP runtime in use, or "" when none was found and everything runs on the calling thread.
const char *openmp_runtime();

}  // namespace prefixattn
