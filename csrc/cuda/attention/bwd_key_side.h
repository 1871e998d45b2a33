// The gradients of keys and values, which a warp keeps in registers for its own tiles of keys while queries pass.
//
// Scores are transposed, [keys][queries]: so they are at once the left operands of P^T dout and dS^T q.
#pragma once
#include "cuda/attention/bwd_stage.h"

namespace prefixattn::cuda {

// [keys][32 queries]. Two rows share what 32 banks hold, so that the swizzle goes by pairs of rows.
struct DsTile {
    static constexpr int kRowBytes = 64;
    hw::Shared at;

    PA_DEVICE hw::Shared piece(int row, int piece) const {
        return at + (row * kRowBytes + ((piece ^ ((row >> 1) & 3)) * kPieceBytes));
    }
};

PA_DEVICE void load_a_transposed(uint32_t (&a)[4], const DsTile &tile, int row, int column) {
    hw::ldmatrix_trans(a, tile.piece(row + along_row(), column / kPiece + along_piece()));
}

// What padding adds to the scores of own key s; 0 where there is no such key.
template <class E>
PA_DEVICE float padding_bias(const AttnParams &p, int b, int h, int s) {
    if (p.mask_kind == MaskKind::kNone) return 0.f;
    Axis own(p, b);
    own.prefix = 0;
    own.end = (int)p.S;
    return s < 0 ? 0.f : mask_at<E>(p, own, b, h, s);
}

constexpr int kNever = 0x7fffffff;  // stands for the column of a key that padding hides: no query sees as far

// Sums of kTiles tiles of a warp. A unit is kUnit queries.
template <class E, int D, int kTiles, int kUnit>
struct KeySide {
    static constexpr int kBlocks = kUnit / kColumns;
    using Sums = float[kTiles][D / kColumns][4];
    using Unit = float[kTiles][kBlocks][4];

    Sums dk, dv;
    uint32_t padded;  // bit 2 i + half: padding hides the key of that row of tile i
    int stride;       // the warp's tiles are warp() % stride + i * stride

    PA_DEVICE explicit KeySide(int tile_stride) : padded(0), stride(tile_stride) {
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) clear_tile(i, 0);
    }

    PA_DEVICE int row0(int i) const { return (hw::warp() % stride + i * stride) * kStep; }  // of tile i

    // Rows from `kept` on become 0.
    PA_DEVICE void clear_tile(int i, int kept) {
        PA_UNROLL
        for (int j = 0; j < D / kColumns; ++j) PA_UNROLL
        for (int c = 0; c < 4; ++c)
            if (row0(i) + row_of(c) >= kept) dk[i][j][c] = dv[i][j][c] = 0.f;
    }

    // Which keys padding hides. The column after the prefix is own key s0.
    PA_DEVICE void place(const BwdLaunch &p, const Axis &axis, int b, int h, int s0) {
        padded = 0;
        if (p.mask_kind == MaskKind::kNone) return;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i)
            PA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int own = row0(i) + row_of(2 * half) - axis.prefix + s0;
                padded |= (uint32_t)(padding_bias<E>(p, b, h, own) == kMinusInf) << (2 * i + half);
            }
    }

    // c[tile] += rows * queries^T. Queries from kColumns * blocks on, and tiles from `tiles` on, are left out.
    template <int n_blocks>
    PA_DEVICE void multiply_transposed(float (&c)[kTiles][n_blocks][4], const Tile<D> &rows, const Tile<D> &queries,
                                       int query, int blocks, int tiles) const {
        PA_UNROLL
        for (int k = 0; k < D; k += kStep) {
            uint32_t a[kTiles][4];
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                if (i < tiles) load_a(a[i], rows, row0(i), k);
            PA_UNROLL
            for (int n = 0; n < n_blocks; n += 2) {
                if (n >= blocks) continue;
                const TwoB b = load_b(queries, query + n * kColumns, k);
                PA_UNROLL
                for (int i = 0; i < kTiles; ++i) {
                    if (i >= tiles) continue;
                    hw::mma<E>(c[i][n], a[i], b.first);
                    if (n + 1 < blocks) hw::mma<E>(c[i][n + 1], a[i], b.second);
                }
            }
        }
    }

    // sums[tile] += (left, right) * 16 rows, for the tiles that are wanted.
    PA_DEVICE static void multiply_rows(Sums &sums, const uint32_t (&a)[kTiles][4], const Tile<D> &rows, int query,
                                        const bool (&wanted)[kTiles]) {
        PA_UNROLL
        for (int n = 0; n < D / kColumns; n += 2) {
            const TwoB b = load_b_transposed(rows, query, n * kColumns);
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                if (wanted[i]) multiply<E>(sums[i][n], sums[i][n + 1], a[i], b);
        }
    }

    // Times prefix dropout's gain, where the key is of the prefix.
    template <int n_blocks>
    PA_DEVICE void gain_prefix(float (&c)[kTiles][n_blocks][4], const Axis &axis, float gain) const {
        if (gain == 1.f) return;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float factor = row0(i) + row_of(2 * half) < axis.prefix ? gain : 1.f;
            PA_UNROLL
            for (int j = 0; j < n_blocks; ++j) c[i][j][2 * half] *= factor, c[i][j][2 * half + 1] *= factor;
        }
    }

    // Queries query .. query + kUnit of a stage, the first of which is l0 < L. `ds` gets dS^T for dq.
    template <class StageOf>
    PA_DEVICE void unit(const BwdLaunch &p, const Axis &axis, int b, int h, int s0, const Tile<D> &k, const Tile<D> &v,
                        const StageOf &stage, int i_stage, int query, int l0, bool wants_ds, const DsTile &ds) {
        const int left = (int)p.L - l0, inside = left < kUnit ? left : kUnit;
        const int blocks = (inside + kColumns - 1) / kColumns, end = axis.seen(l0 + inside - 1);
        int tiles = 0;
        bool wants_dk[kTiles], wants_dv[kTiles], more = wants_ds;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            const bool there = row0(i)<end, prefix = row0(i) < axis.prefix, own = row0(i) + kStep> axis.prefix;
            tiles += there;
            wants_dk[i] = there && ((prefix && p.dprefix_k.data) || (own && p.dk.data));
            wants_dv[i] = there && ((prefix && p.dprefix_v.data) || (own && p.dv.data));
            more |= wants_dk[i] || wants_dv[i];
        }
        if (tiles == 0 || !more) return;
        Unit s = {};
        multiply_transposed(s, k, stage.q(i_stage), query, blocks, tiles);
        gain_prefix(s, axis, p.drops.gain);
        float factor = p.scale * kLog2e;
        if (has_float_mask(p)) {
            factor = kLog2e;
            add_bias(s, p, axis, b, h, s0);
        }
        weigh(s, stage.side(i_stage, 0), stage.side(i_stage, 2), query, factor);
        gain_prefix(s, axis, p.drops.gain);
        PA_UNROLL
        for (int n = 0; n < kBlocks; n += 2) {
            if (n >= blocks) continue;
            uint32_t a[kTiles][4];
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i) as_a<E>(a[i], s[i][n], s[i][n + 1]);
            multiply_rows(dv, a, stage.dout(i_stage), query + n * kColumns, wants_dv);
        }
        bool any_dk = wants_ds;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) any_dk |= wants_dk[i];
        if (!any_dk) return;
        // 16 queries at a time: registers
        PA_UNROLL
        for (int n = 0; n < kBlocks; n += 2) {
            uint32_t a[kTiles][4];
            if (n < blocks) {
                float w[kTiles][2][4] = {};
                multiply_transposed(w, v, stage.dout(i_stage), query + n * kColumns, blocks - n, tiles);
                gain_prefix(w, axis, p.drops.gain);
                differentiate(w, s, n, stage.side(i_stage, 1), query);
                PA_UNROLL
                for (int i = 0; i < kTiles; ++i) as_a<E>(a[i], w[i][0], w[i][1]);
                if (wants_ds) store_ds(ds, a, n, tiles);
                multiply_rows(dk, a, stage.q(i_stage), query + n * kColumns, wants_dk);
            }
        }
    }

    // Scores become weights, 0 where a key is hidden.
    PA_DEVICE void weigh(Unit &s, hw::Shared side_lse, hw::Shared side_hidden, int query, float factor) const {
        int column[kTiles][2];
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i)
            PA_UNROLL
            for (int half = 0; half < 2; ++half)
                column[i][half] = padded >> (2 * i + half) & 1 ? kNever : row0(i) + row_of(2 * half);
        PA_UNROLL
        for (int j = 0; j < kBlocks; ++j) {
            const int at = 4 * (query + j * kColumns + column_of(0));
            const auto lse = hw::load_shared<hw::Floats2>(side_lse + at);
            const auto hidden = hw::load_shared<hw::Words2>(side_hidden + at);
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                PA_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const float power = s[i][j][c] * factor - lse.x[c & 1];
                    const float weight = hw::exp2(power > 0.f ? 0.f : power);  // a nan stays
                    s[i][j][c] = column[i][c >> 1] < (int)hidden.x[c & 1] ? weight : 0.f;
                }
        }
    }

    // w, the products of dout and values, becomes dS, of blocks n and n + 1. A hidden key's value may be a nan.
    PA_DEVICE void differentiate(float (&w)[kTiles][2][4], const Unit &s, int n, hw::Shared side_delta,
                                 int query) const {
        PA_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int at = 4 * (query + (n + j) * kColumns + column_of(0));
            const auto delta = hw::load_shared<hw::Floats2>(side_delta + at);
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                PA_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const float weight = s[i][n + j][c];
                    w[i][j][c] = weight != 0.f ? weight * (w[i][j][c] - delta.x[c & 1]) : 0.f;
                }
        }
    }

    // Scores in natural units, with the padding's bias.
    PA_DEVICE void add_bias(Unit &s, const BwdLaunch &p, const Axis &axis, int b, int h, int s0) const {
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int at = row0(i) + row_of(2 * half);
            const float bias = padding_bias<E>(p, b, h, at - axis.prefix + s0);
            PA_UNROLL
            for (int j = 0; j < kBlocks; ++j) PA_UNROLL
            for (int c = 2 * half; c < 2 * half + 2; ++c) s[i][j][c] = s[i][j][c] * p.scale + bias;
        }
    }

    // Blocks n and n + 1 of dS, packed as left operands.
    PA_DEVICE void store_ds(const DsTile &ds, const uint32_t (&a)[kTiles][4], int n, int tiles) const {
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            if (i >= tiles) continue;
            PA_UNROLL
            for (int j = 0; j < 4; ++j)
                hw::store_shared(ds.piece(row0(i) + row_of(2 * (j & 1)), n + (j >> 1)) + 2 * column_of(0), a[i][j]);
        }
    }
};

}  // namespace prefixattn::cuda
