// Products of small integers, which any order of summing gives exactly: tested is which numbers meet, with tails of
// rows, of columns and of what is summed over, and that nothing beside them is read or written.
#include "check.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/pairs.h"
#include "cpu/tile_product.h"

using namespace prefixattn::PA_ISA;

namespace {

constexpr float kUntouched = 12345;
constexpr int kPadding = 3;  // elements between rows beyond what a row holds

// The numbers of a word, and how one is put together of integers.
struct Floats {
    using Dot = Fp32;
    static constexpr int kNumbers = 1;
    static void put(void *word, int, int x) {
        const float value = (float)x;
        std::memcpy(word, &value, 4);
    }
};
template <class Number, class Arithmetic>
struct Pairs {
    using Dot = Arithmetic;
    static constexpr int kNumbers = 2;
    static void put(void *word, int half, int x) {
        Number value;
        from_float((float)x, &value);
        std::memcpy((char *)word + 2 * half, &value, 2);
    }
};

template <class Words, bool kStepIsWord>
void product(int M, int N, int K, bool accumulate) {
    constexpr int n = Words::kNumbers;
    const int lda = (kStepIsWord ? K : M) + kPadding, ldb = N + kPadding, ldc = N + kPadding;
    std::vector<float> a((size_t)(kStepIsWord ? M : K) * lda + 1, NAN), b((size_t)K * ldb + 1, NAN);
    std::vector<float> c((size_t)M * ldc + 1);
    std::vector<int> a_numbers((size_t)M * K * n), b_numbers((size_t)K * N * n);
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < K; ++k)
            for (int half = 0; half < n; ++half) {
                const int x = a_numbers[((size_t)m * K + k) * n + half] = check::below(17) - 8;
                Words::put(&a[kStepIsWord ? (size_t)m * lda + k : (size_t)k * lda + m], half, x);
            }
    for (int k = 0; k < K; ++k)
        for (int j = 0; j < N; ++j)
            for (int half = 0; half < n; ++half) {
                const int x = b_numbers[((size_t)k * N + j) * n + half] = check::below(17) - 8;
                Words::put(&b[(size_t)k * ldb + j], half, x);
            }
    for (float &x : c) x = kUntouched;

    const ptrdiff_t row = kStepIsWord ? 4 * lda : 4, step = kStepIsWord ? 4 : 4 * lda;
    gemm<typename Words::Dot, kStepIsWord>(M, N, K, {(const char *)a.data(), row, step}, b.data(), ldb, c.data(), ldc,
                                           accumulate);
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < ldc; ++j) {
            int right = j < N && !accumulate ? 0 : (int)kUntouched;
            for (int k = 0; j < N && k < K * n; ++k)
                right += a_numbers[(size_t)m * K * n + k] * b_numbers[((size_t)(k / n) * N + j) * n + k % n];
            const float found = c[(size_t)m * ldc + j];
            CHECK(found == (float)right, "%s: M %d, N %d, K %d: C[%d, %d] is %g, expected %d",
                  kStepIsWord ? "step is a word" : "row is a word", M, N, K, m, j, found, right);
        }
}

template <class Words>
void products() {
    for (int M : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 31})
        for (int vectors = 1; vectors <= 9; ++vectors)
            for (int K : {0, 1, 2, 15, 16, 17, 63, 64, 65, 130})
                for (bool accumulate : {false, true}) {
                    product<Words, true>(M, vectors * VL, K, accumulate);
                    product<Words, false>(M, vectors * VL, K, accumulate);
                }
    product<Words, true>(0, VL, 3, false);
    product<Words, true>(3, 0, 3, false);
}

#if defined(PA_TILES)
// Whole tiles: their rows lie `lda`, `ldb` and `ldc` apart.
template <class T>
void tile_product(int tall, int wide, int steps, bool adds) {
    const int M = tall * kTile, N = wide * kTile, K = 2 * steps * kTile;
    const int lda = K + 6, ldb = N + kPadding, ldc = N + kPadding;
    std::vector<T> a((size_t)M * lda + 1), b(2 * ((size_t)K / 2 * ldb + 1));
    std::vector<float> c((size_t)M * ldc + 1, kUntouched);
    std::vector<int> x((size_t)M * K), y((size_t)K * N);
    for (T &number : a) from_float(NAN, &number);
    for (T &number : b) from_float(NAN, &number);
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < K; ++k)
            from_float((float)(x[(size_t)m * K + k] = check::below(17) - 8), &a[(size_t)m * lda + k]);
    for (int k = 0; k < K; ++k)
        for (int n = 0; n < N; ++n)
            from_float((float)(y[(size_t)k * N + n] = check::below(17) - 8), &b[(size_t)(k / 2 * ldb + n) * 2 + k % 2]);
    add_product<TileDot<T>>(tall, wide, steps, {(const char *)a.data(), 2 * lda, 2 * lda * kTile, 64},
                            {(const char *)b.data(), 4 * ldb, 64, 4 * ldb * kTile}, c.data(), ldc, adds);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < ldc; ++n) {
            int right = n < N && !adds ? 0 : (int)kUntouched;
            for (int k = 0; n < N && k < K; ++k) right += x[(size_t)m * K + k] * y[(size_t)k * N + n];
            const float found = c[(size_t)m * ldc + n];
            CHECK(found == (float)right, "tiles %d x %d, %d steps: C[%d, %d] is %g, expected %d", tall, wide, steps, m,
                  n, found, right);
        }
}

template <class T>
void tile_products() {
    for (int tall : {0, 1, 2, 3, 5})
        for (int wide : {0, 1, 2, 3, 4})
            for (int steps : {0, 1, 2, 5})
                for (bool adds : {false, true}) tile_product<T>(tall, wide, steps, adds);
}

// C of floats in two planes each, whose rows of A lie apart as those of weights do. It errs by three times 2^-18 of
// each product, and by what sums of floats round away.
void split_product(bool large_a, bool large_b, float magnitude) {
    constexpr int M = 3 * kTile, N = 2 * kTile, K = 4 * kTile;
    static float a[M][K], b[K][N], c[M][N];
    static bf16 rows[2][M][K];
    static uint32_t columns[2][K / 2][N];
    const auto number = [&](bool large) {
        if (magnitude == 0) return (float)(large ? check::below(1 << 15) - (1 << 14) : check::below(17) - 8);
        return std::ldexp((float)(check::below(1 << 24) - (1 << 23)), -23 + check::below(8)) * magnitude;
    };
    for (auto &row : a)
        for (float &x : row) x = number(large_a);
    for (auto &row : b)
        for (float &x : row) x = number(large_b);
    for (int m = 0; m < M; ++m) split_row(a[m], K, rows[0][m], rows[1][0] - rows[0][0]);
    for (int k = 0; k < K; k += 2)
        for (int n = 0; n < N; n += kTile)
            split_pairs(b[k] + n, b[k + 1] + n, kTile, &columns[0][k / 2][n], columns[1][0] - columns[0][0]);
    add_product<SplitDot>(M / kTile, N / kTile, K / (2 * kTile),
                          {(const char *)rows, 2 * K, 2 * K * kTile, 64, 2 * M * K},
                          {(const char *)columns, 4 * N, 64, 4 * N * kTile, 2 * K * N}, c[0], N, false);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            double right = 0, sum = 0;
            for (int k = 0; k < K; ++k) right += (double)a[m][k] * b[k][n], sum += std::fabs((double)a[m][k] * b[k][n]);
            const double allowed = magnitude == 0 ? 0 : (3 * 0x1p-18 + 0x1p-20) * sum,
                         error = std::fabs(c[m][n] - right);
            CHECK(error <= allowed, "C[%d, %d] is %a, expected %a to %a", m, n, c[m][n], right, allowed);
        }
}

// What has the digits of one plane meets both planes of the other; a nan stays one, whatever its bits.
void split_products() {
    split_product(true, false, 0);
    split_product(false, true, 0);
    for (float magnitude : {1.f, 0x1p-40f, 0x1p40f}) split_product(true, true, magnitude);
    for (uint32_t nan : {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0x7fc00000u}) {
        float row[16], back[2] = {};
        bf16 halves[32], stored[2][2 * VL];
        uint32_t pairs[32];
        for (float &x : row) x = bits_to_float(nan);
        split_row(row, 8, halves, 16);
        split_pairs(row, nullptr, 16, pairs, 16);
        store_split_halves(stored[0], 2 * VL, VL, vload(row), vload(row));
        for (int plane = 0; plane < 2; ++plane)
            back[0] += to_float(halves[16 * plane]) + to_float(stored[plane][0]),
                back[1] += to_float(bf16{(uint16_t)pairs[16 * plane]});
        CHECK(back[0] != back[0] && back[1] != back[1], "%08x is no nan any more", nan);
    }
}
#endif

}  // namespace

int main() {
    products<Floats>();
#if defined(PA_BF16DOT)
    products<Pairs<bf16, Bf16Dot>>();
#endif
#if defined(PA_TILES)
    Tiles::configure();
    tile_products<bf16>();
    tile_products<f16>();
    split_products();
    Tiles::release();
#endif
    return check::result();
}
