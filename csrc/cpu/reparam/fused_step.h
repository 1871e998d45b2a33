// One pass over the large matrix. A unit is a chunk of its rows; a tile of 128 x 64 is copied once, gives its share of
// dh = dy w, gets its gradient dy^T h and is updated while the next one is on its way from memory. The shares of the
// chunks are added in their order at the end: the number of chunks follows from the sizes alone, so bits do not depend
// on the number of threads.
#pragma once
#include "cpu/reparam/few.h"

namespace prefixattn {
namespace PA_ISA {

template <class Rule>
class FusedStep {
    static constexpr int kTileRows = 12;  // of a tile's gradient that are made and used together
    static constexpr int kGroup = Rule::kBlocks ? kMomentBlock / kPanel : 1;  // panels of a tile

  public:
    static void run(const FusedStepParams &p, int threads) {
        const int64_t panels = Panels{p.M, p.P}.count();
        void *context = const_cast<FusedStepParams *>(&p);
        if (Rule::kGradient) parallel_for(p.G * panels, threads, pack_hidden, context);
        parallel_for(p.G * step_chunks(p), threads, chunk, context);
        if (p.dh) parallel_for(p.G * p.P, threads, reduce, context);
    }

  private:
    // Few rows lie apart by row_floats(); many in panels, [panel][P][width].
    static float *hidden(const FusedStepParams &p, int64_t g) { return p.workspace + g * p.P * row_floats(p.M); }
    static float *share(const FusedStepParams &p, int64_t g, int64_t c) {  // of dh, in the same order
        return hidden(p, p.G + g * step_chunks(p) + c);
    }

    static Panels panels_of(const FusedStepParams &p) { return {p.M, p.P}; }
    static bool few(const FusedStepParams &p) { return p.P <= kFewStepRows; }

    static void pack_hidden(void *context, int64_t unit) {
        const auto &p = *(const FusedStepParams *)context;
        const Panels panels = panels_of(p);
        const int64_t g = unit / panels.count(), i = unit % panels.count(), ld = row_floats(p.M);
        float *dst = hidden(p, g) + (few(p) ? panels.first(i) : panels.offset(i));
        copy_rows(p.h + g * p.P * p.M + panels.first(i), p.M, p.P, panels.used(i), dst, few(p) ? ld : panels.width(i),
                  panels.width(i));
    }

    static void chunk(void *context, int64_t unit) {
        const auto &p = *(const FusedStepParams *)context;
        const int64_t chunks = step_chunks(p), g = unit / chunks, c = unit % chunks;
        const int64_t blocks = (p.O + kStepBlock - 1) / kStepBlock;
        const int64_t begin = blocks * c / chunks, end = blocks * (c + 1) / chunks;
        const int64_t padded = p.P * row_floats(p.M);
        const int64_t tiled = kGroup * (kStepBlock + kTileRows) * kPanel, floats = few(p) ? padded : tiled;
        Arena arena(thread_scratch(sizeof(float) * (kStepBlock * p.P + floats + Rule::kBuffer) + 2 * 64));
        float *dy = arena.take<float>(kStepBlock * p.P);  // [P][kStepBlock]
        float *scratch = arena.take<float>(floats);
        const Rule rule(p, arena.take<float>(Rule::kBuffer));
        const int64_t last = (g * p.O + at_most(p.O, (int)(end * kStepBlock))) * p.M;
        for (int64_t block = begin; block < end; ++block) {
            const int64_t o = block * kStepBlock;
            const int n = at_most(p.O - o, kStepBlock);
            pack_dy(p, g, o, n, dy);
            if (p.db) sum_rows(dy, p.P, n, p.db + g * p.O + o);
            if (!Rule::kGradient && !p.dh) continue;
            if (!few(p)) {
                tiles(p, rule, g, c, o, n, dy, scratch, block > begin, last);
            } else if (p.dh) {  // a long sum is made of short ones
                std::memset(scratch, 0, sizeof(float) * padded);
                rows<true>(p, rule, g, scratch, o, n, dy, last);
                add(scratch, share(p, g, c), padded, block > begin);
            } else {
                rows<false>(p, rule, g, nullptr, o, n, dy, last);
            }
        }
    }

    static void add(const float *src, float *dst, int64_t n, bool accumulate) {
        for (int64_t i = 0; i < n; i += VL)
            vstore(dst + i, accumulate ? vload(dst + i) + vload(src + i) : vload(src + i));
    }

    template <bool kDh>
    static void rows(const FusedStepParams &p, const Rule &rule, int64_t g, float *dh, int64_t o, int n,
                     const float *dy, int64_t last) {
        // so many lanes that h and dh stay in L1 while the block's rows go by
        constexpr int64_t kL1 = 24 << 10;
        constexpr int64_t kWhole = kGroup * kPanel;
        const int64_t fit = kL1 / 8 / p.P < kWhole ? kWhole : kL1 / 8 / p.P / kWhole * kWhole;
        const int64_t lanes = fit < p.M ? fit : p.M;
        for (int64_t m = 0; m < p.M; m += lanes) {
            const int64_t stop = p.M - m < lanes ? p.M : m + lanes;
            FewRows s{p.P, p.M, row_floats(p.M), hidden(p, g), dh, dy, nullptr, g * p.O + o, last};
            int r = 0;
            const auto step = [&](int rows) {
                r += rows;
                s.dy += rows;
                s.row += rows;
            };
            for (; r + kRowsAtOnce <= n; step(kRowsAtOnce)) {
                s.w = p.w + s.row * p.M;
                few_rows<Rule, kRowsAtOnce, kDh>(s, rule, m, stop);
            }
            for (; r < n; step(1)) {
                s.w = p.w + s.row * p.M;
                few_rows<Rule, 1, kDh>(s, rule, m, stop);
            }
        }
    }

    template <class F>
    static void ask(int64_t at, int rows, int64_t M, int64_t last, F f) {  // for a panel of some rows
        for (int r = 0; r < rows; ++r, at += M)
            for (int64_t x = at; x < at + kPanel && x < last; x += 16) f(x);
    }

    static void tiles(const FusedStepParams &p, const Rule &rule, int64_t g, int64_t c, int64_t o, int n,
                      const float *dy, float *tile, bool accumulate, int64_t last) {
        float *old = tile, *gradient = tile + kGroup * kStepBlock * kPanel;  // [panel of the group][row][lane]
        const Panels panels = panels_of(p);
        const int64_t row = g * p.O + o;
        for (int64_t first = 0; first < panels.count(); first += kGroup) {
            const int group = at_most(panels.count() - first, kGroup);
            for (int k = 0; k < group; ++k) {
                const int64_t i = first + k, at = row * p.M + panels.first(i);
                const int width = panels.width(i);
                float *copy = old + k * kStepBlock * kPanel;
                // the next panel, or the first one of the next block, is asked for while this one is worked on
                const int64_t ahead = i + 1 < panels.count() ? kPanel : n * p.M - panels.first(i);
                copy_rows(p.w + at, p.M, n, panels.used(i), copy, width, width);
                ask(at + ahead, n, p.M, last, [&](int64_t x) { prefetch(p.w + x); });
                ask(at, at_most(n, kTileRows), p.M, last, [&](int64_t x) { rule.prefetch_at(x); });
                if (p.dh)
                    gemm<Fp32, true>((int)p.P, width, n, {(const char *)dy, kStepBlock * 4, 4}, copy, width,
                                     share(p, g, c) + panels.offset(i), width, accumulate);
            }
            if (!Rule::kGradient) continue;
            const int64_t begin = panels.first(first);
            const int lanes = (int)(panels.first(first + group - 1) + panels.used(first + group - 1) - begin);
            for (int r0 = 0; r0 < n; r0 += kTileRows) {
                const int rows = at_most(n - r0, kTileRows);
                for (int k = 0; k < group; ++k) {
                    const int64_t i = first + k;
                    const int width = panels.width(i);
                    ask((row + r0 + kTileRows) * p.M + panels.first(i), at_most(n - r0 - rows, kTileRows), p.M, last,
                        [&](int64_t x) { rule.prefetch_at(x); });
                    gemm<Fp32, false>(rows, width, (int)p.P, {(const char *)(dy + r0), 4, kStepBlock * 4},
                                      hidden(p, g) + panels.offset(i), width, gradient + k * kTileRows * kPanel, width,
                                      false);
                }
                for (int r = 0; r < rows; ++r) {
                    rule.open(0, row + r0 + r, begin, lanes);
                    for (int k = 0; k < group; ++k) {
                        const int used = panels.used(first + k), width = panels.width(first + k);
                        const float *gs = gradient + (k * kTileRows * kPanel + r * width);
                        const float *ws = old + (k * kStepBlock * kPanel + (r0 + r) * width);
                        const int64_t at = (row + r0 + r) * p.M + panels.first(first + k);
                        for (int x = 0; x < used; x += VL)
                            rule(vload(gs + x), vload(ws + x), at + x, at_most(used - x, VL), k * kPanel + x);
                    }
                    rule.close(0, row + r0 + r, begin, lanes);
                }
            }
        }
    }

    static void pack_dy(const FusedStepParams &p, int64_t g, int64_t o, int n, float *dst) {
        if (!p.dy_is_kv) {
            const float *src = (const float *)p.dy + g * p.P * p.O + o;
            for (int64_t r = 0; r < p.P; ++r)
                for (int k = 0; k < n; ++k) dst[r * kStepBlock + k] = src[r * p.O + k] * p.grad_scale;
            return;
        }
        switch (p.dtype) {
            case DType::kFloat32:
                return pack_kv<float>(p, g, o, n, dst);
            case DType::kBFloat16:
                return pack_kv<bf16>(p, g, o, n, dst);
            case DType::kFloat16:
                return pack_kv<f16>(p, g, o, n, dst);
        }
    }

    template <class T>
    static void pack_kv(const FusedStepParams &p, int64_t g, int64_t o, int n, float *dst) {
        each_run(p.form, g, p.P, o, n, [&](int row, int step, int count, int64_t offset) {
            alignas(64) float line[kStepBlock];
            for (int64_t r = 0; r < p.P; ++r) {
                load_row((const T *)p.dy + offset + r * p.form.head_dim, line, count);
                for (int k = 0; k < count; ++k) dst[r * kStepBlock + row + k * step] = line[k] * p.grad_scale;
            }
        });
    }

    // In runs, so that a long sum is made of short ones.
    static void sum_rows(const float *dy, int64_t P, int n, float *dst) {
        float run[kStepBlock];
        for (int k = 0; k < n; ++k) dst[k] = 0;
        for (int64_t r = 0; r < P;) {
            for (int k = 0; k < n; ++k) run[k] = 0;
            for (const int64_t end = P - r < 16 ? P : r + 16; r < end; ++r)
                for (int k = 0; k < n; ++k) run[k] += dy[r * kStepBlock + k];
            for (int k = 0; k < n; ++k) dst[k] += run[k];
        }
    }

    static void reduce(void *context, int64_t unit) {
        const auto &p = *(const FusedStepParams *)context;
        const Panels panels = panels_of(p);
        const int64_t g = unit / p.P, row = unit % p.P, chunks = step_chunks(p), ld = row_floats(p.M);
        alignas(64) float sum[kPanel];
        for (int64_t i = 0; i < panels.count(); ++i) {
            const int width = panels.width(i);
            const int64_t at = few(p) ? row * ld + panels.first(i) : panels.offset(i) + row * width;
            std::memcpy(sum, share(p, g, 0) + at, 4 * width);
            for (int64_t c = 1; c < chunks; ++c) {
                const float *next = share(p, g, c) + at;
                for (int k = 0; k < width; k += VL) vstore(sum + k, vload(sum + k) + vload(next + k));
            }
            std::memcpy(p.dh + (g * p.P + row) * p.M + panels.first(i), sum, 4 * panels.used(i));
        }
    }
};

inline void reparam_fused_step(const FusedStepParams &p, int threads) {
    using F = MomentFormat;
    const F first = p.moment1.format, second = p.moment2.format;
    switch (p.rule) {
        case StepRule::kNone:
            return FusedStep<NoRule>::run(p, threads);
        case StepRule::kDense:
            return FusedStep<DenseRule>::run(p, threads);
        case StepRule::kAdamW:
            if (first == F::kFloat32 && second == F::kFloat32)
                return FusedStep<AdamWRule<float, float>>::run(p, threads);
            if (first == F::kBFloat16 && second == F::kBFloat16)
                return FusedStep<AdamWRule<bf16, bf16>>::run(p, threads);
            if (first == F::kBFloat16 && second == F::kFloat32)
                return FusedStep<AdamWRule<bf16, float>>::run(p, threads);
            return FusedStep<AdamWByBlock>::run(p, threads);
        case StepRule::kSgd:
            return first == F::kFloat32 ? FusedStep<SgdRule<float>>::run(p, threads)
                                        : FusedStep<SgdRule<bf16>>::run(p, threads);
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
