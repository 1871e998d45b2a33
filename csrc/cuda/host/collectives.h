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
using Four = float __attribute__((vector_size(16)));
inline void multiply(const float (&a)[16 * 16], const Four (&b)[16][2], Four (&c)[16][2]) {
    for (int i = 0; i < 16; i += 2) {
        Four c00 = c[i][0], c01 = c[i][1], c10 = c[i + 1][0], c11 = c[i + 1][1];
        for (int k = 0; k < 16; ++k) {
            c00 += a[16 * i + k] * b[k][0];
            c01 += a[16 * i + k] * b[k][1];
            c10 += a[16 * i + 16 + k] * b[k][0];
            c11 += a[16 * i + 16 + k] * b[k][1];
        }
        c[i][0] = c00, c[i][1] = c01, c[i + 1][0] = c10, c[i + 1][1] = c11;
    }
}
template <float (*to_float)(uint16_t)>
void perform_mma(Warp &w) {
    ++the.counts.mma;
    uint32_t a_pairs[16][8];                   // [row][k / 2]
    uint16_t a_bits[16 * 16], b_bits[16 * 8];  // [row][k], [k][column]
    float a[16 * 16], b[16 * 8];
    Four b_rows[16][2], c_rows[16][2];
    float (*c)[8] = reinterpret_cast<float (*)[8]>(c_rows);
    for (int l = 0; l < kLanes; ++l) {
        const auto &o = *static_cast<MmaOperands *>(w.lanes[l].operands);
        const int i = fragment_row(l), j = fragment_column(l);
        for (int half = 0; half < 2; ++half) {
            a_pairs[i][j / 2 + 4 * half] = o.a[2 * half];
            a_pairs[i + 8][j / 2 + 4 * half] = o.a[2 * half + 1];
            b_bits[8 * (j + 8 * half) + i] = (uint16_t)o.b[half];
            b_bits[8 * (j + 8 * half + 1) + i] = (uint16_t)(o.b[half] >> 16);
            std::memcpy(&c[i + 8 * half][j], o.c + 2 * half, 8);
        }
    }
    std::memcpy(a_bits, a_pairs, sizeof a_bits);
    for (int i = 0; i < 16 * 16; ++i) a[i] = to_float(a_bits[i]);
    for (int i = 0; i < 16 * 8; ++i) b[i] = to_float(b_bits[i]);
    std::memcpy(b_rows, b, sizeof b);
    multiply(a, b_rows, c_rows);
    for (int l = 0; l < kLanes; ++l) {
        const auto &o = *static_cast<MmaOperands *>(w.lanes[l].operands);
        const int i = fragment_row(l), j = fragment_column(l);
        for (int half = 0; half < 2; ++half) std::memcpy(o.c + 2 * half, &c[i + 8 * half][j], 8);
    }
}

}  // namespace prefixattn::host
