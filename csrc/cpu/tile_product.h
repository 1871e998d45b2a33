// gemm.h's product on tiles: blocks of 2 x 2 tiles of C, for which A and B have two registers each. A is read where it
// lies. What fills no tile is copied to one and padded with zeros, so every element of C has the same sums wherever it
// stands: both passes find the same score.
#pragma once
#include "cpu/parallel.h"
#include "cpu/tiles.h"

#if defined(PA_TILES)
namespace prefixattn {
namespace PA_ISA {

// T: bf16 or f16. Words are pairs of T.
template <class T>
struct TileDot {
    static constexpr bool kPairs = true, kTiles = true;
    static constexpr ptrdiff_t kRowOfTile = 4 * kTile;  // bytes
    static Region region() { return {Tiles::configure, Tiles::release}; }

    struct Words {         // of A, by tiles
        const char *data;  // A[m, k] lies at data + m * row + k / 16 * step + k % 16 * 4
        ptrdiff_t row, step;
    };

    // C[m, n] (+)= sum_k A[m, k] * B[k, n]. K counts words; strides of B and C count words.
    static void product(int M, int N, int K, Words a, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc,
                        bool accumulate) {
        for (int n = 0; n < N; n += 2 * kTile)
            for (int m = 0; m < M; m += 2 * kTile) {
                const Words rows{a.data + m * a.row, a.row, a.step};
                const bool tall = M - m > kTile, wide = N - n > kTile;
                const auto multiply = tall ? wide ? block<2, 2> : block<2, 1> : wide ? block<1, 2> : block<1, 1>;
                multiply(M - m, N - n, K, rows, b + n, ldb, c + m * ldc + n, ldc, accumulate);
            }
    }

  private:
    static int up_to_tile(int n) { return n < kTile ? n : kTile; }

    // The first MI x NJ tiles of an M x N product.
    template <int MI, int NJ>
    static void block(int M, int N, int K, Words a, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc,
                      bool accumulate) {
        const int rows[2] = {up_to_tile(M), up_to_tile(M - kTile)}, columns[2] = {up_to_tile(N), up_to_tile(N - kTile)};
        each<MI, NJ>([&](auto i, auto j) {
            float *from = c + i() * kTile * ldc + j() * kTile;
            if (!accumulate) return Tiles::zero_c<i(), j()>();
            with_padding(from, 4 * ldc, rows[i()], columns[j()],
                         [&](const void *src, ptrdiff_t bytes) { Tiles::load_c<i(), j()>((const float *)src, bytes); });
        });
        for (int k = 0; k < K; k += kTile, a.data += a.step, b += kTile * ldb) {
            const int words = up_to_tile(K - k);
            each<MI, 1>([&](auto i, auto) {
                with_padding(a.data + i() * kTile * a.row, a.row, rows[i()], words,
                             [&](const void *src, ptrdiff_t bytes) { Tiles::load_a<i()>(src, bytes); });
            });
            each<1, NJ>([&](auto, auto j) {
                with_padding(b + j() * kTile, 4 * ldb, words, columns[j()],
                             [&](const void *src, ptrdiff_t bytes) { Tiles::load_b<j()>(src, bytes); });
            });
            each<MI, NJ>([&](auto i, auto j) { Tiles::product<T, i(), j()>(); });
        }
        each<MI, NJ>([&](auto i, auto j) {
            float *to = c + i() * kTile * ldc + j() * kTile;
            if (rows[i()] == kTile && columns[j()] == kTile) return Tiles::store_c<i(), j()>(to, 4 * ldc);
            alignas(64) float whole[kTile * kTile];
            Tiles::store_c<i(), j()>(whole, 4 * kTile);
            for (int r = 0; r < rows[i()]; ++r)
                for (int n = 0; n < columns[j()]; ++n) to[r * ldc + n] = whole[r * kTile + n];
        });
    }

    template <int n>
    struct Index {
        constexpr int operator()() const { return n; }
    };

    template <int MI, int NJ, class F>
    static void each(F f) {
        f(Index<0>(), Index<0>());
        if constexpr (NJ == 2) f(Index<0>(), Index<1>());
        if constexpr (MI == 2) f(Index<1>(), Index<0>());
        if constexpr (MI == 2 && NJ == 2) f(Index<1>(), Index<1>());
    }

    // Calls load with a tile's address and stride: in place, or of a copy with zeros past its rows and words. Nothing
    // past them is read: it may lie outside a tensor, and a nan there would not be taken away by a zero beside it.
    template <class F>
    static void with_padding(const void *src, ptrdiff_t bytes, int rows, int words, F load) {
        if (rows == kTile && words == kTile) return load(src, bytes);
        alignas(64) uint32_t whole[kTile * kTile];
#if defined(PA_AVX512)
        const __mmask16 present = (__mmask16)((1u << words) - 1);
        for (int r = 0; r < kTile; ++r)
            _mm512_store_si512(whole + r * kTile,
                               _mm512_maskz_loadu_epi32(r < rows ? present : (__mmask16)0,
                                                        (const char *)src + (r < rows ? r * bytes : 0)));
#else
        std::memset(whole, 0, sizeof whole);
        for (int r = 0; r < rows; ++r) std::memcpy(whole + r * kTile, (const char *)src + r * bytes, 4 * words);
#endif
        load(whole, 4 * kTile);
    }
};

// Whether products of whole and of part tiles come out right. Of small integers, whose sums are exact in any order.
template <class T>
inline bool tiles_multiply() {
    constexpr int M = 20, N = 37, K = 19;
    float x[M][2 * K], y[2 * K][N], c[M][N];
    T a[M][2 * K], b[K][N][2];
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < 2 * K; ++k) x[m][k] = (float)((3 * m + 5 * k) % 11 - 5), from_float(x[m][k], &a[m][k]);
    for (int k = 0; k < 2 * K; ++k)
        for (int n = 0; n < N; ++n)
            y[k][n] = (float)((7 * k + 2 * n) % 13 - 6), from_float(y[k][n], &b[k / 2][n][k % 2]);
    const Region region = TileDot<T>::region();
    region.enter();
    TileDot<T>::product(M, N, K, {(const char *)a, 4 * K, TileDot<T>::kRowOfTile}, (const float *)b, N, c[0], N, false);
    TileDot<T>::product(M, N, K, {(const char *)a, 4 * K, TileDot<T>::kRowOfTile}, (const float *)b, N, c[0], N, true);
    region.leave();
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float sum = 0;
            for (int k = 0; k < 2 * K; ++k) sum += x[m][k] * y[k][n];
            if (c[m][n] != 2 * sum) return false;
        }
    return true;
}

}  // namespace PA_ISA
}  // namespace prefixattn
#endif
