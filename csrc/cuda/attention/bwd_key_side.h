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

constexpr int kNever = 0x7fffffff;  // the column of a key that padding hides: no query sees as far

// Sums of kTiles tiles of a warp. A unit is kUnit queries.
template <class E, int D, int kTiles, int kUnit>
struct KeySide {
    static constexpr int kBlocks = kUnit / kColumns;
    using Sums = float[kTiles][D / kColumns][4];
    using Unit = float[kTiles][kBlocks][4];

    Sums dk, dv;
    int column[kTiles][2];  // of rows row_of(0) and row_of(2)
    int first, stride;      // the warp's tiles are first + i * stride

    PA_DEVICE KeySide(int first_tile, int tile_stride) : first(first_tile), stride(tile_stride) {
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) clear_tile(i, 0);
    }

    PA_DEVICE int row0(int i) const { return (first + i * stride) * kStep; }  // of tile i

    // Rows from `kept` on become 0.
    PA_DEVICE void clear_tile(int i, int kept) {
        PA_UNROLL
        for (int j = 0; j < D / kColumns; ++j) PA_UNROLL
        for (int c = 0; c < 4; ++c)
            if (row0(i) + row_of(c) >= kept) dk[i][j][c] = dv[i][j][c] = 0.f;
    }

    // Which keys padding hides. The column after the prefix is own key s0.
    PA_DEVICE void place(const BwdLaunch &p, const Axis &axis, int b, int h, int s0) {
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int at = row0(i) + row_of(2 * half);
            column[i][half] = padding_bias<E>(p, b, h, at - axis.prefix + s0) == kMinusInf ? kNever : at;
        }
    }

    // No key is padded.
    PA_DEVICE void place_all() {
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) PA_UNROLL
        for (int half = 0; half < 2; ++half) column[i][half] = row0(i) + row_of(2 * half);
    }

    // c[tile] += rows * queries^T. Queries from kColumns * blocks on, and tiles from `tiles` on, are left out.
    PA_DEVICE void multiply_transposed(Unit &c, const Tile<D> &rows, const Tile<D> &queries, int query, int blocks,
                                       int tiles) const {
        PA_UNROLL
        for (int k = 0; k < D; k += kStep) {
            uint32_t a[kTiles][4];
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                if (i < tiles) load_a(a[i], rows, row0(i), k);
            PA_UNROLL
            for (int n = 0; n < kBlocks; n += 2) {
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

    // sums[tile] += c[tile] * rows, for the tiles that are wanted.
    PA_DEVICE static void multiply_rows(Sums &sums, const Unit &c, const Tile<D> &rows, int query, int blocks,
                                        const bool (&wanted)[kTiles]) {
        PA_UNROLL
        for (int k = 0; k < kBlocks; k += 2) {
            if (k >= blocks) continue;
            uint32_t a[kTiles][4];
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i) as_a<E>(a[i], c[i][k], c[i][k + 1]);
            PA_UNROLL
            for (int n = 0; n < D / kColumns; n += 2) {
                const TwoB b = load_b_transposed(rows, query + k * kColumns, n * kColumns);
                PA_UNROLL
                for (int i = 0; i < kTiles; ++i)
                    if (wanted[i]) multiply<E>(sums[i][n], sums[i][n + 1], a[i], b);
            }
        }
    }

    // Times prefix dropout's gain, where the key is of the prefix.
    PA_DEVICE void gain_prefix(Unit &c, const Axis &axis, float gain) const {
        if (gain == 1.f) return;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float factor = row0(i) + row_of(2 * half) < axis.prefix ? gain : 1.f;
            PA_UNROLL
            for (int j = 0; j < kBlocks; ++j) c[i][j][2 * half] *= factor, c[i][j][2 * half + 1] *= factor;
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
        Unit s = {}, w = {};
        multiply_transposed(s, k, stage.q(i_stage), query, blocks, tiles);
        gain_prefix(s, axis, p.drops.gain);
        float factor = p.scale * kLog2e;
        if (has_float_mask(p)) {
            factor = kLog2e;
            add_bias(s, p, axis, b, h, s0);
        }
        bool any_dk = wants_ds;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) any_dk |= wants_dk[i];
        if (any_dk) {
            multiply_transposed(w, v, stage.dout(i_stage), query, blocks, tiles);
            gain_prefix(w, axis, p.drops.gain);
        }
        PA_UNROLL
        for (int j = 0; j < kBlocks; ++j) {
            const int at = 4 * (query + j * kColumns + column_of(0));
            const auto lse = hw::load_shared<hw::Floats2>(stage.side(i_stage, 0) + at);
            const auto delta = hw::load_shared<hw::Floats2>(stage.side(i_stage, 1) + at);
            const auto hidden = hw::load_shared<hw::Words2>(stage.side(i_stage, 2) + at);
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i) PA_UNROLL
            for (int c = 0; c < 4; ++c) {
                const bool seen = column[i][c >> 1] < (int)hidden.x[c & 1];
                const float power = s[i][j][c] * factor - lse.x[c & 1];
                const float weight = seen ? hw::exp2(power > 0.f ? 0.f : power) : 0.f;  // a nan stays
                // a hidden key's value may be a nan
                w[i][j][c] = seen ? weight * (w[i][j][c] - delta.x[c & 1]) : 0.f;
                s[i][j][c] = weight;
            }
        }
        gain_prefix(s, axis, p.drops.gain);
        gain_prefix(w, axis, p.drops.gain);
        multiply_rows(dv, s, stage.dout(i_stage), query, blocks, wants_dv);
        if (wants_ds) {
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i) store_ds(ds, w[i], row0(i), i < tiles);
        }
        multiply_rows(dk, w, stage.q(i_stage), query, blocks, wants_dk);
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

    PA_DEVICE static void store_ds(const DsTile &ds, const float (&w)[kBlocks][4], int row, bool there) {
        if (!there) return;
        PA_UNROLL
        for (int j = 0; j < kBlocks; ++j) PA_UNROLL
        for (int half = 0; half < 2; ++half)
            hw::store_shared(ds.piece(row + row_of(2 * half), j) + 2 * column_of(0),
                             hw::pack<E>(w[j][2 * half], w[j][2 * half + 1]));
    }
};

}  // namespace prefixattn::cuda
