// Products over tiles: blocks of 2 x 2 tiles of C, for which A and B have two registers each. All tiles are whole; what
// is packed for them (attention/panels.h) has zeros where a tensor ends, so every element of C has the same sums
// wherever it stands: both passes find the same score.
#pragma once
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace prefixattn {
namespace PA_ISA {

constexpr int kTileBytes = 64 * kTile;

// Tiles of an operand, by bytes to the next row of a tile, to the next tile of C, to the next that is summed, and to
// the same tile of the second plane.
struct TileStream {
    const char *data;
    ptrdiff_t row, tile, step, plane = 0;
};

// C [16 tall][16 wide] (+)= A B over `steps` tiles each. C has rows of ldc floats. Defined where there are tiles.
template <class Dot>
void add_product(int tall, int wide, int steps, const TileStream &a, const TileStream &b, float *c, ptrdiff_t ldc,
                 bool adds);

#if defined(PA_TILES)
// What tensors hold, and what words are pairs of: bf16 or f16, in so many planes.
template <class T>
struct TileDot {
    using Storage = T;
    using Number = T;
    static constexpr bool kPairs = true, kTiles = true;
    static constexpr int kPlanes = 1;
    static Region region() { return {Tiles::configure, Tiles::release}; }
};

// float32 as two bfloat16, what it rounds to and the rest: of x y the products x0 y0, x0 y1 and x1 y0. What is left
// out, and what the rest of x and of y rounds away, are at most 2^-18 of x y each.
struct SplitDot {
    using Storage = float;
    using Number = bf16;
    static constexpr bool kPairs = true, kTiles = true;
    static constexpr int kPlanes = 2;
    static Region region() { return {Tiles::configure, Tiles::release}; }
};

// C[i][j] += A[i] B[j] for i < MI and j < NJ; C stands in the registers.
template <class T, int MI, int NJ>
inline void multiply_tiles(const TileStream &a, const TileStream &b, int step) {
    const char *pa = a.data + step * a.step, *pb = b.data + step * b.step;
    Tiles::load_a<0>(pa, a.row);
    Tiles::load_b<0>(pb, b.row);
    Tiles::product<T, 0, 0>();
    if constexpr (NJ == 2) {
        Tiles::load_b<1>(pb + b.tile, b.row);
        Tiles::product<T, 0, 1>();
    }
    if constexpr (MI == 2) {
        Tiles::load_a<1>(pa + a.tile, a.row);
        Tiles::product<T, 1, 0>();
        if constexpr (NJ == 2) Tiles::product<T, 1, 1>();
    }
}
template <int MI, int NJ>
inline void zero_tiles() {
    Tiles::zero_c<0, 0>();
    if constexpr (NJ == 2) Tiles::zero_c<0, 1>();
    if constexpr (MI == 2) Tiles::zero_c<1, 0>();
    if constexpr (MI == 2 && NJ == 2) Tiles::zero_c<1, 1>();
}
template <int MI, int NJ>
inline void load_tiles(const float *c, ptrdiff_t ld) {
    Tiles::load_c<0, 0>(c, 4 * ld);
    if constexpr (NJ == 2) Tiles::load_c<0, 1>(c + kTile, 4 * ld);
    if constexpr (MI == 2) Tiles::load_c<1, 0>(c + kTile * ld, 4 * ld);
    if constexpr (MI == 2 && NJ == 2) Tiles::load_c<1, 1>(c + kTile * ld + kTile, 4 * ld);
}
template <int MI, int NJ>
inline void store_tiles(float *c, ptrdiff_t ld) {
    Tiles::store_c<0, 0>(c, 4 * ld);
    if constexpr (NJ == 2) Tiles::store_c<0, 1>(c + kTile, 4 * ld);
    if constexpr (MI == 2) Tiles::store_c<1, 0>(c + kTile * ld, 4 * ld);
    if constexpr (MI == 2 && NJ == 2) Tiles::store_c<1, 1>(c + kTile * ld + kTile, 4 * ld);
}

template <class Dot, int MI, int NJ>
void add_block(int steps, const TileStream &a, const TileStream &b, float *c, ptrdiff_t ldc, bool adds) {
    if (adds)
        load_tiles<MI, NJ>(c, ldc);
    else
        zero_tiles<MI, NJ>();
    for (int i = Dot::kPlanes - 1; i >= 0; --i)  // of planes, the smallest products first
        for (int j = Dot::kPlanes - 1 - i; j >= 0; --j) {
            TileStream rows = a, columns = b;
            rows.data += i * a.plane, columns.data += j * b.plane;
            for (int k = 0; k < steps; ++k) multiply_tiles<typename Dot::Number, MI, NJ>(rows, columns, k);
        }
    store_tiles<MI, NJ>(c, ldc);
}
template <class Dot>
void add_product(int tall, int wide, int steps, const TileStream &a, const TileStream &b, float *c, ptrdiff_t ldc,
                 bool adds) {
    for (int n = 0; n < wide; n += 2)
        for (int m = 0; m < tall; m += 2) {
            TileStream rows = a, columns = b;
            rows.data += m * a.tile, columns.data += n * b.tile;
            const bool two = tall - m > 1, both = wide - n > 1;
            const auto block = two    ? both ? add_block<Dot, 2, 2> : add_block<Dot, 2, 1>
                               : both ? add_block<Dot, 1, 2>
                                      : add_block<Dot, 1, 1>;
            block(steps, rows, columns, c + kTile * (m * ldc + n), ldc, adds);
        }
}

// Whether products come out right. Of small integers, whose sums are exact in any order.
template <class T>
inline bool tiles_multiply() {
    constexpr int M = 2 * kTile, N = 2 * kTile, K = 4 * kTile;
    alignas(64) T a[M][K], b[K / 2][N][2];
    alignas(64) float c[M][N];
    const auto x = [](int m, int k) { return (float)((3 * m + 5 * k) % 11 - 5); };
    const auto y = [](int k, int n) { return (float)((7 * k + 2 * n) % 13 - 6); };
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < K; ++k) from_float(x(m, k), &a[m][k]);
    for (int k = 0; k < K; ++k)
        for (int n = 0; n < N; ++n) from_float(y(k, n), &b[k / 2][n][k % 2]);
    const TileStream rows{(const char *)a, 2 * K, 2 * K * kTile, 64},
        columns{(const char *)b, 4 * N, 64, 4 * N * kTile};
    const Region region = TileDot<T>::region();
    region.enter();
    add_product<TileDot<T>>(2, 2, 2, rows, columns, c[0], N, false);
    add_product<TileDot<T>>(2, 2, 2, rows, columns, c[0], N, true);
    region.leave();
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float sum = 0;
            for (int k = 0; k < K; ++k) sum += x(m, k) * y(k, n);
            if (c[m][n] != 2 * sum) return false;
        }
    return true;
}
#endif

}  // namespace PA_ISA
}  // namespace prefixattn
