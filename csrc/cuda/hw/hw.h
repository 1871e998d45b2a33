// The one way from a kernel to the hardware. Kernels of csrc/cuda include this header and use no other intrinsic, so
// that the same source runs on a GPU (device.h) and, checked, on a CPU (host.h).
//
// A kernel is a struct:
//
//     template <class E> struct Copy {
//         using Params = CopyLaunch;                   // a plain struct, passed by value
//         static constexpr int kThreads = 128;         // of a block, a multiple of 32
//         static constexpr int kMinBlocks = 1;         // blocks that a multiprocessor should hold
//         static constexpr const char *kName = "copy";
//         PA_DEVICE static void run(const Params &p);  // what a thread does
//     };
//     const char *error = hw::launch<Copy<hw::BF16>>({x, y, z}, shared_bytes, params, stream);  // null: none
//
// `Here` says where a call stands: nothing on a GPU, file and line on a CPU. It is never written out by a kernel,
// except by a helper that wants its own caller to be named.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "api/semantics.h"  // PA_HOST_DEVICE

#if defined(__CUDACC__)
#define PA_DEVICE __device__ __forceinline__
#define PA_UNROLL _Pragma("unroll")
#define PA_NO_UNROLL _Pragma("unroll 1")
#else
#define PA_DEVICE inline
#define PA_UNROLL
#define PA_NO_UNROLL
#endif

namespace prefixattn::hw {

constexpr int kWarp = 32;           // lanes
constexpr int kNamedBarriers = 16;  // of a block, 0 among them

struct Grid {
    int x = 1, y = 1, z = 1;
};

// Storage of the types that mma takes.
struct BF16 {
    uint16_t bits;
};
struct FP16 {
    uint16_t bits;
};

// What moves in one access of 8 or 16 bytes.
struct alignas(8) Words2 {
    uint32_t x[2];
};
struct alignas(16) Words4 {
    uint32_t x[4];
};
struct alignas(8) Floats2 {
    float x[2];
};
struct alignas(16) Floats4 {
    float x[4];
};

// A byte address in the block's dynamic shared memory; that of shared_begin() need not be 0.
struct Shared {
    uint32_t at;
};
PA_HOST_DEVICE constexpr Shared operator+(Shared s, int bytes) { return {s.at + (uint32_t)bytes}; }

}  // namespace prefixattn::hw

#if defined(__CUDACC__)
#include "cuda/hw/device.h"  // IWYU pragma: export
#else
#include "cuda/hw/host.h"  // IWYU pragma: export
#endif
