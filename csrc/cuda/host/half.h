// Conversions of the 16-bit types, and the product of a warp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace prefixattn::host {

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float bf16_to_float(uint16_t x) { return float_of((uint32_t)x << 16); }
inline uint16_t bf16_from_float(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // as cvt.rn does
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Exponent and mantissa move into a float's place; a product with a power of two then makes subnormal numbers right.
inline float fp16_to_float(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = (uint32_t)(x & 0x7fff) << 13;
    const uint32_t finite = bits_of(float_of(rest) * 0x1p112f), other = 0x7f800000u | rest;
    return float_of(sign | ((int32_t)rest < 0x0f800000 ? finite : other));
}
inline uint16_t fp16_from_float(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to 2^16
    if (magnitude < 0x38800000u)                         // subnormal: a sum whose last digit is 2^-24 rounds it
        return sign | (uint16_t)(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    return sign | (uint16_t)((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

}  // namespace prefixattn::host
