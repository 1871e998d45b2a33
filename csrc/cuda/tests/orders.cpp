// Who runs, and when: every thread of every block once, in orders that the seed decides, and again after an error.
#include <algorithm>
#include <set>
#include <string>
#include <thread>

#include "cuda/tests/cases.h"

using namespace cases;

namespace {

// What the machine ran, in its order.
std::vector<int> ran;

void note(const Data &) {
    const int block = hw::block_x() + hw::grid_x() * (hw::block_y() + hw::grid_y() * hw::block_z());
    ran.push_back(block * 1024 + hw::thread());
}
void note_rounds(const Data &p) {
    for (int i = 0; i < 3; ++i) {
        note(p);
        hw::sync_warp();
    }
}
void fails_once(const Data &) {
    if (hw::thread() == 11) hw::load_shared<float>(hw::shared_begin());
    hw::sync_block();
}
void identity(const Data &p) {
    const bool right = hw::lane() == hw::thread() % 32 && hw::warp() == hw::thread() / 32 && hw::grid_z() == 1;
    hw::store_global(p.floats + hw::thread(), right ? 1.f : 0.f);
}

template <int threads, void (*body)(const Data &)>
std::vector<int> order(int seed, hw::Grid grid) {
    Memory memory;
    ran.clear();
    const std::string error = run<threads, body>(seed, grid, 64, memory);
    CHECK(error.empty(), "%s", error.c_str());
    return ran;
}

void everybody_once() {
    std::vector<int> got = order<1024, note>(3, {3, 2, 2});
    std::sort(got.begin(), got.end());
    CHECK(got.size() == 12 * 1024, "%d threads ran", (int)got.size());
    for (int i = 0; i < (int)got.size(); ++i) CHECK(got[(size_t)i] == i, "thread %d did not run once", i);
}

template <int threads, void (*body)(const Data &)>
void orders_differ(const char *what, hw::Grid grid) {
    std::set<std::vector<int>> seen;
    for (int seed = 0; seed < 20; ++seed) {
        seen.insert(order<threads, body>(seed, grid));
        CHECK((order<threads, body>(seed, grid) == *seen.find(ran)), "%s: a seed twice", what);
    }
    CHECK(seen.size() == 20, "%s: %d orders of 20 seeds", what, (int)seen.size());
}

void goes_on_after_an_error() {
    for (int i = 0; i < 100; ++i) {
        Memory memory;
        const std::string error = run<256, fails_once>(i, {}, 64, memory);
        CHECK(error.find("block (0, 0, 0), thread 11: reads shared byte 0") != std::string::npos, "%s", error.c_str());
        order<64, note_rounds>(i, {});
    }
}

void any_thread_may_launch() {
    std::thread other([] {
        Memory memory;
        const std::string error = run<64, identity>(0, {}, 64, memory);
        CHECK(error.empty() && memory.floats[63] == 1.f, "%s", error.c_str());
    });
    Memory memory;
    other.join();
    CHECK((run<64, identity>(0, {}, 64, memory).empty() && memory.floats[0] == 1.f), "identity");
}

void refusals() {
    Memory memory;
    CHECK((run<32, note>(0, {0}, 64, memory) == "case: no GPU takes a grid of (0, 1, 1)"), "grid");
    CHECK((run<32, note>(0, {1, 65536}, 64, memory).find("65536") != std::string::npos), "grid");
    CHECK((run<32, note>(0, {}, 300000, memory).find("no GPU has 300000 bytes") != std::string::npos), "shared");
}

}  // namespace

int main() {
    everybody_once();
    orders_differ<32, note_rounds>("lanes", {});
    orders_differ<256, note_rounds>("warps", {});
    orders_differ<32, note>("blocks", {8});
    goes_on_after_an_error();
    any_thread_may_launch();
    refusals();
    return check::result();
}
