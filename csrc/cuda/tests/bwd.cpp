// The backward kernels on the host's machine against sums in double: every feature, in small shapes, and what a call
// costs in products and bytes.
#include "cuda/attention/bwd.h"

#include <string>

#include "cuda/tests/truth.h"
#include "tests/check.h"

using namespace prefixattn;
using namespace prefixattn::cuda;

namespace {

const Device kLarge{163 * 1024, 4}, kSmall{99 * 1024, 4}, kTiny{24 * 1024, 4};

// Gradients of one call, in memory of their own that is filled with nan before.
template <class E>
struct Run {
    std::vector<E> dq, dk, dv, dprefix_k, dprefix_v;
    int launches = 0;
    host::Counts counts;
};

template <class E, int D>
Run<E> run(const Inputs<E> &x, unsigned needs, const Device &device, uint64_t seed) {
    Run<E> r;
    const Shape &s = x.shape;
    BwdParams p = x.params();
    const auto make = [&](unsigned bit, std::vector<E> &to, Strided &t, int n0, int n1, int n2, bool packed) {
        if (!(needs & bit)) return;
        const int row = packed ? 3 * D : D;  // as a third of a packed projection
        to.assign((size_t)n0 * n1 * n2 * row, E{0x7fff});
        t = {to.data(), (int64_t)n1 * n2 * row, (int64_t)n2 * row, row};
    };
    make(1, r.dq, p.dq, s.B, s.H, s.L, s.packed);
    make(2, r.dk, p.dk, s.B, s.Hkv, s.S, s.packed);
    make(4, r.dv, p.dv, s.B, s.Hkv, s.S, s.packed);
    make(8, r.dprefix_k, p.dprefix_k, s.T, s.Hkv, s.P, false);
    make(16, r.dprefix_v, p.dprefix_v, s.T, s.Hkv, s.P, false);
    std::vector<Aligned> scratch((size_t)(bwd_workspace(p, device) / 256 + 1));
    std::memset(scratch.data(), 0xff, scratch.size() * sizeof(Aligned));
    host::forget_tensors();
    x.allow();
    host::allow(scratch.data(), scratch.size() * sizeof(Aligned), true);
    for (std::vector<E> *t : {&r.dq, &r.dk, &r.dv, &r.dprefix_k, &r.dprefix_v})
        if (!t->empty()) host::allow(t->data(), t->size() * sizeof(E), true);
    host::set_seed(seed);
    host::reset_counts();
    const char *error = bwd_launches<E, D>(p, scratch.data(), device, Runner{nullptr});
    CHECK(!error, "%s: %s", x.name(), error);
    r.counts = host::counts();
    r.launches = (int)r.counts.launches;
    return r;
}

template <class E>
void compare(const Inputs<E> &x, const char *what, const std::vector<E> &got, const std::vector<double> &want, int D,
             bool packed) {
    if (got.empty()) return;
    const double bar = std::is_same<E, hw::BF16>::value ? 0.008 : 0.001;
    double most = 1e-3, worst = 0;
    for (double w : want) most = std::max(most, std::fabs(w));
    const int row = packed ? 3 * D : D;
    for (size_t i = 0; i < want.size(); ++i) {
        const double g = (double)hw::to_float(got[i / (size_t)D * (size_t)row + i % (size_t)D]);
        const double error = g == want[i] ? 0 : std::fabs(g - want[i]) / most;
        worst = error <= worst ? worst : error;
    }
    CHECK(worst <= bar, "%s: %s errs by %g of the largest", x.name(), what, worst);
    if (!packed) return;
    for (size_t i = 0; i < got.size(); ++i)
        CHECK(i % (size_t)row < (size_t)D || got[i].bits == 0x7fff, "%s: %s writes past its rows", x.name(), what);
}

template <class E, int D>
void check(Shape shape, unsigned needs = 31, const Device &device = kLarge, int launches = 0) {
    shape.D = D;
    const Inputs<E> x(shape);
    const Truth want(x);
    Run<E> first;
    for (uint64_t seed = 0; seed < 2; ++seed) {
        Run<E> r = run<E, D>(x, needs, device, seed);
        if (seed == 0) {
            compare(x, "dq", r.dq, want.dq, D, shape.packed);
            compare(x, "dk", r.dk, want.dk, D, shape.packed);
            compare(x, "dv", r.dv, want.dv, D, shape.packed);
            compare(x, "dprefix_k", r.dprefix_k, want.dprefix_k, D, false);
            compare(x, "dprefix_v", r.dprefix_v, want.dprefix_v, D, false);
            CHECK(!launches || launches == r.launches, "%s: %d launches", x.name(), r.launches);
            first = r;
            continue;
        }
        const auto same = [&](const std::vector<E> &a, const std::vector<E> &b) {
            return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0;
        };
        CHECK(same(first.dq, r.dq) && same(first.dk, r.dk) && same(first.dv, r.dv) &&
                  same(first.dprefix_k, r.dprefix_k) && same(first.dprefix_v, r.dprefix_v),
              "%s: other bits in another order", x.name());
    }
}

// A shape by both ways: in one launch, and as on a device that has no room for it.
template <class E, int D>
void both(const Shape &shape, unsigned needs = 31) {
    check<E, D>(shape, needs, kLarge, 1);
    check<E, D>(shape, needs, kTiny, 3);
}

template <class E, int D>
void features() {
    Shape s = kPlain;
    both<E, D>(s);
    for (const Shape &shape : features_of_both()) both<E, D>(shape);
    s.dlse = true, s.packed = true, s.scale = 0.3f;
    both<E, D>(s);
    s = kPlain, s.L = 50, s.S = 20, s.P = 0, s.causal = true;  // queries without a key
    both<E, D>(s, 7);
    s = kPlain, s.B = 5, s.Hkv = 1, s.T = 4, s.ids = true, s.lengths = true, s.drop = 0.2;
    both<E, D>(s);
    s = kPlain, s.B = 2, s.T = 4, s.ids = true;
    both<E, D>(s);
    for (unsigned needs : {1u, 2u, 4u, 6u, 8u, 16u, 24u, 9u, 25u, 22u}) {
        check<E, D>(kPlain, needs, kLarge);
        check<E, D>(kPlain, needs, kTiny);
    }
    check<E, D>(kPlain, 24, kLarge, 1);  // of a frozen trunk's first layer
}

template <class E>
void long_ones() {
    Shape s{.B = 1, .H = 2, .Hkv = 1, .L = 150, .S = 270, .T = 1, .P = 20, .causal = true};
    check<E, 64>(s, 31, kLarge, 3);
    s = {.B = 2, .H = 1, .Hkv = 1, .L = 70, .S = 40, .T = 1, .P = 240};
    check<E, 64>(s, 31, kLarge, 3);
    s.drop = 0.5, s.T = 2, s.P = 140;
    check<E, 128>(s, 31, kLarge, 3);
    s = {.B = 1, .H = 1, .Hkv = 1, .L = 140, .S = 230, .T = 1, .P = 26};  // two tiles a warp
    check<E, 64>(s, 31, kLarge, 1);
    s = {.B = 2, .H = 1, .Hkv = 1, .L = 66, .S = 110, .T = 1, .P = 20, .causal = true, .lengths = true};
    check<E, 64>(s, 31, kSmall, 1);
}

// Devices with room for one or two buffers of keys, and of dS.
void buffers() {
    const Shape s{.B = 3, .H = 2, .Hkv = 1, .L = 70, .S = 60, .T = 1, .P = 10, .causal = true};
    const Inputs<hw::BF16> x(s);
    BwdParams p = x.params();
    p.dq = p.q;
    for (int keys = 1; keys <= 2; ++keys)
        for (int ds = 1; ds <= 2; ++ds) check<hw::BF16, 64>(s, 31, {Short::shared_bytes(p, keys, ds), 1}, 1);
}

// ViT-B's head at 224 pixels: what is multiplied and moved over what must be.
void costs() {
    const Shape s{.B = 12, .H = 1, .Hkv = 1, .L = 197, .S = 197, .T = 1, .P = 10};
    const Inputs<hw::BF16> x(s);
    const Device two{163 * 1024, 2};  // six samples a block, as 64 samples of 12 heads have on 132 processors
    const auto r = run<hw::BF16, 64>(x, 31, two, 0);
    const double products = 5. * s.B * s.L * (s.S + s.P) * 64, multiplied = 2048. * (double)r.counts.mma;
    const double floor = 2. * 64 * (8. * s.B * s.L + 4. * s.P);
    const double moved = (double)(r.counts.load_bytes + r.counts.store_bytes + r.counts.copy_bytes);
    std::printf("197 + 10: products %.4f, bytes %.4f, conflicts %lld of %lld\n", multiplied / products, moved / floor,
                (long long)r.counts.ldmatrix_conflicts, (long long)r.counts.ldmatrix);
    CHECK(r.launches == 1, "%d launches", r.launches);
    CHECK(multiplied <= 1.06 * products, "%g of the useful products", multiplied / products);
    CHECK(moved <= 1.02 * floor, "%g of the floor's bytes", moved / floor);
    CHECK(r.counts.ldmatrix_conflicts == 0, "%lld conflicts", (long long)r.counts.ldmatrix_conflicts);
}

}  // namespace

int main() {
    features<hw::BF16, 64>();
    features<hw::FP16, 128>();
    long_ones<hw::FP16>();
    buffers();
    costs();
    return check::result();
}
