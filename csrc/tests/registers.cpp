// Tiles in plain C++ round as the instructions are said to (Intel SDM): held against that text written once more, with
// the C library's fused multiply-add. And pairs of 16-bit numbers are what they were made of.
#include "check.h"
#include "cpu/pairs.h"
#include "cpu/tiles.h"

using namespace prefixattn::PA_ISA;

namespace {

// Numbers by which roundings differ; in halves of a word.
enum class Range {
    kOrdinary,  // whose sums round
    kAny,       // all but a nan
    kTiny,      // whose products are at the least normal float, where T has such
    kDenormal,  // of A; of B large ones
};

template <class T>
T number(Range range, bool of_a) {
    T x{};
    const float significand = (float)(check::below(511) - 255) / 128;
    constexpr int kExponent = __is_same(T, bf16) ? 0x7f80 : 0x7c00, kLarge = __is_same(T, bf16) ? 100 : 10;
    switch (range) {
        case Range::kOrdinary:
            from_float((float)(check::below(2001) - 1000) / 64, &x);
            break;
        case Range::kAny:
            x.bits = (uint16_t)check::generator()();
            if ((x.bits & kExponent) == kExponent) x.bits &= (uint16_t)~0x0400;
            break;
        case Range::kTiny:
            from_float(check::below(8) ? 0.f : std::ldexp(significand, check::below(8) - 66), &x);
            break;
        case Range::kDenormal:
            from_float(std::ldexp(significand, kLarge), &x);
            if (of_a) x.bits = (uint16_t)(check::generator()() & (0x8000 | (0xffff & ~0x8000 & ~kExponent)));
            break;
    }
    return x;
}

float summand(Range range) {
    if (range == Range::kOrdinary || check::below(2)) return (float)check::below(1000) / 7;
    return bits_to_float((uint32_t)check::generator()() & 0x81ffffffu);  // most are denormal, or nearly
}

template <class T>
void halves_and_pairs() {
    for (int round = 0; round < 1000; ++round) {
        float numbers[2][VL];
        T expected[2][VL];
        for (auto &row : numbers)
            for (float &x : row) {
                x = (float)(check::below(1 << 20) - (1 << 19)) * std::ldexp(1.f, check::below(12) - 22);
                if (check::below(50) == 0) x = 0;
            }
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < VL; ++i) from_float(numbers[half][i], &expected[half][i]);
        T found[2 * VL + 3];
        store_halves(found, VL + 3, vload(numbers[0]), vload(numbers[1]));
        uint32_t words[VL];
        store_pairs<T>(words, vload(numbers[0]), vload(numbers[1]));
        float bits[VL];
        std::memcpy(bits, words, sizeof bits);
        vf low, high;
        load_pairs<T>(bits, low, high);
        float back[2][VL];
        vstore(back[0], low), vstore(back[1], high);
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < VL; ++i) {
                const T right = expected[half][i];
                CHECK(found[half * (VL + 3) + i].bits == right.bits, "half %d: %g", half, numbers[half][i]);
                CHECK((uint16_t)(words[i] >> 16 * half) == right.bits, "pair %d: %g", half, numbers[half][i]);
                CHECK(back[half][i] == to_float(right), "back %d: %g", half, numbers[half][i]);
            }
    }
}

#if defined(PA_PLAIN_TILES)
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
float operand(bf16 x) { return flushed(to_float(x)); }
float operand(f16 x) { return to_float(x); }

template <class T>
void product_rounds_as_the_manual_says() {
    const auto half = [](uint32_t word, int i) { return T{(uint16_t)(word >> 16 * i)}; };
    for (int round = 0; round < 400; ++round) {
        uint32_t a[kTile][kTile], b[kTile][kTile];
        float c[kTile][kTile], found[kTile][kTile];
        const Range range = (Range)(round % 4);
        const auto word = [&](bool of_a) {
            return number<T>(range, of_a).bits | (uint32_t)number<T>(range, of_a).bits << 16;
        };
        for (int r = 0; r < kTile; ++r)
            for (int n = 0; n < kTile; ++n) a[r][n] = word(true), b[r][n] = word(false), c[r][n] = summand(range);
        Tiles::configure();
        Tiles::load_c<1, 0>(c[0], 64);
        Tiles::load_a<1>(a, 64);
        Tiles::load_b<0>(b, 64);
        Tiles::product<T, 1, 0>();
        Tiles::store_c<1, 0>(found[0], 64);
        Tiles::release();
        for (int m = 0; m < kTile; ++m)
            for (int n = 0; n < kTile; ++n) {
                float sums[2] = {0, 0};
                for (int k = 0; k < kTile; ++k)
                    for (int i = 0; i < 2; ++i)
                        sums[i] = flushed(std::fma(operand(half(a[m][k], i)), operand(half(b[k][n], i)), sums[i]));
                const float right = flushed(flushed(c[m][n]) + flushed(sums[0] + sums[1]));
                CHECK(found[m][n] == right || (std::isnan(found[m][n]) && std::isnan(right)),
                      "round %d, C[%d, %d]: %a, expected %a", round, m, n, found[m][n], right);
            }
    }
}

// Rows of A and C lie anywhere, so many bytes apart, and a store writes its own 16 words of a row.
void strides() {
    std::vector<float> from(20 * kTile), to(23 * kTile, -1.f);
    for (size_t i = 0; i < from.size(); ++i) from[i] = (float)i;
    Tiles::configure();
    Tiles::load_c<0, 1>(from.data(), 4 * 20);
    Tiles::store_c<0, 1>(to.data(), 4 * 23);
    Tiles::zero_c<0, 1>();
    Tiles::release();
    for (int r = 0; r < kTile; ++r)
        for (int i = 0; i < 23; ++i) {
            const float right = i < kTile ? (float)(r * 20 + i) : -1.f;
            CHECK(to[(size_t)(r * 23 + i)] == right, "row %d, word %d", r, i);
        }
}
#endif

}  // namespace

int main() {
    halves_and_pairs<bf16>();
    halves_and_pairs<f16>();
#if defined(PA_PLAIN_TILES)
    product_rounds_as_the_manual_says<bf16>();
    product_rounds_as_the_manual_says<f16>();
    strides();
#endif
    return check::result();
}
