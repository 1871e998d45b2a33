// hw.h on a CPU: each call goes to the machine of cuda/host, which checks it. A launch ends with the first error, named
// by kernel, line, block and thread:
//   collectives  lanes of a warp at different ones or at none; barriers that wait for ever, or by different counts
//   shared       outside, not aligned, nobody has written it, a copy still fills it, no order with another's access
//   copies       late as the waits allow, their source read at the wait; one that nobody waits for
//   global       outside of the tensors that host::allow named, not aligned, no order with another's store
// mma, ldmatrix, shuffles and votes order no memory. What it cannot see: a store to global memory that another thread
// has loaded before without order, registers that nobody set, a block that spins, and time.
#pragma once
#include <cmath>
#include <type_traits>

#include "cuda/host/collectives.h"
#include "cuda/host/run.h"
#include "cuda/hw/hw.h"

namespace prefixattn::hw {

using host::Here;
PA_DEVICE constexpr Here here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

PA_DEVICE int thread() { return host::the.lane->thread; }
PA_DEVICE int lane() { return thread() % kWarp; }
PA_DEVICE int warp() { return thread() / kWarp; }
PA_DEVICE int block_x() { return host::the.block[0]; }
PA_DEVICE int block_y() { return host::the.block[1]; }
PA_DEVICE int block_z() { return host::the.block[2]; }
PA_DEVICE int grid_x() { return host::the.grid[0]; }
PA_DEVICE int grid_y() { return host::the.grid[1]; }
PA_DEVICE int grid_z() { return host::the.grid[2]; }

template <class T, int least>
constexpr void check_access() {
    static_assert(sizeof(T) >= least && sizeof(T) <= 16 && !(sizeof(T) & (sizeof(T) - 1)), "no access has this size");
    static_assert(std::is_trivially_copyable<T>::value, "an access moves bits");
}

PA_DEVICE Shared shared_begin() { return {0}; }
template <class T>
PA_DEVICE T load_shared(Shared from, Here here = hw::here()) {
    check_access<T, 2>();
    T value;
    host::load_shared(from.at, &value, (uint32_t)sizeof(T), here);
    return value;
}
template <class T>
PA_DEVICE void store_shared(Shared to, T value, Here here = hw::here()) {
    check_access<T, 2>();
    host::store_shared(to.at, &value, (uint32_t)sizeof(T), here);
}

template <class T>
PA_DEVICE T load_global(const T *from, Here here = hw::here()) {
    check_access<T, 1>();
    T value;
    host::load_global(from, &value, (uint32_t)sizeof(T), host::Load::kPlain, here);
    return value;
}
template <class T>
PA_DEVICE T load_global_cached(const T *from, Here here = hw::here()) {
    check_access<T, 1>();
    T value;
    host::load_global(from, &value, (uint32_t)sizeof(T), host::Load::kCached, here);
    return value;
}
template <class T>
PA_DEVICE T load_global_fresh(const T *from, Here here = hw::here()) {
    check_access<T, 1>();
    T value;
    host::load_global(from, &value, (uint32_t)sizeof(T), host::Load::kFresh, here);
    return value;
}
template <class T>
PA_DEVICE void store_global(T *to, T value, Here here = hw::here()) {
    check_access<T, 2>();
    host::store_global(to, &value, (uint32_t)sizeof(T), here);
}

PA_DEVICE void copy_async16(Shared to, const void *from, bool inside, Here here = hw::here()) {
    host::copy_async(to.at, from, 16, inside, here);
}
PA_DEVICE void copy_async4(Shared to, const void *from, bool inside, Here here = hw::here()) {
    host::copy_async(to.at, from, 4, inside, here);
}
PA_DEVICE void copy_commit(Here = hw::here()) { host::copy_commit(); }
template <int kPending>
PA_DEVICE void copy_wait(Here = hw::here()) {
    host::copy_wait(kPending);
}

PA_DEVICE void sync_block(Here here = hw::here()) {
    host::BarrierOperands all{0, host::the.warps_in_block * kWarp};
    host::meet(host::Op::kSyncBlock, here, &all, nullptr);
}
PA_DEVICE void sync_named(int id, int threads, Here here = hw::here()) {
    host::BarrierOperands named{id, threads};
    host::meet(host::Op::kSyncNamed, here, &named, nullptr);
}
PA_DEVICE void sync_warp(Here here = hw::here()) { host::meet(host::Op::kSyncWarp, here, nullptr, nullptr); }
PA_DEVICE void fence_device(Here = hw::here()) { host::fence_device(); }
PA_DEVICE uint32_t ticket(uint32_t *counter, Here here = hw::here()) { return host::ticket(counter, here); }

PA_DEVICE uint32_t shuffle(uint32_t x, int from, Here here = hw::here()) { return host::shuffle_from(x, from, here); }
PA_DEVICE uint32_t shuffle_xor(uint32_t x, int mask, Here here = hw::here()) {
    return host::shuffle_from(x, lane() ^ mask, here);
}
PA_DEVICE float shuffle(float x, int from, Here here = hw::here()) {
    return host::float_of(host::shuffle_from(host::bits_of(x), from, here));
}
PA_DEVICE float shuffle_xor(float x, int mask, Here here = hw::here()) {
    return host::float_of(host::shuffle_from(host::bits_of(x), lane() ^ mask, here));
}

// Whether x is true on a lane of the warp.
PA_DEVICE bool any(bool x, Here here = hw::here()) {
    host::meet(host::Op::kVote, here, &x, host::perform_any);
    return x;
}

template <int N>
PA_DEVICE void ldmatrix(uint32_t (&r)[N], Shared row, Here here = hw::here()) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    host::LdmatrixOperands operands{row.at, N, false, r};
    host::meet(host::Op::kLdmatrix, here, &operands, host::perform_ldmatrix);
}
template <int N>
PA_DEVICE void ldmatrix_trans(uint32_t (&r)[N], Shared row, Here here = hw::here()) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    host::LdmatrixOperands operands{row.at, N, true, r};
    host::meet(host::Op::kLdmatrix, here, &operands, host::perform_ldmatrix);
}
template <class E>
PA_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Here here = hw::here()) {
    static_assert(std::is_same<E, BF16>::value || std::is_same<E, FP16>::value, "mma takes BF16 or FP16");
    host::MmaOperands operands{c, a, b};
    if constexpr (std::is_same<E, BF16>::value)
        host::meet(host::Op::kMma, here, &operands, host::perform_mma<host::bf16_to_float>);
    else
        host::meet(host::Op::kMma, here, &operands, host::perform_mma<host::fp16_to_float>);
}

PA_DEVICE float exp2(float x) { return host::flush(std::exp2(host::flush(x))); }
PA_DEVICE float log2(float x) { return host::flush(std::log2(host::flush(x))); }
PA_DEVICE float max(float a, float b) { return std::fmax(a, b); }
PA_DEVICE float min(float a, float b) { return std::fmin(a, b); }

template <class T>
PA_DEVICE T opaque(T x) {
    static_assert(std::is_integral<T>::value && sizeof(T) == 4, "of a register");
    return x;
}

template <class E>
PA_DEVICE E from_float(float x) {
    if constexpr (std::is_same<E, BF16>::value)
        return {host::bf16_from_float(x)};
    else
        return {host::fp16_from_float(x)};
}
PA_DEVICE float to_float(BF16 x) { return host::bf16_to_float(x.bits); }
PA_DEVICE float to_float(FP16 x) { return host::fp16_to_float(x.bits); }
template <class E>
PA_DEVICE uint32_t pack(float low, float high) {
    return (uint32_t)from_float<E>(low).bits | (uint32_t)from_float<E>(high).bits << 16;
}
template <class E>
PA_DEVICE float low(uint32_t both) {
    return to_float(E{(uint16_t)both});
}
template <class E>
PA_DEVICE float high(uint32_t both) {
    return to_float(E{(uint16_t)(both >> 16)});
}

using Stream = void *;

// Null, or what is wrong in words.
template <class K>
const char *launch(Grid grid, int shared_bytes, const typename K::Params &params, Stream) {
    static_assert(K::kThreads % kWarp == 0 && K::kThreads <= 1024, "a block is whole warps, at most 1024 threads");
    const auto body = [](const void *p) { K::run(*static_cast<const typename K::Params *>(p)); };
    return host::run_grid(K::kName, K::kThreads, {grid.x, grid.y, grid.z}, shared_bytes, body, &params);
}

inline const char *clear(void *at, size_t bytes, Stream) {
    std::memset(at, 0, bytes);
    return nullptr;
}

}  // namespace prefixattn::hw
