// mma and ldmatrix against a product of matrices by loops, from shared memory as kernels lay it out.
#include "cuda/hw/hw.h"
#include "tests/check.h"

using namespace prefixattn;

namespace {

struct Launch {
    const void *a, *b;  // [16][16] and [16 k][8], or [8][16 k]
    float *c;           // [16][8]
};

template <class E, bool b_by_rows>
struct Product {
    using Params = Launch;
    static constexpr int kThreads = 32, kMinBlocks = 1;
    static constexpr const char *kName = "product";
    PA_DEVICE static void run(const Params &p) {
        const hw::Shared a = hw::shared_begin(), b = a + 512;
        const int l = hw::lane();
        hw::copy_async16(a + 16 * l, static_cast<const char *>(p.a) + 16 * l, true);
        if (l < 16) hw::copy_async16(b + 16 * l, static_cast<const char *>(p.b) + 16 * l, true);
        hw::copy_commit();
        hw::copy_wait<0>();
        hw::sync_block();
        uint32_t fa[4], fb[2];
        hw::ldmatrix(fa, a + (l % 16 * 32 + l / 16 * 16));
        if constexpr (b_by_rows)
            hw::ldmatrix_trans(fb, b + l % 16 * 16);
        else
            hw::ldmatrix(fb, b + (l % 8 * 32 + l / 8 % 2 * 16));
        float c[4] = {};
        hw::mma<E>(c, fa, fb);
        for (int half = 0; half < 2; ++half)
            hw::store_global(reinterpret_cast<hw::Floats2 *>(p.c + (l / 4 + 8 * half) * 8 + l % 4 * 2),
                             hw::Floats2{{c[2 * half], c[2 * half + 1]}});
    }
};

template <class E, bool b_by_rows>
void check_product() {
    alignas(16) E a[16][16], b[16 * 8];
    alignas(16) float c[16][8];
    for (auto &row : a)
        for (E &x : row) x = hw::from_float<E>((float)(check::below(2001) - 1000) / 256.f);
    for (E &x : b) x = hw::from_float<E>((float)(check::below(2001) - 1000) / 256.f);
    for (int seed = 0; seed < 5; ++seed) {
        host::set_seed((uint64_t)seed);
        const char *error = hw::launch<Product<E, b_by_rows>>({}, 768, {a, b, &c[0][0]}, nullptr);
        CHECK(!error, "%s", error);
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 8; ++j) {
                float sum = 0;
                for (int k = 0; k < 16; ++k)
                    sum += hw::to_float(a[i][k]) * hw::to_float(b[b_by_rows ? k * 8 + j : j * 16 + k]);
                CHECK(sum == c[i][j], "c[%d][%d]: %g, not %g", i, j, c[i][j], sum);
            }
    }
}

}  // namespace

int main() {
    check_product<hw::BF16, false>();
    check_product<hw::BF16, true>();
    check_product<hw::FP16, false>();
    check_product<hw::FP16, true>();
    return check::result();
}
