// Barriers and collectives: lanes that do not meet, barriers that wait for ever, and right ones.
#include "cuda/tests/cases.h"

using namespace cases;

namespace {

void diverge_in_shuffle(const Data &) {
    if (hw::lane() < 16) hw::shuffle_xor(1.f, 1);
}
void diverge_in_place(const Data &) {
    if (hw::lane() < 16)
        hw::sync_warp();
    else
        hw::sync_warp();
}
void diverge_in_kind(const Data &) {
    uint32_t r[2] = {}, a[4] = {};
    float c[4] = {};
    // clang-format off
    hw::lane() < 16 ? hw::mma<hw::BF16>(c, a, r) : hw::sync_warp();
    // clang-format on
}
void diverge_in_count(const Data &) {
    for (int i = 0; i < 1 + hw::lane() / 31; ++i) hw::sync_block();
}
void diverge_in_name(const Data &) { hw::sync_named(1 + hw::lane() % 2, 64); }
void shuffle_from_nowhere(const Data &) { hw::shuffle(1.f, 32); }

void too_few_come(const Data &) {
    if (hw::warp() == 0) hw::sync_named(1, 64);
}
void counts_differ(const Data &) { MARK, hw::sync_named(1, hw::warp() == 0 ? 64 : 96); }
void count_of_lanes(const Data &) { hw::sync_named(1, 48); }
void more_than_there_are(const Data &) { hw::sync_named(1, 96); }
void no_such_barrier(const Data &) { hw::sync_named(16, 64); }
void crossed(const Data &) {
    hw::sync_named(1 + hw::warp(), 64);
    hw::sync_named(2 - hw::warp(), 64);
}
void a_warp_has_ended(const Data &) {
    if (hw::warp() == 1) return;
    hw::sync_block();
}
void a_lane_has_ended(const Data &) {
    if (hw::lane() == 3) return;
    hw::sync_block();
}
void branches_of_warps(const Data &) {  // differ, and yet all come
    if (hw::warp() == 0)
        hw::sync_block();
    else
        hw::sync_block();
}

void sums(const Data &p) {
    float x = hw::load_global(p.floats + hw::thread());
    for (int mask = 16; mask; mask /= 2) x += hw::shuffle_xor(x, mask);
    const hw::Shared sum = hw::shared_begin() + 4 * hw::warp();
    if (hw::lane() == 0) hw::store_shared(sum, x);
    hw::sync_block();
    float all = 0;
    for (int w = 0; w < 4; ++w) all += hw::load_shared<float>(hw::shared_begin() + 4 * w);
    hw::store_global(p.floats + 128 + hw::thread(), hw::shuffle(all, 5));
}
void sums_are_right(const Data &p) {
    sums(p);
    if (hw::load_global(p.floats + 128 + hw::thread()) != 127 * 64) hw::shuffle(1.f, 99);
}
void votes(const Data &p) {
    const bool one = hw::any(hw::thread() == 37), none = hw::any(false);
    hw::store_global(p.floats + hw::thread(), one && !none ? 1.f : 0.f);
    if (one != (hw::warp() == 1) || none) hw::shuffle(1.f, 99);
}
void ping_pong(const Data &p) {  // one warp makes, another takes
    const hw::Shared place = hw::shared_begin() + 4 * hw::lane();
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
        if (hw::warp() == 0) hw::store_shared(place, (float)(i + hw::lane()));
        hw::sync_named(1, 64);
        if (hw::warp() == 1) sum += hw::load_shared<float>(place);
        hw::sync_named(2, 64);
    }
    if (hw::warp() == 1) hw::store_global(p.floats + hw::lane(), sum);
}

}  // namespace

int main() {
    FAILS(64, diverge_in_shuffle, "waits at a shuffle, and thread");
    FAILS(64, diverge_in_shuffle, "of its warp has ended");
    FAILS(32, diverge_in_place, "waits at sync_warp, and thread");
    FAILS(32, diverge_in_kind, "waits at");
    FAILS(32, diverge_in_count, "waits at sync_block, and thread");
    FAILS(64, diverge_in_name, "names barrier");
    FAILS(32, shuffle_from_nowhere, "shuffles from lane 32");
    FAILS(64, too_few_come, "deadlock, no thread can go on; barrier 1 (meetings.cpp:");
    FAILS(64, too_few_come, "has 32 of 64 threads; 1 of 2 warps have ended");
    FAILS(96, counts_differ, "of which meetings.cpp:");
    FAILS(64, count_of_lanes, "not whole warps of the block's 64");
    FAILS(64, more_than_there_are, "not whole warps of the block's 64");
    FAILS(64, no_such_barrier, "there is no barrier 16");
    FAILS(64, crossed, "deadlock");
    FAILS(64, a_warp_has_ended, "deadlock, no thread can go on; barrier 0 (");
    FAILS(64, a_lane_has_ended, "waits at sync_block, and thread");
    PASSES(64, branches_of_warps);
    PASSES(128, sums_are_right);
    PASSES(64, votes);
    PASSES(64, ping_pong);
    return check::result();
}
