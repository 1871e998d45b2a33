// Shared and global memory as a thread sees them.
#pragma once
#include "cuda/host/machine.h"

namespace prefixattn::host {

inline unsigned char *shared_access(uint32_t at, uint32_t bytes, Here here, int thread, const char *what) {
    if (at > the.shared_size || the.shared_size - at < bytes)
        fail(here, thread, format("%s %u bytes at shared byte %u of %u", what, bytes, at, the.shared_size));
    if (at % bytes) fail(here, thread, format("%s %u bytes at shared byte %u: not aligned", what, bytes, at));
    return the.shared + at;
}
inline void read_matrix_row(const Lane &lane, uint32_t at, uint16_t (&row)[8]) {
    std::memcpy(row, shared_access(at, 16, lane.here, lane.thread, "ldmatrix reads"), 16);
}
inline void load_shared(uint32_t at, void *value, uint32_t bytes, Here here) {
    std::memcpy(value, shared_access(at, bytes, here, the.lane->thread, "reads"), bytes);
    the.counts.shared_load_bytes += bytes;
}
inline void store_shared(uint32_t at, const void *value, uint32_t bytes, Here here) {
    std::memcpy(shared_access(at, bytes, here, the.lane->thread, "writes"), value, bytes);
    the.counts.shared_store_bytes += bytes;
}

enum class Load { kPlain, kCached, kFresh };
inline void check_aligned(const void *at, uint32_t bytes, Here here, const char *what) {
    if ((uintptr_t)at % bytes) fail(here, format("%s %u bytes at global address %p: not aligned", what, bytes, at));
}
inline void load_global(const void *from, void *value, uint32_t bytes, Load, Here here) {
    check_aligned(from, bytes, here, "reads");
    std::memcpy(value, from, bytes);
    the.counts.load_bytes += bytes;
}
inline void store_global(void *to, const void *value, uint32_t bytes, Here here) {
    check_aligned(to, bytes, here, "writes");
    std::memcpy(to, value, bytes);
    the.counts.store_bytes += bytes;
}
inline void copy_async16(uint32_t to, const void *from, bool inside, Here here) {
    unsigned char *target = shared_access(to, 16, here, the.lane->thread, "copies");
    if (inside) check_aligned(from, 16, here, "copies");
    if (inside)
        std::memcpy(target, from, 16);
    else
        std::memset(target, 0, 16);
    if (inside) the.counts.copy_bytes += 16;
}
inline void copy_commit() {}
inline void copy_wait(int, Here) {}
inline void fence_device() {}
inline uint32_t ticket(uint32_t *counter, Here here) {
    check_aligned(counter, 4, here, "counts");
    return (*counter)++;
}

}  // namespace prefixattn::host
