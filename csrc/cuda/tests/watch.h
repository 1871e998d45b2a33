// hw.h on the host machine, with a function that is told of each access to shared memory. In place of hw.h, and first:
// the machine's functions are there before their names become those of the ones below, for hw.h and all that uses it.
#pragma once
#include "cuda/host/collectives.h"
#include "cuda/host/run.h"

namespace prefixattn::host {

enum class Touch : uint8_t { kLoad, kStore, kCopy, kMatrix };  // kMatrix: a row that a lane gives to ldmatrix
inline void (*watch)(Touch, uint32_t at, uint32_t bytes, const Lane &, Here) = nullptr;

inline void watched_load_shared(uint32_t at, void *value, uint32_t bytes, Here here) {
    if (watch) watch(Touch::kLoad, at, bytes, *the.lane, here);
    load_shared(at, value, bytes, here);
}
inline void watched_store_shared(uint32_t at, const void *value, uint32_t bytes, Here here) {
    if (watch) watch(Touch::kStore, at, bytes, *the.lane, here);
    store_shared(at, value, bytes, here);
}
inline void watched_copy_async(uint32_t to, const void *from, uint32_t bytes, bool inside, Here here) {
    if (watch) watch(Touch::kCopy, to, bytes, *the.lane, here);
    copy_async(to, from, bytes, inside, here);
}
inline void watched_perform_ldmatrix(Warp &w) {
    const auto *first = static_cast<LdmatrixOperands *>(w.lanes[0].operands);
    for (int l = 0; watch && l < 8 * first->matrices; ++l)
        watch(Touch::kMatrix, static_cast<LdmatrixOperands *>(w.lanes[l].operands)->row, 16, w.lanes[l],
              w.lanes[l].here);
    perform_ldmatrix(w);
}

}  // namespace prefixattn::host

#define load_shared watched_load_shared
#define store_shared watched_store_shared
#define copy_async watched_copy_async
#define perform_ldmatrix watched_perform_ldmatrix
#include "cuda/hw/hw.h"
