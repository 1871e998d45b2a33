// What a warp does together: shuffles, ldmatrix and mma, by the fragment layouts of the PTX manual.
#pragma once
#include "cuda/host/half.h"
#include "cuda/host/schedule.h"
#include "cuda/host/shared.h"

namespace prefixattn::host {

// Of lane `l`, where its part of a fragment lies. 8 x 8 matrix of ldmatrix: row l / 4, columns 2 (l % 4) and the next.
// mma: a[0..3] are the quarters (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15) of A [16 x 16], b[0..1]
// the halves (rows 0-7), (8-15) of B [16 x 8], c[0..1] and c[2..3] rows 0-7 and 8-15 of C [16 x 8].
constexpr int fragment_row(int l) { return l / 4; }
constexpr int fragment_column(int l) { return l % 4 * 2; }

struct ShuffleOperands {
    uint32_t value;
    int from;
    uint32_t result;
};
inline void perform_shuffle(Warp &w) {
    ++the.counts.shuffles;
    uint32_t values[kLanes];
    for (int l = 0; l < kLanes; ++l) values[l] = static_cast<ShuffleOperands *>(w.lanes[l].operands)->value;
    for (Lane &l : w.lanes) {
        auto &o = *static_cast<ShuffleOperands *>(l.operands);
        if (o.from < 0 || o.from >= kLanes) fail(l.here, l.thread, format("shuffles from lane %d", o.from));
        o.result = values[o.from];
    }
}
inline uint32_t shuffle_from(uint32_t value, int from, Here here) {
    ShuffleOperands operands{value, from, 0};
    meet(Op::kShuffle, here, &operands, perform_shuffle);
    return operands.result;
}

inline void perform_any(Warp &w) {
    ++the.counts.shuffles;
    bool any = false;
    for (const Lane &l : w.lanes) any |= *static_cast<const bool *>(l.operands);
    for (const Lane &l : w.lanes) *static_cast<bool *>(l.operands) = any;
}

struct LdmatrixOperands {
    uint32_t row;
    int matrices;
    bool transposed;
    uint32_t *r;
};
// Passes of the hardware beyond one: eight rows of 16 bytes are read at once if they lie in different banks.
inline int conflicts_of(const uint32_t (&at)[8]) {
    int passes = 1;
    for (int i = 0; i < 8; ++i) {
        int same_bank = 1;
        for (int j = 0; j < i; ++j) same_bank += at[j] != at[i] && (at[j] / 16 - at[i] / 16) % 8 == 0;
        passes = same_bank > passes ? same_bank : passes;
    }
    return passes - 1;
}
inline void perform_ldmatrix(Warp &w) {
    const auto &first = *static_cast<LdmatrixOperands *>(w.lanes[0].operands);
    the.counts.ldmatrix += first.matrices;
    for (int m = 0; m < first.matrices; ++m) {
        uint16_t x[8][8];
        uint32_t at[8];
        for (int i = 0; i < 8; ++i) {
            const Lane &giver = w.lanes[8 * m + i];
            at[i] = static_cast<LdmatrixOperands *>(giver.operands)->row;
            std::memcpy(x[i], shared.read(at[i], 16, giver, giver.here, true), 16);
        }
        the.counts.ldmatrix_conflicts += conflicts_of(at);
        for (int l = 0; l < kLanes; ++l) {
            const int i = fragment_row(l), j = fragment_column(l);
            const uint16_t low = first.transposed ? x[j][i] : x[i][j];
            const uint16_t high = first.transposed ? x[j + 1][i] : x[i][j + 1];
            static_cast<LdmatrixOperands *>(w.lanes[l].operands)->r[m] = (uint32_t)low | (uint32_t)high << 16;
        }
    }
}

struct MmaOperands {
    float *c;
    const uint32_t *a, *b;
};
// Products are exact in float32 and are added to C one after the other in the order of k, each sum rounded to the
// nearest. A GPU adds several at once and cuts digits off; its errors are of the same size.
template <float (*to_float)(uint16_t)>
void perform_mma(Warp &w) {
    ++the.counts.mma;
    uint16_t a_bits[16 * 16], b_bits[16 * 8];  // [row][k], [k][column]
    float a[16 * 16], b[16 * 8], c[16][8];
    for (int l = 0; l < kLanes; ++l) {
        const auto &o = *static_cast<MmaOperands *>(w.lanes[l].operands);
        const int i = fragment_row(l), j = fragment_column(l);
        for (int half = 0; half < 2; ++half)
            for (int next = 0; next < 2; ++next) {
                const int shift = 16 * next;
                const int k = j + 8 * half + next;
                a_bits[16 * i + k] = (uint16_t)(o.a[2 * half] >> shift);
                a_bits[16 * (i + 8) + k] = (uint16_t)(o.a[2 * half + 1] >> shift);
                b_bits[8 * k + i] = (uint16_t)(o.b[half] >> shift);
                c[i + 8 * half][j + next] = o.c[2 * half + next];
            }
    }
    for (int i = 0; i < 16 * 16; ++i) a[i] = to_float(a_bits[i]);
    for (int i = 0; i < 16 * 8; ++i) b[i] = to_float(b_bits[i]);
    for (int rows = 0; rows < 16; rows += 4)
        for (int k = 0; k < 16; ++k)
            for (int i = rows; i < rows + 4; ++i)
                for (int j = 0; j < 8; ++j) c[i][j] += a[16 * i + k] * b[8 * k + j];
    for (int l = 0; l < kLanes; ++l) {
        const auto &o = *static_cast<MmaOperands *>(w.lanes[l].operands);
        const int i = fragment_row(l), j = fragment_column(l);
        for (int half = 0; half < 2; ++half)
            for (int next = 0; next < 2; ++next) o.c[2 * half + next] = c[i + 8 * half][j + next];
    }
}

}  // namespace prefixattn::host
