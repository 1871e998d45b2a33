// Prints the patterns in which warps access shared memory while the kernels run, as JSON for
// tests/native/cuda/test_maps.py, which counts bank conflicts: of each source line the addresses that lanes access at
// once, apart from what moves all of them by a multiple of 128 bytes.
#include "cuda/tests/watch.h"  // before all that includes hw.h

using namespace prefixattn;

#include <map>
#include <set>

#include "cuda/attention/bwd.h"
#include "cuda/attention/fwd.h"
#include "cuda/tests/truth.h"
#include "tests/check.h"

using namespace prefixattn::cuda;

namespace {

using Lanes32 = std::vector<int>;  // addresses, or -1
struct Site {
    std::string kernel, place;
    host::Touch what;
    int bytes;
    bool operator<(const Site &o) const {
        return std::tie(kernel, place, what, bytes) < std::tie(o.kernel, o.place, o.what, o.bytes);
    }
};
std::map<Site, std::set<Lanes32>> patterns;

// A lane's accesses at a line are numbered, and those of one number are a warp's instruction.
struct Key {
    uint32_t block;
    int warp, line;
    const char *file;
    host::Touch what;
    bool operator<(const Key &o) const {
        return std::tie(block, warp, line, file, what) < std::tie(o.block, o.warp, o.line, o.file, o.what);
    }
};
struct Instructions {
    int bytes = 0, done[hw::kWarp] = {};
    std::vector<Lanes32> each;
};
std::map<Key, Instructions> running;

void note(host::Touch what, uint32_t at, uint32_t bytes, const host::Lane &lane, host::Here here) {
    const int l = lane.thread % hw::kWarp;
    Instructions &of = running[{host::the.block_index, lane.thread / hw::kWarp, here.line, here.file, what}];
    CHECK(!of.bytes || of.bytes == (int)bytes, "two sizes of access at line %d", here.line);
    of.bytes = (int)bytes;
    const auto number = (size_t)of.done[l]++;
    if (number == of.each.size()) of.each.emplace_back(hw::kWarp, -1);
    of.each[number][(size_t)l] = (int)at;
}

void finish(const char *kernel) {
    for (auto &[key, of] : running) {
        const char *name = std::strrchr(key.file, '/');
        const Site site{kernel, std::string(name ? name + 1 : key.file) + ":" + std::to_string(key.line), key.what,
                        of.bytes};
        for (Lanes32 &lanes : of.each) {
            int least = 1 << 30;
            for (int at : lanes)
                if (at >= 0) least = std::min(least, at);
            for (int &at : lanes)
                if (at >= 0) at -= least / 128 * 128;
            patterns[site].insert(lanes);
        }
    }
    running.clear();
}

// Runs a launch, of whatever kernel, and watches.
struct Watcher {
    template <class K>
    const char *operator()(const Step<K> &step) const {
        host::watch = note;
        const char *error = hw::launch<K>(step.grid, step.shared_bytes, step.params, nullptr);
        host::watch = nullptr;
        finish(K::kName);
        return error;
    }
    const char *operator()(const Zero &zero) const { return hw::clear(zero.at, (size_t)zero.bytes, nullptr); }
};

template <class E, int D>
void both_passes(Shape shape, int shared_bytes) {
    shape.D = D;
    const Inputs<E> x(shape);
    const Device device{shared_bytes, 2};
    BwdParams p = x.params();
    FwdParams f{};
    (AttnParams &)f = p;
    f.out = p.out, f.lse = const_cast<void *>(p.lse);
    std::vector<std::vector<E>> made;
    const auto make = [&](int n0, int n1, int n2) {
        made.emplace_back((size_t)n0 * (size_t)n1 * (size_t)n2 * D + 8);
        auto at = ((uintptr_t)made.back().data() + 15) / 16 * 16;
        return Strided{(void *)at, (int64_t)n1 * n2 * D, (int64_t)n2 * D, D};
    };
    p.dq = make(shape.B, shape.H, shape.L);
    p.dk = make(shape.B, shape.Hkv, shape.S), p.dv = make(shape.B, shape.Hkv, shape.S);
    p.dprefix_k = make(shape.T, shape.Hkv, shape.P), p.dprefix_v = make(shape.T, shape.Hkv, shape.P);
    std::vector<Aligned> scratch((size_t)(bwd_workspace(p, device) / 256 + 1));
    host::forget_tensors();
    const char *error = fwd_launches<E, D>(f, nullptr, device, Watcher{});
    CHECK(!error, "%s: %s", x.name(), error);
    error = bwd_launches<E, D>(p, scratch.data(), device, Watcher{});
    CHECK(!error, "%s: %s", x.name(), error);
}

template <int D>
void all() {
    using E = hw::BF16;
    constexpr int kLarge = 163 * 1024, kTiny = 24 * 1024;
    Shape s{.B = 2, .H = 2, .Hkv = 1, .L = 37, .S = 37, .T = 1, .P = 10};
    both_passes<E, D>(s, kLarge);
    s.mask = 1, s.drop = 0.25;
    both_passes<E, D>(s, kLarge);
    both_passes<E, D>(s, kTiny);
    s = {.B = 1, .H = 1, .Hkv = 1, .L = 197, .S = 197, .T = 1, .P = 10};  // fwd_short_plain
    both_passes<E, D>(s, kLarge);
    s.S = 230, s.P = 40, s.causal = true, s.mask = 1, s.drop = 0.25;  // longer
    both_passes<E, D>(s, kLarge);
}

}  // namespace

int main() {
    all<64>();
    all<128>();
    const char *const names[] = {"load", "store", "copy", "matrix"};
    std::printf("[");
    const char *between = "\n";
    for (const auto &[site, each] : patterns)
        for (const Lanes32 &lanes : each) {
            std::printf("%s{\"kernel\": \"%s\", \"place\": \"%s\", \"what\": \"%s\", \"bytes\": %d, \"lanes\": [",
                        between, site.kernel.c_str(), site.place.c_str(), names[(int)site.what], site.bytes);
            for (int l = 0; l < hw::kWarp; ++l) std::printf("%s%d", l ? ", " : "", lanes[(size_t)l]);
            std::printf("]}");
            between = ",\n";
        }
    std::printf("]\n");
    return check::result();
}
