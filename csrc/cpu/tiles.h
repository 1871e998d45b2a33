// Tile registers, as a product uses them: C[i][j] += A[i] B[j] for i, j < 2. A tile has 16 rows of 16 words, a word
// being a pair of 16-bit numbers, or a float of C. Between configure() and release() only, which are per thread. Twice:
// AMX, and plain C++ with the instructions' own rounding, so that what is written over tiles runs on any CPU.
#pragma once
#include "cpu/pack.h"

namespace prefixattn {
namespace PA_ISA {

constexpr int kTile = 16;  // rows of a tile, and words of a row

#if defined(PA_AMX) || defined(PA_PLAIN_TILES)
#define PA_TILES
#endif

#if defined(PA_AMX)
// In assembly, not by intrinsics. GCC's are macros that take a register's number as written, so no template parameter;
// its tile load does not say that it reads memory, nor its configuration that it reads all 64 bytes, so that stores
// before them may be moved behind or left out.
class Tiles {
  public:
    static void configure() {
        alignas(64) static constexpr Config kWhole;
        asm volatile("ldtilecfg %0" ::"m"(kWhole) : "memory");
    }
    static void release() { asm volatile("tilerelease" ::: "memory"); }

    template <int i, int j>
    static void zero_c() {
        asm volatile("tilezero %%tmm%c0" ::"i"(2 * i + j));
    }
    template <int i, int j>
    static void load_c(const float *src, ptrdiff_t bytes) {
        load<2 * i + j>(src, bytes);
    }
    template <int i, int j>
    static void store_c(float *dst, ptrdiff_t bytes) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(dst), "r"(bytes), "i"(2 * i + j) : "memory");
    }
    template <int i>
    static void load_a(const void *src, ptrdiff_t bytes) {
        load<4 + i>(src, bytes);
    }
    template <int j>
    static void load_b(const void *src, ptrdiff_t bytes) {
        load<6 + j>(src, bytes);
    }
    template <class T, int i, int j>
    static void product() {
        if constexpr (__is_same(T, bf16))
            asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(6 + j), "i"(4 + i), "i"(2 * i + j));
#if defined(PA_AMX_FP16)
        else
            asm volatile("tdpfp16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(6 + j), "i"(4 + i), "i"(2 * i + j));
#else
        static_assert(__is_same(T, bf16), "products of float16 need PA_AMX_FP16");
#endif
    }

  private:
    struct Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64, "what ldtilecfg reads");

    template <int t>
    static void load(const void *src, ptrdiff_t bytes) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(src), "r"(bytes), "i"(t) : "memory");
    }
};
#elif defined(PA_PLAIN_TILES)
// As the manual has it (Intel SDM, TDPBF16PS and TDPFP16PS): of each element of C the first and the second halves of
// words are summed apart, by fused multiply-adds; the two sums are added, and C is touched once. To nearest even.
// Floats that are denormal are zeros, read or written, and so are such bfloat16; float16 are widened first.
struct TileRegisters {
    bool configured;
    uint32_t a[2][kTile][kTile], b[2][kTile][kTile];
    float c[2][2][kTile][kTile];
};
inline thread_local TileRegisters tile_registers;

inline float without_denormal(double x) {  // rounded; what would round to the least normal float is not denormal
    const float y = (float)x;
    return __builtin_fabs(x) < 0x1p-126 - 0x1p-151 ? __builtin_copysignf(0.f, y) : y;
}
inline double tile_number(bf16 x) { return without_denormal(to_float(x)); }
inline double tile_number(f16 x) { return to_float(x); }

template <class T>
inline void tile_product(const uint32_t (&a)[kTile][kTile], const uint32_t (&b)[kTile][kTile],
                         float (&c)[kTile][kTile]) {
    double low[kTile][kTile], high[kTile][kTile];
    for (int k = 0; k < kTile; ++k)
        for (int n = 0; n < kTile; ++n) {
            low[k][n] = tile_number(T{(uint16_t)b[k][n]});
            high[k][n] = tile_number(T{(uint16_t)(b[k][n] >> 16)});
        }
    for (int m = 0; m < kTile; ++m) {
        float first[kTile] = {}, second[kTile] = {};
        for (int k = 0; k < kTile; ++k) {
            const double x = tile_number(T{(uint16_t)a[m][k]}), y = tile_number(T{(uint16_t)(a[m][k] >> 16)});
            // A product of two such numbers is exact in double, and a sum with a float that is rounded to double and
            // then to float is what one rounding makes of it: 53 > 2 * 24 + 2.
            for (int n = 0; n < kTile; ++n) {
                first[n] = without_denormal(x * low[k][n] + (double)first[n]);
                second[n] = without_denormal(y * high[k][n] + (double)second[n]);
            }
        }
        for (int n = 0; n < kTile; ++n)
            c[m][n] = without_denormal((double)without_denormal(c[m][n]) +
                                       (double)without_denormal((double)first[n] + (double)second[n]));
    }
}

class Tiles {
  public:
    static void configure() {
        if (tile_registers.configured) __builtin_trap();  // the loop before did not release them
        tile_registers = {};
        tile_registers.configured = true;
    }
    static void release() { tile_registers.configured = false; }

    template <int i, int j>
    static void zero_c() {
        std::memset(here().c[i][j], 0, sizeof here().c[i][j]);
    }
    template <int i, int j>
    static void load_c(const float *src, ptrdiff_t bytes) {
        copy(here().c[i][j], 64, src, bytes);
    }
    template <int i, int j>
    static void store_c(float *dst, ptrdiff_t bytes) {
        copy(dst, bytes, here().c[i][j], 64);
    }
    template <int i>
    static void load_a(const void *src, ptrdiff_t bytes) {
        copy(here().a[i], 64, src, bytes);
    }
    template <int j>
    static void load_b(const void *src, ptrdiff_t bytes) {
        copy(here().b[j], 64, src, bytes);
    }
    template <class T, int i, int j>
    static void product() {
        TileRegisters &r = here();
        tile_product<T>(r.a[i], r.b[j], r.c[i][j]);
    }

  private:
    static TileRegisters &here() {
        if (!tile_registers.configured) __builtin_trap();  // as a CPU would: an illegal instruction
        return tile_registers;
    }
    static void copy(void *dst, ptrdiff_t dst_bytes, const void *src, ptrdiff_t src_bytes) {
        for (int r = 0; r < kTile; ++r)
            std::memcpy((char *)dst + r * dst_bytes, (const char *)src + r * src_bytes, 4 * kTile);
    }
};
#endif

}  // namespace PA_ISA
}  // namespace prefixattn
