// The 16-bit types and the powers of two as the hardware makes them.
#include "cuda/hw/hw.h"
#include "tests/check.h"

using namespace prefixattn;

namespace {

struct Format {
    int digits, least, most;  // bits of the fraction; exponents
};

// By its definition: sign, exponent, fraction.
double value_of(uint16_t bits, Format f) {
    const int fraction = bits & ((1 << f.digits) - 1), exponent = (bits & 0x7fff) >> f.digits;
    const double size = exponent ? std::ldexp(1 + std::ldexp(fraction, -f.digits), exponent - 1 + f.least)
                                 : std::ldexp(fraction, f.least - f.digits);
    return bits & 0x8000 ? -size : size;
}

template <class E>
void check_type(Format f) {
    const int infinity = ((f.most - f.least + 2) << f.digits);
    for (int bits = 0; bits < 0x10000; ++bits) {
        const float x = hw::to_float(E{(uint16_t)bits});
        const int magnitude = bits & 0x7fff;
        if (magnitude > infinity) {
            CHECK(std::isnan(x) && hw::from_float<E>(x).bits == 0x7fff, "nan %x", bits);
            continue;
        }
        CHECK(hw::from_float<E>(x).bits == bits, "%x becomes %x", bits, hw::from_float<E>(x).bits);
        if (magnitude == infinity) {
            CHECK(std::isinf(x) && std::signbit(x) == (bits >> 15), "%x", bits);
            continue;
        }
        CHECK(x == value_of((uint16_t)bits, f), "%x is %g", bits, x);
        if (bits & 0x8000) continue;
        // Halfway to the next goes to the even one, and whatever is off halfway to the nearer one.
        const double next = magnitude + 1 == infinity ? std::ldexp(1., f.most + 1) : value_of((uint16_t)(bits + 1), f);
        const float middle = (float)((x + next) / 2);
        for (int sign = 0; sign < 2; ++sign) {
            const auto made = [&](float y) { return hw::from_float<E>(sign ? -y : y).bits & 0x7fff; };
            CHECK(made(middle) == bits + (bits & 1), "halfway from %x: %x", bits, made(middle));
            CHECK(made(std::nextafter(middle, 0.f)) == bits, "below halfway from %x", bits);
            CHECK(made(std::nextafter(middle, INFINITY)) == bits + 1, "above halfway from %x", bits);
        }
    }
    const uint32_t both = hw::pack<E>(1.5f, -2.f);
    CHECK(hw::low<E>(both) == 1.5f && hw::high<E>(both) == -2.f, "pack");
}

}  // namespace

int main() {
    check_type<hw::BF16>({7, -126, 127});
    check_type<hw::FP16>({10, -14, 15});
    CHECK(hw::exp2(-INFINITY) == 0 && hw::exp2(3.f) == 8 && hw::exp2(-127.f) == 0 && hw::exp2(1e-40f) == 1, "exp2");
    CHECK(hw::log2(8.f) == 3 && hw::log2(0.f) == -INFINITY && hw::log2(1e-40f) == -INFINITY, "log2");
    CHECK(hw::exp2(128.f) == INFINITY && std::isnan(hw::exp2(NAN)) && std::isnan(hw::log2(-1.f)), "exp2, log2");
    CHECK(hw::max(NAN, 1.f) == 1 && hw::min(2.f, 1.f) == 1, "max, min");
    return check::result();
}
