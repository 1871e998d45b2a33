// Shared memory: each rule of its use is broken once, and kept once.
#include "cuda/tests/cases.h"

using namespace cases;
using hw::Shared;

namespace {

Shared word(int i) { return hw::shared_begin() + 4 * i; }
void keep(const Data &p, float x) { hw::store_global(p.floats + hw::thread(), x); }

// A number goes to the thread opposite, with nothing between, sync_warp, a shuffle or a barrier.
void exchange_bare(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(word(t), 0.f);
    hw::sync_block();
    hw::store_shared(word(t), (float)t);
    keep(p, hw::load_shared<float>(word(t ^ 1)));
}
void exchange_shuffle(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(word(t), (float)t);
    const float x = hw::shuffle_xor(1.f, 1);
    keep(p, x + hw::load_shared<float>(word(t ^ 1)));
}
void exchange_warp(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(word(t), (float)t);
    hw::sync_warp();
    keep(p, hw::load_shared<float>(word(t ^ 1)));
}
void exchange_far_warp(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(word(t), 0.f);
    hw::sync_block();
    hw::store_shared(word(t), (float)t);
    hw::sync_warp();
    keep(p, hw::load_shared<float>(word(t ^ 32)));
}
void exchange_block(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(word(t), (float)t);
    hw::sync_block();
    keep(p, hw::load_shared<float>(word(t ^ 32)));
}
void exchange_named(const Data &p) {  // between the warps of a pair alone
    const int t = hw::thread();
    hw::store_shared(word(t), (float)t);
    hw::sync_named(1 + t / 64, 64);
    keep(p, hw::load_shared<float>(word(t ^ 32)));
}
void exchange_other_named(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(word(t), (float)t);
    hw::sync_named(1 + t / 64, 64);
    keep(p, hw::load_shared<float>(word(t ^ 64)));
}
void chain_of_named(const Data &p) {  // 0 tells 1, which tells 2, which tells 3
    const int t = hw::thread(), w = hw::warp();
    if (w == 0) hw::store_shared(word(t), (float)t);
    if (w > 0) hw::sync_named(w, 64);
    if (w < 3) hw::sync_named(w + 1, 64);
    if (w == 3) keep(p, hw::load_shared<float>(word(t - 96)));
}

void same_word(const Data &) { hw::store_shared(word(0), 1.f); }
void halves_of_word(const Data &) { hw::store_shared(hw::shared_begin() + 2 * hw::thread(), (uint16_t)1); }
void reuse_bare(const Data &p) {  // what others read is written anew
    const int t = hw::thread();
    hw::store_shared(word(t), 1.f);
    hw::sync_block();
    keep(p, hw::load_shared<float>(word(t ^ 32)));
    hw::store_shared(word(t), 2.f);
}
void reuse_block(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(word(t), 1.f);
    hw::sync_block();
    keep(p, hw::load_shared<float>(word(t ^ 32)));
    hw::sync_block();
    hw::store_shared(word(t), 2.f);
}
void reuse_after_two_readers(const Data &p) {  // the second reader is the one that has no order
    const int t = hw::thread(), w = hw::warp();
    if (w == 0) hw::store_shared(word(t), 1.f);
    hw::sync_block();
    keep(p, hw::load_shared<float>(word(t % 32)));
    if (w < 2) hw::sync_named(1, 64);
    if (w == 0) hw::store_shared(word(t), 2.f);
}
void own_words(const Data &p) {
    const int t = hw::thread();
    for (int i = 0; i < 4; ++i) {
        hw::store_shared(word(t), (float)i);
        keep(p, hw::load_shared<float>(word(t)));
    }
}

void never_written(const Data &p) { keep(p, hw::load_shared<float>(word(5))); }
void half_written(const Data &p) {
    if (hw::thread() == 0) {
        hw::store_shared(word(0), 1.f);
        keep(p, hw::load_shared<hw::Floats2>(word(0)).x[0]);
    }
}
void past_the_end(const Data &) {
    if (hw::thread() == 7) MARK, hw::store_shared(word(1024), 1.f);
}
void before_the_begin(const Data &) {
    if (hw::thread() == 7) MARK, hw::store_shared(word(-1), 1.f);
}
void not_aligned(const Data &) {
    if (hw::thread() == 7) MARK, hw::store_shared(word(1), hw::Words4{});
}

// Rows of 16 bytes for ldmatrix.
template <bool sync>
void matrix(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(hw::shared_begin() + 16 * t, hw::Words4{{(uint32_t)t}});
    if (sync) hw::sync_warp();
    uint32_t r[4];
    hw::ldmatrix(r, hw::shared_begin() + 16 * t);
    keep(p, (float)r[0]);
}
template <bool sync>
void matrix_reuse(const Data &p) {
    const int t = hw::thread();
    hw::store_shared(hw::shared_begin() + 16 * t, hw::Words4{{(uint32_t)t}});
    hw::sync_warp();
    uint32_t r[4];
    hw::ldmatrix(r, hw::shared_begin() + 16 * t);
    if (sync) hw::sync_warp();
    hw::store_shared(hw::shared_begin() + 16 * t, hw::Words4{});
    keep(p, (float)r[0]);
}
void matrix_askew(const Data &) {
    hw::store_shared(hw::shared_begin() + 16 * hw::thread(), hw::Words4{});
    hw::sync_warp();
    uint32_t r[1];
    hw::ldmatrix(r, hw::shared_begin() + 8);
}

}  // namespace

int main() {
    FAILS(32, exchange_bare, "with no barrier between");
    FAILS(32, exchange_shuffle, "with no barrier between");
    PASSES(32, exchange_warp);
    FAILS(64, exchange_far_warp, "with no barrier between");
    PASSES(64, exchange_block);
    PASSES(128, exchange_named);
    FAILS(128, exchange_other_named, "with no barrier between");
    PASSES(128, chain_of_named);
    FAILS(64, same_word, "writes shared byte 0, which thread");
    PASSES(64, halves_of_word);
    FAILS(64, reuse_bare, "with no barrier between");
    PASSES(64, reuse_block);
    FAILS(96, reuse_after_two_readers, "read at races.cpp:");
    PASSES(64, own_words);
    FAILS(32, never_written, "reads shared byte 20, which nobody has written");
    FAILS(32, half_written, "reads shared byte 4, which nobody has written");
    FAILS(32, past_the_end, "thread 7: writes 4 bytes at shared byte 4096 of 4096");
    FAILS(32, before_the_begin, "thread 7: writes 4 bytes at shared byte -4 of 4096");
    FAILS(32, not_aligned, "thread 7: writes 16 bytes at shared byte 4, which is not aligned");
    FAILS(32, matrix<false>, "with no barrier between");
    PASSES(32, matrix<true>);
    FAILS(32, matrix_reuse<false>, "with no barrier between");
    PASSES(32, matrix_reuse<true>);
    FAILS(32, matrix_askew, "reads 16 bytes at shared byte 8, which is not aligned");
    return check::result();
}
