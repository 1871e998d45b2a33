// Rows of keys or values as what a product sums over: small integers, which any order gives exactly, for each storage
// and arithmetic; odd numbers of rows, parts of them, head sizes that fill no tile, and nothing read beside the rows.
#include "check.h"
#include "cpu/attention/operands.h"

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
    all<bf16, TileDot<bf16>>();
    all<f16, TileDot<f16>>();
    Tiles::release();
#endif
    return check::result();
}
