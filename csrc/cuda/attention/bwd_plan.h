// Which backward kernels a call leads to, with what shares of its work: functions of sizes and of what a device offers.
#pragma once
#include "cuda/attention/params.h"
#include "cuda/attention/tiles.h"

namespace prefixattn::cuda {

struct BwdLaunch : BwdParams {
    PrefixDrops drops;
    float *delta = nullptr;       // [B, H, L], written by BwdPrefix and read by the kernels after it
    float *partial = nullptr;     // [slots, Hkv, 2, P, D]: gradients of prefix keys and values before they are summed
    uint32_t *tickets = nullptr;  // [chunks, T, Hkv], how many blocks have left their partial sums
    int members = 1, steps = 1;   // query heads of a key head, and steps of queries of a head
    int runs = 1;                 // blocks of a key head, each with a run of its samples or queries
    int run = 1, longer = 0;      // samples of a run of BwdShort; the first `longer` runs have one more
    int slots = 1;                // of partial sums; of a sample, where T > 1
    bool direct = false;          // a slot's sum is the gradient: it is written as such
    bool sums_prefix = false;     // somebody wants the prefix's gradient
    int key_buffers = 1, ds_buffers = 1;
};

constexpr int kWordBytes = 16;  // a word in shared memory, and what keeps the rest aligned

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

inline bool wants_own(const BwdParams &p) { return p.dk.data || p.dv.data; }
inline bool wants_prefix(const BwdParams &p) { return p.P > 0 && (p.dprefix_k.data || p.dprefix_v.data); }
// Prefix rows are the same numbers for every sample, at the same columns.
PA_HOST_DEVICE bool one_prefix(const AttnParams &p) {
    return p.T == 1 && !p.prefix_lengths && !(p.prefix_dropout_p > 0);
}

// The kernel for short axes. Sums of a key's two gradients stay in registers, 2 D floats a key, which bounds the keys.
struct Short {
    static constexpr int kWarps = 8, kQueries = 32, kMostWaves = 8;
    static constexpr int tiles(int keys) { return keys <= kWarps * kStep ? 1 : 2; }  // of a warp
    static constexpr int most_keys(int D) { return D == 64 ? 2 * kWarps * kStep : kWarps * kStep; }

    static int keys(const BwdParams &p) { return (int)(p.P + p.S); }
    static int shared_bytes(const BwdParams &p, int key_buffers, int ds_buffers) {
        const int rows = round_up(keys(p), kStep), row = 2 * (int)p.D;
        const int stage = 3 * kQueries * row + 3 * kQueries * 4;
        return key_buffers * 2 * rows * row + 2 * stage + kWordBytes +
               (p.dq.data ? ds_buffers * rows * 2 * kQueries : 0);
    }
    // The most buffers that the device has room for; false: not even one each.
    static bool fit(const BwdParams &p, const Device &device, int &key_buffers, int &ds_buffers) {
        for (int choice = 3; choice >= 0; --choice) {
            key_buffers = 1 + (choice >> 1), ds_buffers = 1 + (choice & 1);
            if (shared_bytes(p, key_buffers, ds_buffers) <= device.shared_bytes) return true;
        }
        return false;
    }
    static bool takes(const BwdParams &p, const Device &device) {
        int key_buffers, ds_buffers;
        return (p.dq.data || wants_own(p)) && p.P + p.S <= most_keys((int)p.D) &&
               fit(p, device, key_buffers, ds_buffers);
    }
    // How many blocks share the samples of a key head: the fewest rounds of samples, each block costing 1/16 of one.
    static int runs(const BwdParams &p, const Device &device) {
        const int B = (int)p.B, heads = (int)p.Hkv;
        const int most = ceil_div(kMostWaves * device.processors, heads);
        int best = 1;
        int64_t least = 0;
        for (int runs = 1; runs <= B && runs <= most; ++runs) {
            const int64_t rounds = ceil_div(heads * runs, device.processors > 0 ? device.processors : 1);
            const int64_t cost = rounds * (ceil_div(B, runs) * 16 + 1);
            if (runs > 1 && cost >= least) continue;
            best = runs, least = cost;
        }
        return best;
    }
};

// The kernel for delta and the prefix's gradient.
template <int D>
struct PrefixPass {
    static constexpr int kWarps = 4, kTiles = D == 64 ? 2 : 1, kQueries = D == 64 ? 64 : 32;
    static constexpr int kChunk = kWarps * kTiles * kStep;  // prefix rows of a block
    static int chunks(const BwdParams &p) { return wants_prefix(p) ? ceil_div((int)p.P, kChunk) : 1; }
    // Warps that share a tile of keys, each with other queries: a short prefix has fewer tiles than a block has warps.
    PA_HOST_DEVICE static int groups(const AttnParams &p) {
        constexpr int kMost = kQueries / kStep < kWarps ? kQueries / kStep : kWarps;
        return p.P <= kStep ? kMost : p.P <= 2 * kStep ? 2 : 1;
    }
    static int steps(const BwdParams &p) { return (int)(p.H / p.Hkv) * ceil_div((int)p.L, kQueries); }  // of a sample
    // Two blocks a processor, none with less than four steps; with many prefixes a block stays within a sample.
    static int runs(const BwdParams &p, const Device &device) {
        const int B = (int)p.B, most = ceil_div(B * steps(p), 4);
        int runs = ceil_div(2 * device.processors, (int)p.Hkv * chunks(p));
        runs = runs < most ? runs : most;
        if (runs < 1) runs = 1;
        if (p.T == 1) return runs;
        const int pieces = ceil_div(runs, B);
        return B * (pieces < steps(p) ? pieces : steps(p));
    }
    static int shared_bytes(const BwdParams &p) {
        const int rows = wants_prefix(p) ? round_up((int)p.P < kChunk ? (int)p.P : kChunk, kStep) : 0;
        return 2 * rows * 2 * D + 2 * (3 * kQueries * 2 * D + 3 * kQueries * 4) + kWordBytes;
    }
};

}  // namespace prefixattn::cuda
