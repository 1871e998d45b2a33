// Asynchronous copies and global memory: each rule is broken once, and kept once.
#include "cuda/tests/cases.h"

using namespace cases;
using hw::Shared;

namespace {

Shared chunk(int i) { return hw::shared_begin() + 16 * i; }
void fetch(const Data &p, int to, int from, hw::Here here = hw::here()) {
    hw::copy_async16(chunk(to), p.floats + 4 * from, true, here);
}
void keep(const Data &p, int at) {
    hw::store_global(p.floats + 2048 + hw::thread(), hw::load_shared<float>(chunk(at)));
}

void no_wait(const Data &p) {
    const int t = hw::thread();
    fetch(p, t, t);
    hw::copy_commit();
    hw::sync_block();
    keep(p, t);
}
void no_commit(const Data &p) {
    const int t = hw::thread();
    fetch(p, t, t);
    hw::copy_wait<0>();
    hw::sync_block();
    keep(p, t);
}
void no_barrier(const Data &p) {
    const int t = hw::thread();
    fetch(p, t, t);
    hw::copy_commit();
    hw::copy_wait<0>();
    keep(p, t ^ 1);
}
void barrier_before_wait(const Data &p) {
    const int t = hw::thread();
    fetch(p, t, t);
    hw::copy_commit();
    hw::sync_block();
    hw::copy_wait<0>();
    keep(p, t ^ 32);
}
void own_copy(const Data &p) {
    const int t = hw::thread();
    fetch(p, t, t);
    hw::copy_commit();
    hw::copy_wait<0>();
    keep(p, t);
}
void right(const Data &p) {
    const int t = hw::thread();
    fetch(p, t, t);
    hw::copy_commit();
    hw::copy_wait<0>();
    hw::sync_block();
    keep(p, t ^ 32);
}
template <int pending>
void two_groups(const Data &p) {  // the older is used
    const int t = hw::thread();
    fetch(p, t, t);
    hw::copy_commit();
    fetch(p, 64 + t, 64 + t);
    hw::copy_commit();
    hw::copy_wait<pending>();
    hw::sync_block();
    keep(p, t ^ 32);
    hw::copy_wait<0>();
}
void overwritten(const Data &p) {
    fetch(p, hw::thread(), 0);
    MARK, hw::store_shared(chunk(hw::thread()), 1.f);
}
void copied_twice(const Data &p) {
    fetch(p, hw::thread(), 0);
    MARK, fetch(p, hw::thread(), 1);
}
void over_what_others_read(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(chunk(t), hw::Words4{});
    hw::sync_block();
    keep(p, t ^ 32);
    fetch(p, t, t);
    hw::copy_commit();
    hw::copy_wait<0>();
}
void never_waited_for(const Data &p) {
    MARK, hw::copy_async16(chunk(hw::thread()), p.floats, true);
    hw::copy_commit();
}
void zeros(const Data &p) {  // what is not inside is not read
    const int t = hw::thread();
    hw::copy_async16(chunk(t), t % 2 ? p.floats : nullptr, t % 2);
    hw::copy_commit();
    hw::copy_wait<0>();
    const auto x = hw::load_shared<hw::Words4>(chunk(t));
    hw::store_global(p.floats + 2048 + t, (float)(x.x[0] + x.x[1] + x.x[2] + x.x[3]));
}
void pipeline(const Data &p) {  // three stages in two places
    const int t = hw::thread();
    float sum = 0;
    fetch(p, t, t);
    hw::copy_commit();
    for (int i = 0; i < 8; ++i) {
        if (i < 7) fetch(p, (i + 1) % 2 * 64 + t, 64 * (i + 1) + t);
        hw::copy_commit();
        hw::copy_wait<1>();
        hw::sync_block();
        sum += hw::load_shared<float>(chunk(i % 2 * 64 + (t ^ 32)));
        hw::sync_block();
    }
    hw::store_global(p.floats + 2048 + t, sum);
}
// Four threads fill one chunk, which the last thread of each four reads as one.
template <bool waits>
void four_bytes(const Data &p) {
    const int t = hw::thread();
    hw::copy_async4(hw::shared_begin() + 4 * t, t % 4 ? p.floats + t : nullptr, t % 4);
    hw::copy_commit();
    if (waits) hw::copy_wait<0>();
    hw::sync_block();
    if (t % 4 == 3) {
        const auto x = hw::load_shared<hw::Floats4>(chunk(t / 4));
        for (int i = 0; i < 4; ++i) hw::store_global(p.floats + 2048 + t - 3 + i, x.x[i]);
    }
}
void four_bytes_beside(const Data &p) {  // what another copy fills of the chunk is another matter
    const int t = hw::thread();
    hw::copy_async4(hw::shared_begin() + 8 * t, p.floats + t, true);
    hw::store_shared(hw::shared_begin() + (8 * t + 4), 1.f);
    hw::copy_commit();
    hw::copy_wait<0>();
    hw::store_global(p.floats + 2048 + t, hw::load_shared<hw::Floats2>(hw::shared_begin() + 8 * t).x[0]);
}
void four_bytes_overwritten(const Data &p) {
    hw::copy_async4(chunk(hw::thread()), p.floats, true);
    MARK, hw::store_shared(chunk(hw::thread()), hw::Words4{});
}
void four_bytes_read_early(const Data &p) {
    hw::copy_async4(chunk(hw::thread()), p.floats, true);
    hw::copy_commit();
    MARK, hw::load_shared<float>(chunk(hw::thread()));
}
void four_bytes_askew(const Data &p) {
    const auto *from = reinterpret_cast<const char *>(p.floats) + 2;
    MARK, hw::copy_async4(chunk(hw::thread()), from, true);
}
void askew_source(const Data &p) { MARK, hw::copy_async16(chunk(hw::thread()), p.floats + 1, true); }

void outside(const Data &p) {
    if (hw::thread() == 9) MARK, hw::load_global(p.floats + 4096);
}
void copied_from_outside(const Data &p) { MARK, hw::copy_async16(chunk(hw::thread()), p.floats - 4, true); }
void askew(const Data &p) {
    if (hw::thread() == 9) MARK, hw::load_global(reinterpret_cast<const hw::Floats4 *>(p.floats + 1));
}
void threads_store_to_one(const Data &p) { hw::store_global(p.floats, 1.f); }
void blocks_store_to_one(const Data &p) { hw::store_global(p.floats + hw::thread(), 1.f); }
void blocks_store_apart(const Data &p) { hw::store_global(p.floats + 32 * hw::block_x() + hw::thread(), 1.f); }
void load_before_barrier(const Data &p) {
    hw::store_global(p.floats + hw::thread(), 1.f);
    hw::load_global(p.floats + (hw::thread() ^ 32));
}
void load_after_barrier(const Data &p) {
    hw::store_global(p.floats + hw::thread(), 2.f);
    hw::sync_block();
    const float x = hw::load_global(p.floats + (hw::thread() ^ 32));
    hw::store_global(p.floats + 64 + hw::thread(), x);
}
void constant_cache(const Data &p) {
    hw::store_global(p.floats + hw::thread(), 1.f);
    hw::load_global_cached(p.floats + hw::thread());
}

// The last block sums what all have stored. Bits of `fences`: before the ticket, after it.
template <int fences>
void last_block_sums(const Data &p) {
    const int t = hw::thread(), blocks = hw::grid_x();
    hw::store_global(p.floats + 64 * hw::block_x() + t, (float)hw::block_x());
    hw::sync_block();
    if (t == 0) {
        if (fences & 1) hw::fence_device();
        const uint32_t ticket = hw::ticket(p.counter);
        if (fences & 2) hw::fence_device();
        hw::store_shared(hw::shared_begin(), ticket);
    }
    hw::sync_block();
    if ((int)hw::load_shared<uint32_t>(hw::shared_begin()) != blocks - 1) return;
    float sum = 0;
    for (int b = 0; b < blocks; ++b) sum += hw::load_global_fresh(p.floats + 64 * b + t);
    hw::store_global(p.floats + 2048 + t, sum);
}
void all_threads_fence(const Data &p) {
    const int t = hw::thread(), blocks = hw::grid_x();
    hw::store_global(p.floats + 64 * hw::block_x() + t, (float)hw::block_x());
    hw::fence_device();
    hw::sync_block();
    if (t == 0) hw::store_shared(hw::shared_begin(), hw::ticket(p.counter));
    hw::sync_block();
    hw::fence_device();
    if ((int)hw::load_shared<uint32_t>(hw::shared_begin()) != blocks - 1) return;
    float sum = 0;
    for (int b = 0; b < blocks; ++b) sum += hw::load_global_fresh(p.floats + 64 * b + t);
    hw::store_global(p.floats + 2048 + t, sum);
}

void four_bytes_are_right() {
    Memory memory;
    host::reset_counts();
    const std::string error = run<64, four_bytes<true>>(0, {}, 4096, memory);
    CHECK(error.empty() && host::counts().copy_bytes == 48 * 4, "copies of four bytes");
    for (int t = 0; t < 64; ++t)
        CHECK(memory.floats[2048 + t] == (t % 4 ? (float)t : 0.f), "thread %d's four bytes", t);
}

void counts_are_right() {
    Memory memory;
    host::reset_counts();
    const std::string error = run<64, pipeline>(0, {}, 4096, memory);
    const host::Counts counts = host::counts();
    CHECK(error.empty() && counts.copy_bytes == 8 * 64 * 16 && counts.store_bytes == 64 * 4 && counts.load_bytes == 0 &&
              counts.shared_load_bytes == 8 * 64 * 4 && counts.barriers == 32 && counts.blocks == 1,
          "counts");
}

}  // namespace

int main() {
    FAILS(64, no_wait, "which an asynchronous copy of thread");
    FAILS(64, no_commit, "which an asynchronous copy of thread");
    FAILS(64, no_barrier, "reads shared byte");
    FAILS(64, barrier_before_wait, "reads shared byte");
    PASSES(64, own_copy);
    PASSES(64, right);
    PASSES(64, two_groups<1>);
    PASSES(64, two_groups<0>);
    FAILS(64, two_groups<2>, "still fills");
    FAILS(64, overwritten, "writes shared byte");
    FAILS(64, copied_twice, "still fills");
    FAILS(64, over_what_others_read, "with no barrier between");
    FAILS(64, never_waited_for, "ends before it has waited for this asynchronous copy");
    PASSES(64, zeros);
    PASSES(64, pipeline);
    PASSES(64, four_bytes<true>);
    FAILS(64, four_bytes<false>, "which an asynchronous copy of thread");
    PASSES(64, four_bytes_beside);
    FAILS(64, four_bytes_overwritten, "still fills");
    FAILS(64, four_bytes_read_early, "still fills");
    FAILS(64, four_bytes_askew, "copies 4 bytes at global address");
    four_bytes_are_right();
    FAILS(64, askew_source, "copies 16 bytes at global address");
    FAILS(32, outside, "which is outside of all tensors (byte");
    FAILS(32, copied_from_outside, "which is outside of all tensors");
    FAILS(32, askew, "which is not aligned");
    FAILS(32, threads_store_to_one, "stores to");
    FAILS(32, blocks_store_to_one, "stored at copies.cpp:", {2});
    cases::passes<32, blocks_store_apart>("blocks_store_apart", {4});
    FAILS(64, load_before_barrier, "with no order between");
    PASSES(64, load_after_barrier);
    FAILS(32, constant_cache, "through the cache of constants");
    FAILS(64, last_block_sums<0>, "with no order between", {6});
    FAILS(64, last_block_sums<1>, "with no order between", {6});
    FAILS(64, last_block_sums<2>, "with no order between", {6});
    cases::passes<64, last_block_sums<3>>("last_block_sums", {6});
    cases::passes<64, all_threads_fence>("all_threads_fence", {6});
    counts_are_right();
    return check::result();
}
