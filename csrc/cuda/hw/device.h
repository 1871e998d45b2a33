// hw.h on a GPU of sm_80 or later. Instructions are written out, because their operands are what the kernels lay out.
// What touches memory clobbers "memory": the compiler may not carry an access across it.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/hw/hw.h"

namespace prefixattn::hw {

struct Here {};
PA_DEVICE constexpr Here here() { return {}; }

PA_DEVICE int thread() { return (int)threadIdx.x; }
PA_DEVICE int lane() { return (int)(threadIdx.x % kWarp); }
PA_DEVICE int warp() { return (int)(threadIdx.x / kWarp); }
PA_DEVICE int block_x() { return (int)blockIdx.x; }
PA_DEVICE int block_y() { return (int)blockIdx.y; }
PA_DEVICE int block_z() { return (int)blockIdx.z; }
PA_DEVICE int grid_x() { return (int)gridDim.x; }
PA_DEVICE int grid_y() { return (int)gridDim.y; }
PA_DEVICE int grid_z() { return (int)gridDim.z; }

// One instruction an access: the unsigned type of as many bytes.
namespace raw {
template <int bytes>
struct Of;
template <>
struct Of<1> {
    using Type = unsigned char;
};
template <>
struct Of<2> {
    using Type = unsigned short;
};
template <>
struct Of<4> {
    using Type = unsigned int;
};
template <>
struct Of<8> {
    using Type = uint2;
};
template <>
struct Of<16> {
    using Type = uint4;
};
template <class T>
using Type = typename Of<(int)sizeof(T)>::Type;

template <class To, class From>
PA_DEVICE To cast(From from) {  // a copy: through a reference its bytes would be loaded one by one
    static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<To>::value, "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
template <class T>
PA_DEVICE Type<T> *shared(Shared at) {
    return static_cast<Type<T> *>(__cvta_shared_to_generic(at.at));
}
}  // namespace raw

PA_DEVICE Shared shared_begin() {
    extern __shared__ __align__(128) unsigned char prefixattn_shared[];
    return {(uint32_t)__cvta_generic_to_shared(prefixattn_shared)};
}
template <class T>
PA_DEVICE T load_shared(Shared from, Here = here()) {
    return raw::cast<T>(*raw::shared<T>(from));
}
template <class T>
PA_DEVICE void store_shared(Shared to, T value, Here = here()) {
    *raw::shared<T>(to) = raw::cast<raw::Type<T>>(value);
}

template <class T>
PA_DEVICE T load_global(const T *from, Here = here()) {
    return raw::cast<T>(*reinterpret_cast<const raw::Type<T> *>(from));
}
template <class T>
PA_DEVICE T load_global_cached(const T *from, Here = here()) {
    return raw::cast<T>(__ldg(reinterpret_cast<const raw::Type<T> *>(from)));
}
template <class T>
PA_DEVICE T load_global_fresh(const T *from, Here = here()) {
    return raw::cast<T>(__ldcg(reinterpret_cast<const raw::Type<T> *>(from)));
}
template <class T>
PA_DEVICE void store_global(T *to, T value, Here = here()) {
    *reinterpret_cast<raw::Type<T> *>(to) = raw::cast<raw::Type<T>>(value);
}

PA_DEVICE void copy_async16(Shared to, const void *from, bool inside, Here = here()) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.at), "l"(__cvta_generic_to_global(from)),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
PA_DEVICE void copy_async4(Shared to, const void *from, bool inside, Here = here()) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to.at), "l"(__cvta_generic_to_global(from)),
                 "r"(inside ? 4 : 0)
                 : "memory");
}
PA_DEVICE void copy_commit(Here = here()) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
PA_DEVICE void copy_wait(Here = here()) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

PA_DEVICE void sync_block(Here = here()) { __syncthreads(); }
PA_DEVICE void sync_named(int id, int threads, Here = here()) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PA_DEVICE void sync_warp(Here = here()) { __syncwarp(); }
PA_DEVICE void fence_device(Here = here()) { __threadfence(); }
PA_DEVICE uint32_t ticket(uint32_t *counter, Here = here()) { return atomicAdd(counter, 1u); }

PA_DEVICE float shuffle_xor(float x, int mask, Here = here()) { return __shfl_xor_sync(0xffffffffu, x, mask); }
PA_DEVICE uint32_t shuffle_xor(uint32_t x, int mask, Here = here()) { return __shfl_xor_sync(0xffffffffu, x, mask); }
PA_DEVICE float shuffle(float x, int from, Here = here()) { return __shfl_sync(0xffffffffu, x, from); }
PA_DEVICE uint32_t shuffle(uint32_t x, int from, Here = here()) { return __shfl_sync(0xffffffffu, x, from); }

// Whether x is true on a lane of the warp.
PA_DEVICE bool any(bool x, Here = here()) { return __any_sync(0xffffffffu, x); }

template <int N>
PA_DEVICE void ldmatrix(uint32_t (&r)[N], Shared row, Here = here()) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    if constexpr (N == 1)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row.at) : "memory");
    else if constexpr (N == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(row.at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row.at)
                     : "memory");
}
template <int N>
PA_DEVICE void ldmatrix_trans(uint32_t (&r)[N], Shared row, Here = here()) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    if constexpr (N == 1)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(row.at)
                     : "memory");
    else if constexpr (N == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(row.at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row.at)
                     : "memory");
}

template <class E>
PA_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Here = here()) {
    static_assert(std::is_same<E, BF16>::value || std::is_same<E, FP16>::value, "mma takes BF16 or FP16");
    if constexpr (std::is_same<E, BF16>::value)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

PA_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PA_DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PA_DEVICE float max(float a, float b) { return fmaxf(a, b); }
PA_DEVICE float min(float a, float b) { return fminf(a, b); }

// x, of which the compiler knows nothing: it computes anew what it would otherwise keep in a register.
template <class T>
PA_DEVICE T opaque(T x) {
    static_assert(std::is_integral<T>::value && sizeof(T) == 4, "of a register");
    asm volatile("" : "+r"(x));
    return x;
}

// Two elements of E to the nearest, ties to even; `low` is the one of the lower address.
template <class E>
PA_DEVICE uint32_t pack(float low, float high) {
    uint32_t both;
    if constexpr (std::is_same<E, BF16>::value)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <class E>
PA_DEVICE E from_float(float x) {
    unsigned short bits;
    if constexpr (std::is_same<E, BF16>::value)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
}
PA_DEVICE float to_float(BF16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
PA_DEVICE float to_float(FP16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
template <class E>
PA_DEVICE float low(uint32_t both) {
    return to_float(E{(uint16_t)both});
}
template <class E>
PA_DEVICE float high(uint32_t both) {
    return to_float(E{(uint16_t)(both >> 16)});
}

using Stream = cudaStream_t;

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kMinBlocks) entry(const __grid_constant__ typename K::Params p) {
    K::run(p);
}

constexpr int kSharedUnasked = 48 * 1024;  // a block has as much without asking

// Null, or what is wrong in words.
template <class K>
const char *launch(Grid grid, int shared_bytes, const typename K::Params &params, Stream stream) {
    static_assert(K::kThreads % kWarp == 0 && K::kThreads <= 1024, "a block is whole warps, at most 1024 threads");
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kSharedUnasked)
        error = cudaFuncSetAttribute(entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    entry<K><<<dim3(grid.x, grid.y, grid.z), K::kThreads, shared_bytes, stream>>>(params);
    error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Sets bytes to zero in the stream's order.
inline const char *clear(void *at, size_t bytes, Stream stream) {
    const cudaError_t error = cudaMemsetAsync(at, 0, bytes, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace prefixattn::hw
