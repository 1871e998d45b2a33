// What a step of queries brings into shared memory: their rows of q, dout and out, and three numbers each. There are
// two stages, so that one is filled while the other is worked on.
#pragma once
#include "cuda/attention/bwd_plan.h"
#include "cuda/attention/keys.h"

namespace prefixattn::cuda {

// The same number on every lane, as the compiler then knows; and it computes anew what it would otherwise keep in a
// register.
PA_DEVICE int uniform(int x) { return (int)hw::shuffle((uint32_t)x, 0); }

// Where a block is in its queries: sample, member of the key head's group, step.
struct Cursor {
    int b, member, step;

    // The compiler knows nothing of it from here on.
    PA_DEVICE void hide() { b = uniform(b), member = uniform(member), step = uniform(step); }
    PA_DEVICE Cursor after(int members, int steps, int first_step) const {
        if (step + 1 < steps) return {b, member, step + 1};
        if (member + 1 < members) return {b, member + 1, first_step};
        return {b + 1, 0, first_step};
    }
};

template <class E>
PA_DEVICE const E *tensor_row(const Strided &t, int b, int h, int row) {
    return (const E *)t.data + b * t.stride0 + h * t.stride1 + row * t.stride2;
}

// A column of the virtual axis.
template <class E>
PA_DEVICE const E *key_row(const KeyRows<E> &keys, const Axis &axis, int column) {
    return column < axis.prefix ? keys.prefix + column * keys.stride_prefix
                                : keys.own + (column - axis.prefix) * keys.stride_own;
}

// kMakesDelta: delta comes from out and dout, and not from memory. A thread sees its own copies without a barrier, so
// it makes delta of what it copied.
template <class E, int D, int kQueries, int kThreads, bool kMakesDelta>
struct Stage {
    static constexpr int kTile = Tile<D>::bytes(kQueries), kSide = 4 * kQueries;
    static constexpr int kTensors = kMakesDelta ? 3 : 2;
    static constexpr int kOne = kTensors * kTile, kBytes = 2 * (kOne + 3 * kSide);
    static constexpr int kThreadsARow = kThreads / kQueries, kPiecesAThread = D / kPiece / kThreadsARow;
    static_assert(kThreads % kQueries == 0 && kThreadsARow <= hw::kWarp && kPiecesAThread >= 1, "a row has threads");

    hw::Shared at;

    PA_DEVICE explicit Stage(hw::Shared begin) : at(begin) {}

    PA_DEVICE Tile<D> q(int i) const { return {at + i * kOne}; }
    PA_DEVICE Tile<D> dout(int i) const { return {at + (i * kOne + kTile)}; }
    PA_DEVICE Tile<D> out(int i) const { return {at + (i * kOne + 2 * kTile)}; }
    // lse in powers of two, delta, and the first column that the query does not see: [kQueries] each
    PA_DEVICE hw::Shared side(int i, int which) const { return at + (2 * kOne + (3 * i + which) * kSide); }

    struct Mine {  // of a thread
        int row, piece;
        PA_DEVICE Mine() {
            const int thread = hw::opaque(hw::thread());
            row = thread / kThreadsARow;
            piece = thread % kThreadsARow;  // the first, of every kThreadsARow-th
        }
    };

    // Of [B, H, L]: delta, or what is taken from it, which may be null.
    PA_DEVICE static const float *given(const BwdLaunch &p) { return kMakesDelta ? p.dlse : p.delta; }

    // Asks for a step's rows, and for lse and what is given where their numbers will be: in registers they would be
    // kept while the step before is worked on, which needs all there are. A barrier since stage i was read, and the
    // commit, are the caller's.
    PA_DEVICE void ask(const BwdLaunch &p, int i, int b, int h, int l0, bool queries) const {
        const Mine mine;
        const int l = l0 + mine.row;
        const bool inside = l < (int)p.L;
        const int from = inside ? l : 0;
        const E *q_row = tensor_row<E>(p.q, b, h, from), *dout_row = tensor_row<E>(p.dout, b, h, from);
        PA_UNROLL
        for (int j = 0; j < kPiecesAThread; ++j) {
            const int piece = mine.piece + j * kThreadsARow;
            if (queries) hw::copy_async16(q(i).piece(mine.row, piece), q_row + piece * kPiece, inside);
            hw::copy_async16(dout(i).piece(mine.row, piece), dout_row + piece * kPiece, inside);
        }
        if constexpr (kMakesDelta) {
            const E *out_row = tensor_row<E>(p.out, b, h, from);
            PA_UNROLL
            for (int j = 0; j < kPiecesAThread; ++j) {
                const int piece = mine.piece + j * kThreadsARow;
                hw::copy_async16(out(i).piece(mine.row, piece), out_row + piece * kPiece, inside);
            }
        }
        if (mine.piece != 0) return;
        const int64_t at_row = ((int64_t)b * p.H + h) * p.L + from;
        hw::copy_async4(side(i, 0) + 4 * mine.row, (const float *)p.lse + at_row, inside);
        if (const float *rows = given(p)) hw::copy_async4(side(i, 1) + 4 * mine.row, rows + at_row, inside);
    }

    // Of what this thread asked for last, and has waited for. A query without a key sees none: its weights are 0.
    PA_DEVICE void prepare(const BwdLaunch &p, int i, const Axis &axis, int b, int h, int l0, bool writes_delta) const {
        const Mine mine;
        float delta = 0.f;
        if (mine.piece == 0 && given(p)) delta = hw::load_shared<float>(side(i, 1) + 4 * mine.row);
        if constexpr (kMakesDelta) {
            float sum = 0.f;
            PA_UNROLL
            for (int j = 0; j < kPiecesAThread; ++j) {
                const int piece = mine.piece + j * kThreadsARow;
                const auto o = hw::load_shared<hw::Words4>(out(i).piece(mine.row, piece));
                const auto g = hw::load_shared<hw::Words4>(dout(i).piece(mine.row, piece));
                PA_UNROLL
                for (int w = 0; w < 4; ++w)
                    sum += hw::low<E>(o.x[w]) * hw::low<E>(g.x[w]) + hw::high<E>(o.x[w]) * hw::high<E>(g.x[w]);
            }
            PA_UNROLL
            for (int mask = 1; mask < kThreadsARow; mask *= 2) sum += hw::shuffle_xor(sum, mask);
            delta = sum - delta;
        }
        if (mine.piece != 0) return;
        const int l = l0 + mine.row;
        const float lse = hw::load_shared<float>(side(i, 0) + 4 * mine.row);
        const bool some = l < (int)p.L && lse != kMinusInf;
        hw::store_shared(side(i, 0) + 4 * mine.row, some ? lse * kLog2e : 0.f);
        hw::store_shared(side(i, 1) + 4 * mine.row, delta);
        hw::store_shared(side(i, 2) + 4 * mine.row, some ? (uint32_t)hidden_from(axis, l) : 0u);
        if (writes_delta && l < (int)p.L) hw::store_global(p.delta + (((int64_t)b * p.H + h) * p.L + l), delta);
    }

    PA_DEVICE static int hidden_from(const Axis &axis, int l) {
        const int seen = axis.seen(l);
        return seen > 0 ? seen : 0;
    }
};

}  // namespace prefixattn::cuda
