// y = h w^T + b, written as kv: a unit is a block of rows of w, read once.
#pragma once
#include "cpu/reparam/tiles.h"

namespace prefixattn {
namespace PA_ISA {

template <class T>
class ReparamForward {
    static constexpr int kRun = 128;  // terms of a sum that are added before they join the rest; fits L1 with its panel

  public:
    static void run(const ReparamFwdParams &p, int threads) {
        parallel_for(p.G * panels_of(p).count(), threads, pack, const_cast<ReparamFwdParams *>(&p));
        parallel_for(p.G * blocks_of(p.O), threads, unit, const_cast<ReparamFwdParams *>(&p));
    }

  private:
    // Many rows of h are lanes; few are padded to whole vectors along M.
    static Panels panels_of(const ReparamSizes &p) { return {p.P, p.M}; }
    static bool few(const ReparamSizes &p) { return p.P <= kFewRows; }
    static float *hidden(const ReparamFwdParams &p, int64_t g) {
        return p.workspace + g * (few(p) ? p.P * row_floats(p.M) : panels_of(p).floats());
    }

    static void pack(void *context, int64_t unit) {
        const auto &p = *(const ReparamFwdParams *)context;
        const Panels panels = panels_of(p);
        const int64_t g = unit / panels.count(), i = unit % panels.count(), padded = row_floats(p.M);
        const float *h = p.h + (g * p.P + panels.first(i)) * p.M;
        if (few(p))
            copy_rows(h, p.M, p.P, p.M, hidden(p, g), padded, padded);
        else
            transpose(h, p.M * 4, panels.used(i), (int)p.M, hidden(p, g) + panels.offset(i), panels.width(i));
    }

    static void unit(void *context, int64_t unit) {
        const auto &p = *(const ReparamFwdParams *)context;
        Arena arena(thread_scratch(sizeof(float) * 2 * kBlock * kPanel));
        float *y = arena.take<float>(kBlock * kPanel), *turned = arena.take<float>(kBlock * kPanel);
        const Panels panels = panels_of(p);
        const int64_t g = unit / blocks_of(p.O), o = unit % blocks_of(p.O) * kBlock;
        const int n = at_most(p.O - o, kBlock);
        const float *w = p.w + (g * p.O + o) * p.M;
        if (few(p)) {
            int r = 0;
            for (; r + kDotRows <= n; r += kDotRows) dot_rows<kDotRows>(w + r * p.M, p, hidden(p, g), y + r * kFewRows);
            for (; r < n; ++r) dot_rows<1>(w + r * p.M, p, hidden(p, g), y + r * kFewRows);
            return write(p, g, o, n, 0, (int)p.P, y, kFewRows, turned);
        }
        for (int64_t i = 0; i < panels.count(); ++i) {
            const float *h = hidden(p, g) + panels.offset(i);
            const int width = panels.width(i);
            for (int64_t m = 0; m < p.M; m += kRun) {
                // the next terms, or the first ones of the next block, are asked for while these are added
                const float *ahead = w + (m + kRun < p.M ? m + kRun : n * p.M), *end = p.w + p.G * p.O * p.M;
                for (int r = 0; r < n && i == 0; ++r)
                    for (const float *x = ahead + r * p.M; x < ahead + r * p.M + kRun && x < end; x += 16) prefetch(x);
                gemm<Fp32, true>(n, width, at_most(p.M - m, kRun), {(const char *)(w + m), p.M * 4, 4}, h + m * width,
                                 width, y, width, m > 0);
            }
            write(p, g, o, n, panels.first(i), panels.used(i), y, width, turned);
        }
    }

    // y[r][first + k] is output o + r of row first + k.
    static void write(const ReparamFwdParams &p, int64_t g, int64_t o, int n, int64_t first, int rows, const float *y,
                      int ld, float *turned) {
        const int64_t D = p.form.head_dim;
        each_run(p.form, g, p.P, o, n, [&](int row, int step, int count, int64_t offset) {
            float bias[kBlock];
            for (int k = 0; k < count; ++k) bias[k] = p.b ? p.b[g * p.O + o + row + k * step] : 0;
            transpose(y + row * ld, step * ld * 4, count, rows, turned, kBlock);
            T *out = (T *)p.kv + offset + first * D;
            for (int r = 0; r < rows; ++r, out += D) {
                float *line = turned + r * kBlock;
                for (int k = 0; k < count; ++k) line[k] += bias[k];
                store_row(line, out, count);
            }
        });
    }

    // Few rows: bound by memory, so dot products along rows of w, while the next rows are asked for.
    static constexpr int kDotRows = kMaxNV > 2 ? 4 : 2, kDotMost = 5;

    template <int R>
    static void dot_rows(const float *w, const ReparamFwdParams &p, const float *h, float *y) {
        const int64_t padded = row_floats(p.M);
        const int parts = ((int)p.P + kDotMost - 1) / kDotMost;
        for (int i = 0; i < parts; ++i) {
            const int first = (int)p.P * i / parts, rows = (int)p.P * (i + 1) / parts - first;
            const float *end = i ? w : p.w + p.G * p.O * p.M;  // asked for once
            switch (rows) {
                case 1:
                    dot<R, 1>(w, p.M, h + first * padded, padded, y + first, end);
                    break;
                case 2:
                    dot<R, 2>(w, p.M, h + first * padded, padded, y + first, end);
                    break;
                case 3:
                    dot<R, 3>(w, p.M, h + first * padded, padded, y + first, end);
                    break;
                case 4:
                    dot<R, 4>(w, p.M, h + first * padded, padded, y + first, end);
                    break;
                case 5:
                    dot<R, 5>(w, p.M, h + first * padded, padded, y + first, end);
                    break;
            }
        }
    }

    template <int R, int C>
    static void dot(const float *w, int64_t M, const float *h, int64_t ldh, float *y, const float *end) {
        vf acc[R][C];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 5
            for (int c = 0; c < C; ++c) acc[r][c] = vzero();
        const auto step = [&](int64_t m, int n) {
            vf row[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) row[r] = load(w + r * M + m, n);
#pragma GCC unroll 5
            for (int c = 0; c < C; ++c) {
                const vf x = vload(h + c * ldh + m);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) acc[r][c] = vfma(row[r], x, acc[r][c]);
            }
        };
        int64_t m = 0;
        for (; m + VL <= M; m += VL) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                if (const float *ahead = w + (R + r) * M + m; ahead < end) prefetch(ahead);
            step(m, VL);
        }
        if (m < M) step(m, (int)(M - m));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 5
            for (int c = 0; c < C; ++c) y[r * kFewRows + c] = vsum(acc[r][c]);
    }
};

inline void reparam_fwd(const ReparamFwdParams &p, int threads) {
    switch (p.dtype) {
        case DType::kFloat32:
            return ReparamForward<float>::run(p, threads);
        case DType::kBFloat16:
            return ReparamForward<bf16>::run(p, threads);
        case DType::kFloat16:
            return ReparamForward<f16>::run(p, threads);
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
