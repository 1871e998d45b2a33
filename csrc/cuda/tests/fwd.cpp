// The forward kernels on the host's machine against sums in double: every feature, in small shapes, and what a call
// costs in products and bytes.
#include "cuda/attention/fwd.h"

#include <cstring>
#include <string>

#include "cuda/tests/truth.h"
#include "tests/check.h"

using namespace prefixattn;
using namespace prefixattn::cuda;

namespace {

const Device kLarge{163 * 1024, 4}, kTiny{64 * 1024, 4}, kNone{0, 4};  // the last takes no short kernel

template <class E>
struct Run {
    std::vector<E> out;
    std::vector<float> lse, mass;
    host::Counts counts;
    std::string kernel;
};

template <class E, int D>
Run<E> run(const Inputs<E> &x, const Device &device, uint64_t seed, bool extras) {
    const Shape &s = x.shape;
    FwdParams p{};
    (AttnParams &)p = x.params();
    Run<E> r;
    const int row = s.packed ? 3 * D : D;
    std::vector<Aligned> memory((size_t)s.B * (size_t)s.H * (size_t)s.L * (size_t)row * sizeof(E) / 256 + 1);
    E *out = (E *)memory.data();
    const size_t rows = (size_t)(s.B * s.H * s.L);
    for (size_t i = 0; i < rows * (size_t)row; ++i) out[i] = E{0x7fff};
    // [B, L, H, D] if packed
    p.out = s.packed ? Strided{out, (int64_t)s.L * s.H * row, row, (int64_t)s.H * row}
                     : Strided{out, (int64_t)s.H * s.L * row, (int64_t)s.L * row, row};
    r.lse.assign(rows, NAN), r.mass.assign(rows, NAN);
    if (extras) p.lse = r.lse.data(), p.mass = r.mass.data();
    host::set_seed(seed);
    host::reset_counts();
    Plan plan;
    fwd_launches<E, D>(p, nullptr, device, Planner{plan});
    r.kernel = plan.launches[0].kernel;
    const char *error = fwd_launches<E, D>(p, nullptr, device, Runner{nullptr});
    CHECK(!error, "%s: %s", x.name(), error);
    CHECK(plan.count == 1, "%s: %d launches", x.name(), plan.count);
    r.counts = host::counts();
    for (int b = 0; b < s.B; ++b)
        for (int h = 0; h < s.H; ++h)
            for (int l = 0; l < s.L; ++l) {
                const E *at = out + b * p.out.stride0 + h * p.out.stride1 + l * p.out.stride2;
                r.out.insert(r.out.end(), at, at + D);
                for (int d = D; d < row; ++d) CHECK(at[d].bits == 0x7fff, "%s writes past its rows", x.name());
            }
    return r;
}

// The share of a query's weights that lies on the prefix, as Truth has its weights; by values of 1 and 0.
template <class E>
std::vector<double> mass_of(const Shape &shape) {
    Inputs<E> x(shape);
    for (Made<E> *t : {&x.v, &x.prefix_v})
        for (size_t i = 0; i < t->memory.size() * 256 / sizeof(E); ++i)
            ((E *)t->memory.data())[i] = hw::from_float<E>(t == &x.v ? 0.f : 1.f);
    x.shape.drop = 0;  // the mass knows no dropout of values; that of keys is not told apart here
    const Truth want(x);
    std::vector<double> mass;
    for (int i = 0; i < shape.B * shape.H * shape.L; ++i)
        mass.push_back((double)hw::to_float(((const E *)x.out.strided.data)[(size_t)i * (size_t)shape.D]));
    return mass;
}

template <class E, int D>
void check(Shape shape, const Device &device, const char *kernel) {
    shape.D = D;
    const Inputs<E> x(shape);
    const Truth want(x);  // writes x.out and x.lse
    const std::vector<double> mass = mass_of<E>(shape);
    const double step = std::is_same<E, hw::BF16>::value ? 1. / 256 : 1. / 2048;
    Run<E> first;
    for (uint64_t seed = 0; seed < 3; ++seed) {
        const Run<E> r = run<E, D>(x, device, seed, seed < 2);
        if (seed > 0) {
            CHECK(!std::memcmp(first.out.data(), r.out.data(), r.out.size() * sizeof(E)), "%s %s: other bits of out",
                  x.name(), kernel);
            if (seed == 2) continue;
            CHECK(!std::memcmp(first.lse.data(), r.lse.data(), r.lse.size() * 4), "%s: other bits of lse", x.name());
            CHECK(!std::memcmp(first.mass.data(), r.mass.data(), r.mass.size() * 4), "%s: other mass", x.name());
            continue;
        }
        CHECK(r.kernel == kernel, "%s: is %s, not %s", x.name(), r.kernel.c_str(), kernel);
        double worst = 0, worst_lse = 0, worst_mass = 0;
        for (size_t i = 0; i < r.out.size(); ++i) {
            const double w = (double)hw::to_float(((const E *)x.out.strided.data)[i]);
            const double error = std::fabs((double)hw::to_float(r.out[i]) - w);
            worst = error <= worst ? worst : error;
        }
        for (size_t i = 0; i < r.lse.size(); ++i) {
            const double w = (double)x.lse[i], error = r.lse[i] == x.lse[i] ? 0 : std::fabs((double)r.lse[i] - w);
            const double part = error / std::max(1., std::fabs(w));
            worst_lse = part <= worst_lse ? worst_lse : part;
            const double off = std::fabs((double)r.mass[i] - mass[i]);
            worst_mass = off <= worst_mass ? worst_mass : off;
        }
        CHECK(worst <= 4 * step, "%s %s: out errs by %g", x.name(), kernel, worst);
        CHECK(worst_lse <= 1e-6, "%s %s: lse errs by %g", x.name(), kernel, worst_lse);
        CHECK(shape.drop > 0 || worst_mass <= step, "%s %s: mass errs by %g", x.name(), kernel, worst_mass);
        first = r;
    }
}

template <class E, int D>
void both(const Shape &s, const char *kernel = "fwd_short") {
    check<E, D>(s, kLarge, kernel);
    check<E, D>(s, kNone, "fwd_long");
}

template <class E, int D>
void features() {
    Shape s = kPlain;
    both<E, D>(s);
    for (const Shape &shape : features_of_both()) both<E, D>(shape);
    s.packed = true, s.scale = 0.3f;
    both<E, D>(s);
    s = kPlain, s.scale = -0.2f;
    both<E, D>(s);
    s = kPlain, s.scale = 3e9f;  // past what a multiply-add of score and shift can tell apart
    both<E, D>(s);
    s.mask = 2;
    both<E, D>(s);
    s = kPlain, s.scale = 0.f;
    both<E, D>(s);
    s = kPlain, s.L = 50, s.S = 20, s.P = 0, s.causal = true;  // queries without a key
    both<E, D>(s);
    s = kPlain, s.L = 1, s.S = 70, s.causal = true;
    both<E, D>(s);
    s = kPlain, s.B = 5, s.H = 6, s.T = 4, s.ids = true, s.lengths = true, s.drop = 0.2;
    both<E, D>(s);
    s = kPlain, s.S = 0;
    both<E, D>(s);
    s = kPlain, s.S = 0, s.P = 0;
    both<E, D>(s);
    s = kPlain, s.H = 6, s.L = 9;  // a block's heads have one step of queries each
    both<E, D>(s);
    s = kPlain, s.S = 2, s.P = 62;  // a prefix in the last columns
    both<E, D>(s);
}

template <class E, int D>
void sizes() {
    Shape s{.B = 1, .H = 2, .Hkv = 1, .L = 70, .S = 110, .T = 1, .P = 18};
    both<E, D>(s);
    s.P = 19;
    both<E, D>(s);
    s.S = 197, s.P = 10;
    both<E, D>(s, "fwd_short_plain");
    s.S = 184, s.P = 24;
    both<E, D>(s, "fwd_short_plain");
    s.scale = 3e9f;
    both<E, D>(s, "fwd_short_plain");
    s.causal = true, s.L = 150, s.scale = 0.125f;
    both<E, D>(s);
    s.causal = false, s.P = 72;
    both<E, D>(s, "fwd_short_plain");
    s.P = 73;
    check<E, D>(s, kLarge, "fwd_long");
    s.P = 150, s.causal = true, s.mask = 1, s.nan_hidden = true;
    check<E, D>(s, kLarge, "fwd_long");
    s.nan_hidden = false, s.drop = 0.3, s.mask = 2, s.lengths = true, s.B = 2;
    check<E, D>(s, kLarge, "fwd_long");
    s = {.B = 1, .H = 1, .Hkv = 1, .L = 300, .S = 330, .T = 1, .P = 10, .causal = true};
    check<E, D>(s, kLarge, "fwd_long");
}

// What a launch costs beside what its results need.
template <class E, int D>
void cost(Shape s, double most_products, double most_bytes) {
    s.D = D;
    const Inputs<E> x(s);
    const Run<E> r = run<E, D>(x, {163 * 1024, 0}, 0, true);
    double pairs = 0;
    for (int l = 0; l < s.L; ++l)
        pairs += (double)s.B * s.H * (s.P + (s.causal ? std::min(s.S, l + s.S - s.L + 1) : s.S));
    const double products = (double)r.counts.mma * 16 * 8 * 16 / (pairs * D * 2);
    const double floor = 2. * D * (s.B * (2. * s.H * s.L + 2. * s.Hkv * s.S) + 2. * s.Hkv * s.P) + 8. * s.B * s.H * s.L;
    const double bytes = (double)(r.counts.load_bytes + r.counts.copy_bytes + r.counts.store_bytes) / floor;
    std::printf("%s, %s: %.4f of the useful products, %.4f of the floor's bytes, %lld conflicts\n", x.name(),
                r.kernel.c_str(), products, bytes, (long long)r.counts.ldmatrix_conflicts);
    CHECK(products <= most_products && bytes <= most_bytes, "%s costs more", x.name());
    CHECK(r.counts.launches == 1 && r.counts.ldmatrix_conflicts == 0, "%s: ldmatrix meets banks twice", x.name());
}

void costs() {
    cost<hw::BF16, 64>({.B = 1, .H = 2, .Hkv = 2, .L = 197, .S = 197, .T = 1, .P = 10}, 1.061, 1.001);  // a ViT's
    cost<hw::BF16, 64>({.B = 1, .H = 1, .Hkv = 1, .L = 512, .S = 512, .T = 1, .P = 20, .causal = true}, 1.1, 3);
    cost<hw::FP16, 128>({.B = 1, .H = 2, .Hkv = 1, .L = 120, .S = 120, .T = 1, .P = 8, .causal = true}, 1.35, 1.001);
}

}  // namespace

int main() {
    features<hw::BF16, 64>();
    features<hw::FP16, 128>();
    sizes<hw::FP16, 64>();
    sizes<hw::BF16, 128>();
    costs();
    return check::result();
}
