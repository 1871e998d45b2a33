// mma and ldmatrix against loops over matrices: from shared memory as kernels lay it out, and from registers filled by
// the formulas of the PTX manual (Matrix Fragments for mma.m16n8k16 with floating point type).
#include "cuda/hw/hw.h"
#include "tests/check.h"

using namespace prefixattn;

namespace {

enum class From { kRows, kColumns, kFormulas };  // how b is stored and loaded: [16 k][8], [8][16 k], [16 k][8]

struct Launch {
    const uint16_t *a, *b;  // a [16][16]
    float *c;               // [16][8]
};

template <class E, From from>
struct Product {
    using Params = Launch;
    static constexpr int kThreads = 32, kMinBlocks = 1;
    static constexpr const char *kName = "product";

    PA_DEVICE static uint32_t two(const uint16_t *first, const uint16_t *second) {
        return (uint32_t)hw::load_global(first) | (uint32_t)hw::load_global(second) << 16;
    }
    // a0 .. a7 and b0 .. b3 of the manual, two a register.
    PA_DEVICE static void load_by_formulas(const Params &p, uint32_t (&a)[4], uint32_t (&b)[2]) {
        const int group = hw::lane() >> 2, in_group = hw::lane() % 4;
        for (int i = 0; i < 8; i += 2) {
            const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            const int column = in_group * 2 + (i < 4 ? 0 : 8);
            a[i / 2] = two(p.a + 16 * row + column, p.a + 16 * row + column + 1);
        }
        for (int i = 0; i < 4; i += 2) {
            const int k = in_group * 2 + (i < 2 ? 0 : 8);
            b[i / 2] = two(p.b + 8 * k + group, p.b + 8 * (k + 1) + group);
        }
    }
    PA_DEVICE static void load_by_ldmatrix(const Params &p, uint32_t (&fa)[4], uint32_t (&fb)[2]) {
        const hw::Shared a = hw::shared_begin(), b = a + 512;
        const int l = hw::lane();
        hw::copy_async16(a + 16 * l, p.a + 8 * l, true);
        if (l < 16) hw::copy_async16(b + 16 * l, p.b + 8 * l, true);
        hw::copy_commit();
        hw::copy_wait<0>();
        hw::sync_block();
        hw::ldmatrix(fa, a + (l % 16 * 32 + l / 16 * 16));
        if constexpr (from == From::kRows)
            hw::ldmatrix_trans(fb, b + l % 16 * 16);
        else
            hw::ldmatrix(fb, b + (l % 8 * 32 + l / 8 % 2 * 16));
    }
    PA_DEVICE static void run(const Params &p) {
        uint32_t a[4], b[2];
        if constexpr (from == From::kFormulas)
            load_by_formulas(p, a, b);
        else
            load_by_ldmatrix(p, a, b);
        float c[4] = {1, 2, 3, 4};
        hw::mma<E>(c, a, b);
        for (int half = 0; half < 2; ++half)
            hw::store_global(
                reinterpret_cast<hw::Floats2 *>(p.c + (hw::lane() / 4 + 8 * half) * 8 + hw::lane() % 4 * 2),
                hw::Floats2{{c[2 * half], c[2 * half + 1]}});
    }
};

template <class E, From from>
void check_product() {
    alignas(16) uint16_t a[16][16], b[16 * 8];
    alignas(16) float c[16][8];
    const auto number = [] { return hw::from_float<E>((float)(check::below(2001) - 1000) / 256.f).bits; };
    for (auto &row : a)
        for (uint16_t &x : row) x = number();
    for (uint16_t &x : b) x = number();
    for (int seed = 0; seed < 5; ++seed) {
        host::set_seed((uint64_t)seed);
        const char *error = hw::launch<Product<E, from>>({}, 768, {&a[0][0], b, &c[0][0]}, nullptr);
        CHECK(!error, "%s", error);
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 8; ++j) {
                float sum = (float)(1 + i / 8 * 2 + j % 2);
                for (int k = 0; k < 16; ++k)
                    sum +=
                        hw::to_float(E{a[i][k]}) * hw::to_float(E{b[from == From::kColumns ? j * 16 + k : k * 8 + j]});
                CHECK(sum == c[i][j], "c[%d][%d]: %g, not %g", i, j, c[i][j], sum);
            }
    }
}

// Matrices of numbers that say where they were: row l of 32 holds 8 l .. 8 l + 7.
template <int N, bool transposed, int step>
struct Load {
    using Params = uint32_t *;
    static constexpr int kThreads = 32, kMinBlocks = 1;
    static constexpr const char *kName = "load";
    PA_DEVICE static void run(const Params &p) {
        const int l = hw::lane();
        const hw::Shared row = hw::shared_begin() + step * l;
        hw::Words4 numbers;
        for (int i = 0; i < 4; ++i) numbers.x[i] = (uint32_t)(8 * l + 2 * i) | (uint32_t)(8 * l + 2 * i + 1) << 16;
        hw::store_shared(row, numbers);
        hw::sync_warp();
        uint32_t r[N];
        if constexpr (transposed)
            hw::ldmatrix_trans(r, row);
        else
            hw::ldmatrix(r, row);
        for (int m = 0; m < N; ++m) hw::store_global(p + 32 * m + l, r[m]);
    }
};

template <int N, bool transposed, int step>
void check_load(int conflicts) {
    uint32_t got[N][32];
    host::reset_counts();
    const char *error = hw::launch<Load<N, transposed, step>>({}, 32 * step, &got[0][0], nullptr);
    CHECK(!error, "%s", error);
    for (int m = 0; m < N; ++m)
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 2; ++i) {
                const int row = l / 4, column = l % 4 * 2 + i;
                const int want = 64 * m + (transposed ? 8 * column + row : 8 * row + column);
                CHECK((int)(got[m][l] >> 16 * i & 0xffff) == want, "matrix %d of %d, lane %d", m, N, l);
            }
    CHECK(host::counts().ldmatrix == N && host::counts().ldmatrix_conflicts == N * conflicts, "%d conflicts",
          (int)host::counts().ldmatrix_conflicts);
}

template <class E>
void check_type() {
    check_product<E, From::kRows>();
    check_product<E, From::kColumns>();
    check_product<E, From::kFormulas>();
}

}  // namespace

int main() {
    check_type<hw::BF16>();
    check_type<hw::FP16>();
    check_load<1, false, 16>(0);
    check_load<2, false, 32>(1);
    check_load<4, false, 64>(3);
    check_load<1, true, 128>(7);
    check_load<2, true, 16>(0);
    check_load<4, true, 144>(0);
    return check::result();
}
