// Backward of longer axes, third pass: dq. A block has 64 queries of one head, a warp 16 of them in registers, and goes
// over the tiles of the virtual key axis that they see.
#pragma once
#include "cuda/attention/bwd_key_side.h"

namespace prefixattn::cuda {

template <class E, int D>
struct BwdQueries {
    using Params = BwdLaunch;
    static constexpr int kWarps = 4, kThreads = kWarps * hw::kWarp, kQueries = kWarps * kStep;
    static constexpr int kKeys = D == 64 ? 64 : 32, kBlocks = kKeys / kColumns;
    static constexpr int kMinBlocks = 2;
    static constexpr const char *kName = "bwd_queries";
    static constexpr int kTile = Tile<D>::bytes(kKeys);

    static int shared_bytes() { return 4 * kTile + 2 * Bias::bytes(kKeys); }
    static hw::Grid grid(const BwdParams &p) { return {(int)p.B, (int)p.H, ceil_div((int)p.L, kQueries)}; }

    using Scores = float[kBlocks][4];
    using Rows = uint32_t[D / kStep][4];

    PA_DEVICE static Tile<D> keys(int i, int which) { return {hw::shared_begin() + (2 * i + which) * kTile}; }
    PA_DEVICE static Bias bias(const Params &p, int i) {
        return {hw::shared_begin() + (4 * kTile + i * Bias::bytes(kKeys)), p.mask_kind != MaskKind::kNone};
    }

    // Columns first .. first + kKeys. Rows past the end and hidden ones are zeros.
    PA_DEVICE static void ask_keys(const Params &p, const Axis &axis, int i, int b, int h, int g, int first) {
        const KeyRows<E> k(p, p.k, p.prefix_k, b, g), v(p, p.v, p.prefix_v, b, g);
        const Bias into = bias(p, i);
        const int piece = hw::thread() % Tile<D>::kPieces;
        PA_UNROLL
        for (int j = 0; j < kKeys * Tile<D>::kPieces / kThreads; ++j) {
            const int row = hw::thread() / Tile<D>::kPieces + j * (kThreads / Tile<D>::kPieces), column = first + row;
            bool inside = column < axis.end;
            if (into.there) {
                const float added = mask_at<E>(p, axis, b, h, column);
                inside = inside && added != kMinusInf;
                if (piece == 0) hw::store_shared(into.at + 4 * row, added);
            }
            const int from = inside ? column : 0;
            hw::copy_async16(keys(i, 0).piece(row, piece), key_row(k, axis, from) + piece * kPiece, inside);
            hw::copy_async16(keys(i, 1).piece(row, piece), key_row(v, axis, from) + piece * kPiece, inside);
        }
    }

    // c = a * rows^T, of the first `columns` columns.
    PA_DEVICE static void multiply_transposed(Scores &c, const Rows &a, const Tile<D> &rows, int columns) {
        PA_UNROLL
        for (int n = 0; n < kBlocks; n += 2) {
            clear(c[n]);
            clear(c[n + 1]);
            if (n * kColumns >= columns) continue;
            PA_UNROLL
            for (int k = 0; k < D / kStep; ++k)
                multiply<E>(c[n], c[n + 1], a[k], load_b(rows, n * kColumns, k * kStep));
        }
    }

    PA_DEVICE static void gain_prefix(Scores &c, int prefix, float gain) {
        PA_UNROLL
        for (int n = 0; n < kBlocks; ++n) PA_UNROLL
        for (int i = 0; i < 4; ++i)
            if (n * kColumns + column_of(i) < prefix) c[n][i] *= gain;
    }

    PA_DEVICE static void load_queries(Rows &a, const Params &p, const Strided &t, int b, int h, int l) {
        RowPieces<D> pieces = load_rows<D>(tensor_row<E>(t, b, h, l), t.stride2, (int)p.L - l);
        rows_as_a<D>(a, pieces);
    }

    PA_DEVICE static void run(const Params &p) {
        const int b = hw::block_x(), h = hw::block_y(), g = h / p.members;
        // under causality the last queries see most: they begin first
        const int tile = ((int)p.L + kQueries - 1) / kQueries - 1 - hw::block_z();
        const Axis axis(p, b);
        const int l = tile * kQueries + hw::warp() * kStep, L = (int)p.L;
        const int block_end = axis.seen((tile + 1) * kQueries < L ? tile * kQueries + kQueries - 1 : L - 1);
        const int warp_end = l < L ? axis.seen(l + kStep < L ? l + kStep - 1 : L - 1) : 0;

        if (block_end > 0) ask_keys(p, axis, 0, b, h, g, 0);
        hw::copy_commit();
        float lse[2], delta[2];
        int hidden[2];
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = l + row_of(2 * half);
            const int64_t at = ((int64_t)b * p.H + h) * p.L + row;
            const float found = row < L ? hw::load_global((const float *)p.lse + at) : kMinusInf;
            const bool some = found != kMinusInf;
            lse[half] = some ? found * kLog2e : 0.f;
            delta[half] = row < L ? hw::load_global(p.delta + at) : 0.f;
            hidden[half] = some ? axis.seen(row) : 0;
        }
        Rows q, dout;
        load_queries(q, p, p.q, b, h, l < L ? l : 0);
        load_queries(dout, p, p.dout, b, h, l < L ? l : 0);
        float dq[D / kColumns][4] = {};

        PA_NO_UNROLL
        for (int first = 0, i = 0; first < block_end; first += kKeys, i ^= 1) {
            hw::copy_wait<0>();
            hw::sync_block();
            if (first + kKeys < block_end) ask_keys(p, axis, 1 - i, b, h, g, first + kKeys);
            hw::copy_commit();
            if (p.drops.threshold && first < axis.prefix) {
                const int64_t head = (int64_t)b * p.Hkv + g;
                drop_prefix<kKeys, kThreads>(keys(i, 0), axis, first, dropout_seed(p), p.drops.threshold, head,
                                             kDropsPrefixK);
                drop_prefix<kKeys, kThreads>(keys(i, 1), axis, first, dropout_seed(p), p.drops.threshold, head,
                                             kDropsPrefixV);
                hw::sync_block();
            }
            if (first >= warp_end) continue;
            const int columns = warp_end - first;
            Scores s, w;
            multiply_transposed(s, q, keys(i, 0), columns);
            multiply_transposed(w, dout, keys(i, 1), columns);
            const bool gains = p.drops.gain != 1.f && first < axis.prefix;
            if (gains) {
                gain_prefix(s, axis.prefix - first, p.drops.gain);
                gain_prefix(w, axis.prefix - first, p.drops.gain);
            }
            weigh(p, s, w, bias(p, i), lse, delta, hidden, first);
            if (gains) gain_prefix(w, axis.prefix - first, p.drops.gain);
            PA_UNROLL
            for (int k = 0; k < kBlocks; k += 2) {
                if (k * kColumns >= columns) continue;
                uint32_t a[4];
                as_a<E>(a, w[k], w[k + 1]);
                PA_UNROLL
                for (int n = 0; n < D / kColumns; n += 2)
                    multiply<E>(dq[n], dq[n + 1], a, load_b_transposed(keys(i, 0), k * kColumns, n * kColumns));
            }
        }
        const float factor[2] = {p.scale, p.scale};
        if (l < L) store_rows<E, D>((E *)tensor_row<E>(p.dq, b, h, l), p.dq.stride2, L - l, dq, factor);
    }

    // w, the products with values, becomes dS.
    PA_DEVICE static void weigh(const Params &p, Scores &s, Scores &w, const Bias &bias, const float (&lse)[2],
                                const float (&delta)[2], const int (&hidden)[2], int first) {
        const bool natural = has_float_mask(p);
        const float factor = natural ? kLog2e : p.scale * kLog2e;
        PA_UNROLL
        for (int n = 0; n < kBlocks; ++n) {
            hw::Floats2 added{{0.f, 0.f}};
            if (bias.there) added = bias.pair(n * kColumns + column_of(0));
            PA_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int half = c >> 1;
                const float score = natural ? s[n][c] * p.scale + added.x[c & 1] : s[n][c];
                const bool seen = first + n * kColumns + column_of(c) < hidden[half] && added.x[c & 1] != kMinusInf;
                const float power = score * factor - lse[half];
                const float weight = hw::exp2(power > 0.f ? 0.f : power);  // a nan stays
                w[n][c] = seen ? weight * (w[n][c] - delta[half]) : 0.f;
            }
        }
    }
};

}  // namespace prefixattn::cuda
