// Rows of keys or values as what a product sums over: small integers, which any order gives exactly, for each storage
// and arithmetic; odd numbers of rows, parts of them, head sizes that fill no tile, and nothing read beside the rows.
#include "check.h"
#include "cpu/attention/panels.h"

using namespace prefixattn::PA_ISA;

namespace {

template <class T, class Dot>
void columns(int n, int D, int part) {
    using Ops = Operands<T, Dot>;
    const int width = 2 * VL, stride = D + 8;
    std::vector<T> rows((size_t)n * stride);
    std::vector<int> numbers((size_t)n * D), weights((size_t)(n + 1) * width);
    for (T &x : rows) from_float(NAN, &x);
    for (int r = 0; r < n; ++r)
        for (int d = 0; d < D; ++d)
            from_float((float)(numbers[(size_t)r * D + d] = check::below(17) - 8), &rows[(size_t)r * stride + d]);
    // [n][width] floats, or [pairs][width]; a pair's second number is 0 where there is no such row
    std::vector<float> b((size_t)n * width), c((size_t)D * width, 1.f);
    for (int r = 0; r < n; ++r)
        for (int i = 0; i < width; ++i) {
            const float x = (float)(weights[(size_t)r * width + i] = check::below(17) - 8);
            T half;
            from_float(x, &half);
            if (Ops::kPairs)
                std::memcpy((char *)&b[(size_t)(r / 2) * width + i] + r % 2 * sizeof(T), &half, sizeof(T));
            else
                b[(size_t)r * width + i] = x;
        }
    prefixattn::Strided t;
    t.data = rows.data(), t.stride2 = stride;
    std::vector<float> copy((size_t)n * D), buffer((size_t)Ops::column_words(n, D) + 16);
    const auto packed = Ops::columns(Ops::rows(t, 0, 0, 0, n, D, copy.data()), n, D, (uint32_t *)buffer.data());
    for (int r = 0; r < n; r += part) {
        const float *from = b.data() + (size_t)(Ops::kPairs ? r / 2 : r) * width;
        Ops::add_product(packed, r, min_of(part, n - r), D, width, from, width, c.data(), width);
    }
    for (int d = 0; d < D; ++d)
        for (int i = 0; i < width; ++i) {
            int right = 1;
            for (int r = 0; r < n; ++r) right += numbers[(size_t)r * D + d] * weights[(size_t)r * width + i];
            const float found = c[(size_t)d * width + i];
            CHECK(found == (float)right, "n %d, D %d, parts of %d: C[%d, %d] is %g, expected %d", n, D, part, d, i,
                  found, right);
        }
}

template <class T, class Dot>
void all() {
    for (int n : {1, 2, 5, 16, 31, 32, 33, 63, 64, 100, 128})
        for (int D : {8, 24, 32, 64, 72, 128, 256})
            for (int part : {32, 64, 128}) columns<T, Dot>(n, D, part);
}

#if defined(PA_TILES)
// The same of what tiles read, which is packed: rows of a prefix and own ones behind them, whose strides differ, as a
// product sums over them and along them. Nothing beside the rows is read, and rows up to a whole group are zeros.
// Numbers that are split have more digits than one plane holds, and meet some that one does.
template <class Dot>
void panels(int n, int n_prefix, int D) {
    using T = typename Dot::Storage;
    using Number = typename Dot::Number;
    constexpr int kLargest = Dot::kPlanes == 2 ? 1 << 13 : 8;
    const int width = 2 * kTile, groups = (int)(up(n, kGroup) / kGroup), tall = (int)(up(D, kTile) / kTile);
    const int strides[] = {D, D + 8}, steps = (int)RowTiles<Dot>::steps(D);
    std::vector<T> parts[2];
    std::vector<int> numbers((size_t)n * D), over((size_t)n * width), along((size_t)D * width);
    for (int part = 0; part < 2; ++part) {
        const int rows = part ? n - n_prefix : n_prefix;
        parts[part].resize((size_t)rows * strides[part] + 1);
        for (T &x : parts[part]) from_float(NAN, &x);
        for (int r = 0; r < rows; ++r)
            for (int d = 0; d < D; ++d)
                from_float(
                    (float)(numbers[(size_t)(r + part * n_prefix) * D + d] = check::below(2 * kLargest + 1) - kLargest),
                    &parts[part][(size_t)r * strides[part] + d]);
    }
    // words of B: pairs of rows, and pairs of elements; zeros past n and D, and in a second plane
    const size_t over_plane = (size_t)groups * kGroup * width, along_plane = (size_t)steps * kGroup * width;
    std::vector<Number> pairs(Dot::kPlanes * over_plane), halves(Dot::kPlanes * along_plane);
    for (Number &x : pairs) from_float(0.f, &x);
    for (Number &x : halves) from_float(0.f, &x);
    for (int r = 0; r < n; ++r)
        for (int i = 0; i < width; ++i)
            from_float((float)(over[(size_t)r * width + i] = check::below(17) - 8),
                       &pairs[(size_t)(r / 2 * width + i) * 2 + r % 2]);
    for (int d = 0; d < D; ++d)
        for (int i = 0; i < width; ++i)
            from_float((float)(along[(size_t)d * width + i] = check::below(17) - 8),
                       &halves[(size_t)(d / 2 * width + i) * 2 + d % 2]);

    constexpr int kSize = sizeof(T);
    const JoinedRows rows{(const char *)parts[0].data(), kSize * strides[0], n_prefix,
                          (const char *)parts[1].data(), kSize * strides[1], n};
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> by_row((size_t)RowTiles<Dot>::bytes(n, D) / 64),
        by_column((size_t)ColumnTiles<Dot>::bytes(n, D) / 64);
    std::memset(by_row.data(), 0xff, by_row.size() * 64), std::memset(by_column.data(), 0xff, by_column.size() * 64);
    RowTiles<Dot>::pack(rows, D, by_row[0].bytes);
    ColumnTiles<Dot>::pack(rows, D, by_column[0].bytes);

    const auto right = [&](int m, int i, bool transposed) {
        int sum = 0;
        for (int k = 0; k < (transposed ? n : D); ++k)
            sum += transposed ? (m < D ? numbers[(size_t)k * D + m] * over[(size_t)k * width + i] : 0)
                              : (m < n ? numbers[(size_t)m * D + k] * along[(size_t)k * width + i] : 0);
        return sum;
    };
    const auto ask = [&](bool transposed, int tiles, int K, const TileStream &a, const std::vector<Number> &b) {
        const ptrdiff_t plane = 2 * (ptrdiff_t)(transposed ? over_plane : along_plane);
        std::vector<float> c((size_t)tiles * kTile * width, 1.f);
        add_product<Dot>(tiles, 2, K, a, {(const char *)b.data(), 4 * width, 64, 4 * width * kTile, plane}, c.data(),
                         width, true);
        for (int m = 0; m < tiles * kTile; ++m)
            for (int i = 0; i < width; ++i)
                CHECK(c[(size_t)m * width + i] == 1.f + (float)right(m, i, transposed),
                      "%s, %d rows of which %d are a prefix's, D %d: C[%d, %d] is %g, expected %d",
                      transposed ? "over rows" : "along rows", n, n_prefix, D, m, i, c[(size_t)m * width + i],
                      1 + right(m, i, transposed));
    };
    ask(false, 2 * groups, steps, RowTiles<Dot>::stream(by_row[0].bytes, 0, D), halves);
    ask(true, tall, groups, ColumnTiles<Dot>::stream(by_column[0].bytes, 0, D), pairs);
}

template <class Dot>
void all_panels() {
    for (int n : {1, 2, 15, 16, 31, 32, 33, 64, 95})
        for (int n_prefix : {0, 1, 10, 31, 32, 50})
            for (int D : {8, 24, 32, 40, 64, 72, 256})
                if (n_prefix <= n) panels<Dot>(n, n_prefix, D);
}
#endif

}  // namespace

int main() {
    all<float, Fp32>();
    all<bf16, Fp32>();
    all<f16, Fp32>();
#if defined(PA_BF16DOT)
    all<bf16, Bf16Dot>();
#endif
#if defined(PA_TILES)
    Tiles::configure();
    all_panels<TileDot<bf16>>();
    all_panels<TileDot<f16>>();
    all_panels<SplitDot>();
    Tiles::release();
#endif
    return check::result();
}
