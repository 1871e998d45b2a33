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

// A [16][16], A[m][k] = tile[row + k][column + m].
PA_DEVICE void load_a_transposed(uint32_t (&a)[4], const DsTile &tile, int row, int column) {
    hw::ldmatrix_trans(a, tile.piece(row + along_row(), column / kPiece + along_piece()));
}

// Addresses for ldmatrix<4> in a Tile<D>: a lane's part, and the rest, in which rows are multiples of 8 and pieces are
// even, so that the swizzle is one XOR. Going down the rows first (A; B transposed) or along the row first (B), so that
// registers come in the order in which mma takes them.
template <int D>
struct Lanes {
    uint32_t down, along;

    PA_DEVICE Lanes() : down(part(hw::lane() & 15, hw::lane() >> 4)), along(part(along_row(), along_piece())) {}
    PA_DEVICE static uint32_t part(int row, int piece) {
        return (uint32_t)(row * Tile<D>::kRowBytes + (piece ^ (row & 7)) * kPieceBytes);
    }
    PA_DEVICE static hw::Shared address(const Tile<D> &tile, uint32_t lane, int row, int column) {
        return {tile.at.at + (lane ^ (uint32_t)(column / kPiece * kPieceBytes)) + (uint32_t)(row * Tile<D>::kRowBytes)};
    }
    PA_DEVICE void load_a(uint32_t (&a)[4], const Tile<D> &tile, int row, int column) const {
        hw::ldmatrix(a, address(tile, down, row, column));
    }
    PA_DEVICE TwoB load_b(const Tile<D> &tile, int row, int column) const {
        uint32_t b[4];
        hw::ldmatrix(b, address(tile, along, row, column));
        return {{b[0], b[1]}, {b[2], b[3]}};
    }
    PA_DEVICE TwoB load_b_transposed(const Tile<D> &tile, int row, int column) const {
        uint32_t b[4];
        hw::ldmatrix_trans(b, address(tile, down, row, column));
        return {{b[0], b[1]}, {b[2], b[3]}};
    }
};

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
    static constexpr int kMostTiles = kTiles;
    static constexpr int kBlocks = kUnit / kColumns;
    using Sums = float[kTiles][D / kColumns][4];
    using Unit = float[kTiles][kBlocks][4];

    Sums dk, dv;
    uint32_t padded;    // bit 2 i + half: padding hides the key of that row of tile i
    int first, stride;  // the warp's tiles are first + i * stride

    PA_DEVICE KeySide(int first_tile, int tile_stride) : padded(0), first(uniform(first_tile)), stride(tile_stride) {
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
        padded = 0;
        if (p.mask_kind == MaskKind::kNone) return;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) PA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int own = row0(i) + row_of(2 * half) - axis.prefix + s0;
            padded |= (uint32_t)(padding_bias<E>(p, b, h, own) == kMinusInf) << (2 * i + half);
        }
    }

    // Which of a unit's products are made: those of `tiles` tiles and `blocks` blocks of queries. kFull: of all
    // queries, and both gradients of each tile, which the compiler then knows.
    template <int kLive, bool kFull>
    struct Part {
        int tiles, blocks;
        bool dk[kTiles], dv[kTiles], ds;

        PA_DEVICE bool tile(int i) const { return kFull ? i < kLive : i < tiles; }
        PA_DEVICE bool block(int n) const { return kFull || n < blocks; }
        PA_DEVICE bool adds_dk(int i) const { return kFull ? i < kLive : dk[i]; }
        PA_DEVICE bool adds_dv(int i) const { return kFull ? i < kLive : dv[i]; }
    };

    // c[tile] += rows * queries^T, from block `first` of the part on.
    template <int n_blocks, class Made>
    PA_DEVICE void multiply_transposed(float (&c)[kTiles][n_blocks][4], const Tile<D> &rows, const Tile<D> &queries,
                                       int query, int first_block, const Made &part) const {
        const Lanes<D> lanes;
        PA_UNROLL
        for (int k = 0; k < D; k += kStep) {
            uint32_t a[kTiles][4];
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                if (part.tile(i)) lanes.load_a(a[i], rows, row0(i), k);
            PA_UNROLL
            for (int n = 0; n < n_blocks; n += 2) {
                if (!part.block(first_block + n)) continue;
                const TwoB b = lanes.load_b(queries, query + n * kColumns, k);
                PA_UNROLL
                for (int i = 0; i < kTiles; ++i) {
                    if (!part.tile(i)) continue;
                    hw::mma<E>(c[i][n], a[i], b.first);
                    if (part.block(first_block + n + 1)) hw::mma<E>(c[i][n + 1], a[i], b.second);
                }
            }
        }
    }

    // sums[tile] += a[tile] * 16 rows.
    template <class Wanted>
    PA_DEVICE static void multiply_rows(Sums &sums, const uint32_t (&a)[kTiles][4], const Tile<D> &rows, int query,
                                        const Wanted &wanted) {
        const Lanes<D> lanes;
        PA_UNROLL
        for (int n = 0; n < D / kColumns; n += 2) {
            const TwoB b = lanes.load_b_transposed(rows, query, n * kColumns);
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                if (wanted(i)) multiply<E>(sums[i][n], sums[i][n + 1], a[i], b);
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
        const int end = axis.seen(l0 + inside - 1);
        Part<kTiles, false> part{0, (inside + kColumns - 1) / kColumns, {}, {}, wants_ds};
        bool any = wants_ds, all = part.blocks == kBlocks;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            const bool there = row0(i)<end, prefix = row0(i) < axis.prefix, own = row0(i) + kStep> axis.prefix;
            part.tiles += there;
            part.dk[i] = there && ((prefix && p.dprefix_k.data) || (own && p.dk.data));
            part.dv[i] = there && ((prefix && p.dprefix_v.data) || (own && p.dv.data));
            any = any || part.dk[i] || part.dv[i];
            all = all && part.dk[i] == there && part.dv[i] == there;
        }
        if (part.tiles == 0 || !any) return;
        const auto go = [&](const auto &made) { products(made, p, axis, b, h, s0, k, v, stage, i_stage, query, ds); };
        if (all && part.tiles == kTiles) return go(Part<kTiles, true>{kTiles, kBlocks, {}, {}, wants_ds});
        if constexpr (kTiles > 1)
            if (all && part.tiles == 1) return go(Part<1, true>{1, kBlocks, {}, {}, wants_ds});
        go(part);
    }

    template <class Made, class StageOf>
    PA_DEVICE void products(const Made &part, const BwdLaunch &p, const Axis &axis, int b, int h, int s0,
                            const Tile<D> &k, const Tile<D> &v, const StageOf &stage, int i_stage, int query,
                            const DsTile &ds) {
        Unit s = {};
        multiply_transposed(s, k, stage.q(i_stage), query, 0, part);
        gain_prefix(s, axis, p.drops.gain);
        float factor = p.scale * kLog2e;
        if (has_float_mask(p)) {
            factor = kLog2e;
            add_bias(s, p, axis, b, h, s0);
        }
        weigh(s, stage.side(i_stage, 0), stage.side(i_stage, 2), query, factor, part);
        gain_prefix(s, axis, p.drops.gain);
        PA_UNROLL
        for (int n = 0; n < kBlocks; n += 2) {
            if (!part.block(n)) continue;
            uint32_t a[kTiles][4];
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                if (part.tile(i)) as_a<E>(a[i], s[i][n], s[i][n + 1]);
            multiply_rows(dv, a, stage.dout(i_stage), query + n * kColumns, [&](int i) { return part.adds_dv(i); });
        }
        bool any_dk = part.ds;
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) any_dk = any_dk || part.adds_dk(i);
        if (!any_dk) return;
        // 16 queries at a time: registers
        PA_UNROLL
        for (int n = 0; n < kBlocks; n += 2) {
            if (!part.block(n)) continue;
            float w[kTiles][2][4] = {};
            multiply_transposed(w, v, stage.dout(i_stage), query + n * kColumns, n, part);
            gain_prefix(w, axis, p.drops.gain);
            differentiate(w, s, n, stage.side(i_stage, 1), query, part);
            uint32_t a[kTiles][4];
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i)
                if (part.tile(i)) as_a<E>(a[i], w[i][0], w[i][1]);
            if (part.ds) {
                PA_UNROLL
                for (int i = 0; i < kTiles; ++i)
                    if (part.tile(i)) store_ds(ds, a[i], row0(i), n);
            }
            multiply_rows(dk, a, stage.q(i_stage), query + n * kColumns, [&](int i) { return part.adds_dk(i); });
        }
    }

    // Scores become weights, 0 where a key is hidden.
    template <class Made>
    PA_DEVICE void weigh(Unit &s, hw::Shared side_lse, hw::Shared side_hidden, int query, float factor,
                         const Made &part) const {
        int column[kTiles][2];
        PA_UNROLL
        for (int i = 0; i < kTiles; ++i) PA_UNROLL
        for (int half = 0; half < 2; ++half)
            column[i][half] = padded >> (2 * i + half) & 1 ? kNever : row0(i) + row_of(2 * half);
        PA_UNROLL
        for (int j = 0; j < kBlocks; ++j) {
            const int at = 4 * (query + j * kColumns + column_of(0));
            const auto lse = hw::load_shared<hw::Floats2>(side_lse + at);
            const auto hidden = hw::load_shared<hw::Words2>(side_hidden + at);
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                if (!part.tile(i)) continue;
                PA_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const float power = s[i][j][c] * factor - lse.x[c & 1];
                    const float weight = hw::exp2(power > 0.f ? 0.f : power);  // a nan stays
                    s[i][j][c] = column[i][c >> 1] < (int)hidden.x[c & 1] ? weight : 0.f;
                }
            }
        }
    }

    // w, the products of dout and values, becomes dS, of blocks n and n + 1. A hidden key's value may be a nan.
    template <class Made>
    PA_DEVICE void differentiate(float (&w)[kTiles][2][4], const Unit &s, int n, hw::Shared side_delta, int query,
                                 const Made &part) const {
        PA_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int at = 4 * (query + (n + j) * kColumns + column_of(0));
            const auto delta = hw::load_shared<hw::Floats2>(side_delta + at);
            PA_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                if (!part.tile(i)) continue;
                PA_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const float weight = s[i][n + j][c];
                    w[i][j][c] = weight != 0.f ? weight * (w[i][j][c] - delta.x[c & 1]) : 0.f;
                }
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

    // Blocks n and n + 1 of a tile's dS, packed as a left operand.
    PA_DEVICE static void store_ds(const DsTile &ds, const uint32_t (&a)[4], int row, int n) {
        PA_UNROLL
        for (int j = 0; j < 4; ++j)
            hw::store_shared(ds.piece(row + row_of(2 * (j & 1)), n + (j >> 1)) + 2 * column_of(0), a[j]);
    }
};

}  // namespace prefixattn::cuda
