// Transposes, conversions between storage and floats, and scratch.
#include "check.h"
#include "cpu/pack.h"

using namespace prefixattn::PA_ISA;

namespace {

void transposed(int rows, int cols) {
    constexpr uint32_t kUntouched = 0xabcdef01u;
    const int stride = cols + 3, lanes = (rows + VL - 1) / VL * VL, ld = lanes + 5;
    std::vector<uint32_t> src((size_t)(rows - 1) * stride + cols), dst((size_t)cols * ld, kUntouched);
    for (uint32_t &x : src) x = check::generator()();  // any bits: pairs of bfloat16 are transposed as words, too
    transpose(src.data(), 4 * stride, rows, cols, (float *)dst.data(), ld);
    for (int c = 0; c < cols; ++c)
        for (int r = 0; r < ld; ++r) {
            const uint32_t right = r < rows ? src[(size_t)r * stride + c] : r < lanes ? 0 : kUntouched;
            const uint32_t found = dst[(size_t)c * ld + r];
            CHECK(found == right, "%d x %d: [%d, %d] is %08x, expected %08x", rows, cols, c, r, found, right);
        }
}

bool is_nan(float x) { return x != x; }

// To nearest, ties to even, by trying what lies around: exact in double.
template <class T>
void rounded(const std::vector<T> &finite, float largest_rounded) {
    for (size_t i = 0; i + 1 < finite.size(); ++i) {
        const float low = to_float(finite[i]), high = to_float(finite[i + 1]);
        const double middle = ((double)low + (double)high) / 2;
        const T even = finite[i].bits % 2 ? finite[i + 1] : finite[i];
        const float tie = (float)middle;  // has the digits: T has fewer
        const struct {
            float x;
            T right;
        } cases[] = {{std::nextafterf(tie, low), finite[i]}, {tie, even}, {std::nextafterf(tie, high), finite[i + 1]}};
        for (const auto &it : cases) {
            T found;
            from_float(it.x, &found);
            CHECK(found.bits == it.right.bits, "%a rounds to %04x, expected %04x", it.x, found.bits, it.right.bits);
            float many[8];
            T narrowed[8];
            for (int k = 0; k < 8; ++k) many[k] = k % 2 ? it.x : -it.x;
            narrow(many, narrowed, 8);
            for (int k = 0; k < 8; ++k)
                CHECK(narrowed[k].bits == (k % 2 ? it.right.bits : (it.right.bits | 0x8000)), "narrow(%a) is %04x",
                      many[k], narrowed[k].bits);
        }
    }
    T found;
    from_float(largest_rounded, &found);
    CHECK(std::isinf(to_float(found)), "%a rounds to %04x, expected infinity", largest_rounded, found.bits);
    from_float(__builtin_nanf(""), &found);
    CHECK(is_nan(to_float(found)), "nan rounds to %04x", found.bits);
}

// Every number of 16 bits, against its exponent and fraction.
template <class T>
void every_number(int exponent_bits, int fraction_bits, float largest_rounded) {
    const int bias = (1 << (exponent_bits - 1)) - 1, most = (1 << exponent_bits) - 1;
    std::vector<T> finite, all(1 << 16);
    std::vector<float> wide(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) all[bits].bits = (uint16_t)bits;
    widen(all.data(), wide.data(), 1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) {
        const int exponent = bits >> fraction_bits & most, fraction = bits & ((1 << fraction_bits) - 1);
        double right = exponent ? std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits)
                                : std::ldexp(fraction, 1 - bias - fraction_bits);
        if (exponent == most) right = fraction ? __builtin_nan("") : __builtin_inf();
        if (bits >> 15) right = -right;
        const float found = to_float(all[bits]);
        CHECK(found == (float)right || (is_nan(found) && std::isnan(right)), "%04x is %a, expected %a", bits, found,
              right);
        CHECK(wide[bits] == found || (is_nan(found) && is_nan(wide[bits])), "widen(%04x) is %a", bits, wide[bits]);
        if (exponent < most && !(bits >> 15)) finite.push_back(all[bits]);
        if (bits % VL) continue;
        float loaded[VL];
        vstore(loaded, vload_as(&all[bits]));
        CHECK(!std::memcmp(loaded, &wide[bits], sizeof loaded) || exponent == most, "vload_as() from %04x", bits);
    }
    rounded(finite, largest_rounded);
}

void interleaved() {
    bf16 low[40], high[40];
    uint32_t words[40];
    for (int i = 0; i < 40; ++i) low[i].bits = (uint16_t)(3 * i + 1), high[i].bits = (uint16_t)(0xff00 - i);
    for (const bf16 *second : {(const bf16 *)high, (const bf16 *)nullptr}) {
        interleave(low, second, words, 40);
        for (int i = 0; i < 40; ++i) {
            const uint32_t right = low[i].bits | (second ? (uint32_t)second[i].bits << 16 : 0u);
            CHECK(words[i] == right, "pair %d is %08x, expected %08x", i, words[i], right);
        }
    }
}

void scratch() {
    alignas(64) char buffer[512];
    Arena counted = Arena::counting(), arena(buffer);
    for (int64_t n : {1, 0, 17, 3}) {
        const int64_t before = counted.used();
        CHECK(counted.take<float>(n) == nullptr, "a counting arena handed something out");
        float *piece = arena.take<float>(n);
        CHECK((char *)piece == buffer + before, "a piece does not lie where the other arena counted it");
        CHECK(counted.used() == arena.used() && arena.used() % 64 == 0, "%d bytes", (int)arena.used());
    }
    CHECK(arena.used() == 64 + 0 + 128 + 64, "%d bytes", (int)arena.used());
}

}  // namespace

int main() {
    for (int rows = 1; rows <= 70; ++rows)
        for (int cols : {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 40, 64, 72}) transposed(rows, cols);
    every_number<bf16>(8, 7, 0x1.ffp+127f);
    every_number<f16>(5, 10, 65520.f);
    interleaved();
    scratch();
    return check::result();
}
