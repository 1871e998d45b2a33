// What crosses from the host to a prefix-attention kernel: pointers, sizes and strides. Knows no torch.
#pragma once
#include <cstdint>

#include "api/limits.h"

namespace prefixattn {

// A four-dimensional tensor with unit stride in its last dimension; strides count elements.
struct Strided {
    void *data = nullptr;
    int64_t stride0 = 0, stride1 = 0, stride2 = 0;
};

struct AttnParams {
    DType dtype;
    int64_t B, H, Hkv, L, S, T, P, D;
    Strided q;                   // [B, H, L, D]
    Strided k, v;                // [B, Hkv, S, D]
    Strided prefix_k, prefix_v;  // [T, Hkv, P, D]
    Strided memory;              // [memories, H, D, D], added to out as phi(q) @ memory; null: none
    int64_t memories;            // 1, or T
    Phi phi;
    const int64_t *prefix_ids;      // [B], which prefix each sample has; null: the only one, or prefix b of sample b
    const int64_t *prefix_lengths;  // [B], its rows in use for each sample; null: P
    MaskKind mask_kind;
    Strided mask;          // [B, H, L, S], own keys only; a stride of 0 broadcasts
    int64_t mask_stride3;  // along S
    float scale;           // applied to q @ k.T, before the softmax
    float softcap;         // then scores become softcap * tanh(score / softcap); 0: they do not
    bool causal;           // own key s is visible to query l iff s <= l + S - L
    double dropout_p, prefix_dropout_p;
    const int64_t *seed;  // of both kinds of dropout; read where the kernels run; null: there is none
};

struct FwdParams : AttnParams {
    // outputs
    Strided out;       // [B, H, L, D]
    Strided attended;  // the same without the memory's part; null: not wanted
    void *lse;         // [B, H, L] contiguous, natural log, as Lse<Storage>
    float *mass;       // [B, H, L] contiguous, or null
};

struct BwdParams : AttnParams {
    Strided dout, out;  // [B, H, L, D]; out without the memory's part
    const void *lse;    // [B, H, L], as Lse<Storage>
    const float *dlse;  // [B, H, L] or null
    // outputs; a null pointer: not wanted
    Strided dq;                    // [B, H, L, D]
    Strided dk, dv;                // [B, Hkv, S, D]
    Strided dprefix_k, dprefix_v;  // [T, Hkv, P, D], summed over the samples that used the row
    Strided dmemory;               // [memories, H, D, D], likewise
};

}  // namespace prefixattn
