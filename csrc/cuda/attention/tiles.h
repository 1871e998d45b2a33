// Tiles of 16-bit elements in shared memory, and how their fragments lie over the lanes of a warp.
//
// Of mma m16n8k16 a lane is a group (its row) and a place in its quad (its two columns). The maps are the functions
// below and stand nowhere else.
#pragma once
#include "api/semantics.h"
#include "cuda/hw/hw.h"

namespace prefixattn::cuda {

constexpr int kPiece = 8;  // elements of 16 bytes, what an asynchronous copy moves
constexpr int kPieceBytes = 16;
constexpr int kStep = 16;    // rows of A, and what a product sums over
constexpr int kColumns = 8;  // columns of an accumulator

PA_DEVICE int group() { return hw::lane() >> 2; }
PA_DEVICE int place() { return hw::lane() & 3; }

// Element i of an accumulator [16][8].
PA_DEVICE int row_of(int i) { return group() + (i >> 1) * 8; }
PA_DEVICE int column_of(int i) { return 2 * place() + (i & 1); }

// Rows of kWidth elements. Piece c of row r lies at place c ^ (r & 7), so that the eight rows of a matrix that
// ldmatrix reads lie in different banks.
template <int kWidth>
struct Tile {
    static_assert(kWidth % 64 == 0, "the swizzle permutes eight pieces");
    static constexpr int kPieces = kWidth / kPiece;
    static constexpr int kRowBytes = kWidth * 2;
    hw::Shared at;

    PA_HOST_DEVICE static constexpr int bytes(int rows) { return rows * kRowBytes; }
    PA_DEVICE hw::Shared piece(int row, int piece) const {
        return at + (row * kRowBytes + ((piece ^ (row & 7)) * kPieceBytes));
    }
    // the address of element (row, column); what is read or written there must stay within its piece
    PA_DEVICE hw::Shared element(int row, int column) const {
        return piece(row, column / kPiece) + (column % kPiece) * 2;
    }
};

// The row and the piece whose address a lane gives to ldmatrix<4>, of a block of 16 rows and two pieces. The four
// matrices come down the rows first, or along them first: as the operand has its registers, which are not moved then.
PA_DEVICE int down_row() { return hw::lane() & 15; }
PA_DEVICE int down_piece() { return hw::lane() >> 4; }
PA_DEVICE int along_row() { return (hw::lane() & 7) + (hw::lane() >> 4) * 8; }
PA_DEVICE int along_piece() { return hw::lane() >> 3 & 1; }

// In the block from (row, column) on, row a multiple of 8: what a lane's place in it makes of the address is apart from
// where it begins, which is a constant of the instruction.
template <int W>
PA_DEVICE hw::Shared down(const Tile<W> &tile, int row, int column) {
    return tile.piece(down_row(), column / kPiece + down_piece()) + row * Tile<W>::kRowBytes;
}
template <int W>
PA_DEVICE hw::Shared along(const Tile<W> &tile, int row, int column) {
    return tile.piece(along_row(), column / kPiece + along_piece()) + row * Tile<W>::kRowBytes;
}

// A [16][16] = tile[row .. row + 16][column .. column + 16].
template <int W>
PA_DEVICE void load_a(uint32_t (&a)[4], const Tile<W> &tile, int row, int column) {
    hw::ldmatrix(a, down(tile, row, column));
}

// B [16][8] twice, side by side.
struct TwoB {
    uint32_t first[2], second[2];
};
// B[k][n] = tile[row + n][column + k], n < 16: for the product with a transpose, where the tile has a row for each
// column of the result.
template <int W>
PA_DEVICE TwoB load_b(const Tile<W> &tile, int row, int column) {
    uint32_t m[4];
    hw::ldmatrix(m, along(tile, row, column));
    return {{m[0], m[1]}, {m[2], m[3]}};
}
// B[k][n] = tile[row + k][column + n], n < 16.
template <int W>
PA_DEVICE TwoB load_b_transposed(const Tile<W> &tile, int row, int column) {
    uint32_t m[4];
    hw::ldmatrix_trans(m, down(tile, row, column));
    return {{m[0], m[1]}, {m[2], m[3]}};
}

// first += A * B.first, second += A * B.second
template <class E>
PA_DEVICE void multiply(float (&first)[4], float (&second)[4], const uint32_t (&a)[4], const TwoB &b) {
    hw::mma<E>(first, a, b.first);
    hw::mma<E>(second, a, b.second);
}

// Two accumulators side by side as an A [16][16], rounded to E.
template <class E>
PA_DEVICE void as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = hw::pack<E>(left[0], left[1]);
    a[1] = hw::pack<E>(left[2], left[3]);
    a[2] = hw::pack<E>(right[0], right[1]);
    a[3] = hw::pack<E>(right[2], right[3]);
}

PA_DEVICE void clear(float (&x)[4]) { x[0] = x[1] = x[2] = x[3] = 0.f; }

// Over the four lanes that share a row.
PA_DEVICE float quad_max(float x) {
    x = hw::max(x, hw::shuffle_xor(x, 1));
    return hw::max(x, hw::shuffle_xor(x, 2));
}
PA_DEVICE float quad_sum(float x) {
    x += hw::shuffle_xor(x, 1);
    return x + hw::shuffle_xor(x, 2);
}

// Lane c of a quad has words 0 .. 3 of a thing c, and then has word c of the things 0 .. 3. It is its own inverse: what
// lies in memory in pieces of 16 bytes, a lane each, becomes fragments, and back.
PA_DEVICE void quad_transpose(uint32_t (&x)[4]) {
    const bool odd = place() & 1, upper = place() & 2;
    PA_UNROLL
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = hw::shuffle_xor(odd ? x[i] : x[i + 1], 1);
        x[i] = odd ? got : x[i];
        x[i + 1] = odd ? x[i + 1] : got;
    }
    PA_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = hw::shuffle_xor(upper ? x[i] : x[i + 2], 2);
        x[i] = upper ? got : x[i];
        x[i + 2] = upper ? x[i + 2] : got;
    }
}

// 16 rows of D elements of a tensor, read or written once, in pieces of 16 bytes: rows row_of(0) and row_of(2) of a
// lane, pieces place() + 4 i.
template <int D>
struct RowPieces {
    static constexpr int kPieces = D / kPiece / 4;  // of a lane, in a row
    hw::Words4 x[2][kPieces];
};

// Row i of a tensor. A stride has 32 bits, so that an address is one multiplication.
template <class E>
PA_DEVICE E *row_at(E *base, int i, int64_t stride) {
    return base + (int64_t)i * (int)stride;
}

// Rows from `rows` on are zeros.
template <int D, class E>
PA_DEVICE RowPieces<D> load_rows(const E *from, int64_t stride, int rows) {
    RowPieces<D> r;
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = row_of(2 * half);
        PA_UNROLL
        for (int i = 0; i < RowPieces<D>::kPieces; ++i) {
            r.x[half][i] = {};
            if (row < rows)
                r.x[half][i] = hw::load_global((const hw::Words4 *)row_at(from, row, stride) + place() + 4 * i);
        }
    }
    return r;
}

// Into rows of a tile, as they are.
template <int D>
PA_DEVICE void store_pieces(const Tile<D> &tile, int row, const RowPieces<D> &r) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        PA_UNROLL
        for (int i = 0; i < RowPieces<D>::kPieces; ++i)
            hw::store_shared(tile.piece(row + row_of(2 * half), place() + 4 * i), r.x[half][i]);
    }
}

// As A [16][16] for each 16 of the D columns.
template <int D>
PA_DEVICE void rows_as_a(uint32_t (&a)[D / kStep][4], RowPieces<D> &r) {
    PA_UNROLL
    for (int i = 0; i < RowPieces<D>::kPieces; ++i) {
        quad_transpose(r.x[0][i].x);
        quad_transpose(r.x[1][i].x);
        PA_UNROLL
        for (int half = 0; half < 2; ++half) {  // of a piece of four: columns 32 i + 16 half
            a[2 * i + half][0] = r.x[0][i].x[2 * half];
            a[2 * i + half][1] = r.x[1][i].x[2 * half];
            a[2 * i + half][2] = r.x[0][i].x[2 * half + 1];
            a[2 * i + half][3] = r.x[1][i].x[2 * half + 1];
        }
    }
}

// Accumulators [16][D], each row times its factor, rounded to E.
template <class E, int D>
PA_DEVICE void store_rows(E *to, int64_t stride, int rows, const float (&c)[D / kColumns][4],
                          const float (&factor)[2]) {
    PA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = row_of(2 * half);
        PA_UNROLL
        for (int i = 0; i < RowPieces<D>::kPieces; ++i) {
            hw::Words4 words;
            PA_UNROLL
            for (int j = 0; j < 4; ++j)
                words.x[j] =
                    hw::pack<E>(c[4 * i + j][2 * half] * factor[half], c[4 * i + j][2 * half + 1] * factor[half]);
            quad_transpose(words.x);
            if (row < rows) hw::store_global((hw::Words4 *)row_at(to, row, stride) + place() + 4 * i, words);
        }
    }
}

}  // namespace prefixattn::cuda
