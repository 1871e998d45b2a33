// What crosses from the host to the kernels of the reparameterization: the large matrix of G networks, the P rows that
// go through it, and kv, the prefixes that they make. Everything is contiguous. Knows no torch.
#pragma once
#include <cstdint>

#include "api/prefix_attn.h"

namespace prefixattn {

struct ReparamSizes {
    int64_t G, P, O, M;  // networks, rows, outputs and inputs of the matrix
};

// Output o of a network in kv [G * layers, 2, kv_heads, P, head_dim].
struct KvForm {
    int64_t layers, kv_heads, head_dim;
    bool interleaved;  // o = ((layer, head, d), key or value), not (layer, key or value, head, d)
};

struct ReparamFwdParams : ReparamSizes {
    const float *h;  // [G, P, M]
    const float *w;  // [G, O, M]
    const float *b;  // [G, O] or null
    KvForm form;
    DType dtype;       // of kv
    float *workspace;  // reparam_fwd_workspace() floats
    // outputs
    void *kv;  // [G * layers, 2, kv_heads, P, head_dim]
};

struct KeptMoment {
    void *data;    // [G, O, M]; null: not kept
    float *scale;  // kEightBit: [G, O, ceil(M / kMomentBlock)]
    MomentFormat format;
};

enum class StepRule : int { kNone = 0, kDense = 1, kAdamW = 2, kSgd = 3 };

// One read of the matrix: dh from the old values and, by the rule, what becomes of the gradient dy^T h.
struct FusedStepParams : ReparamSizes {
    const float *h;  // [G, P, M]; null: the rule is kNone
    const void *dy;  // [G, P, O] float32; or, with dy_is_kv, [G * layers, 2, kv_heads, P, head_dim] in dtype
    bool dy_is_kv;
    KvForm form;
    DType dtype;
    float grad_scale;  // a factor on dy
    StepRule rule;
    float *workspace;  // reparam_step_workspace() floats
    float *w;          // [G, O, M]; changed by kAdamW and kSgd; null: not read
    float *dh;         // [G, P, M], output; null: not wanted
    // kDense, outputs
    float *dw;  // [G, O, M] or null
    float *db;  // [G, O] or null
    // kAdamW: exp_avg and exp_avg_sq; kSgd: momentum_buffer or null, not of 8 bits
    KeptMoment moment1, moment2;
    // kAdamW
    float one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inverse_sqrt_correction2, decay;
    uint32_t salt;  // of the coin by which 8 bits are rounded
    // kSgd
    float lr, momentum, one_minus_dampening, weight_decay;
    bool nesterov, first;
};

int64_t step_chunks(const ReparamSizes &);             // of a network
int64_t reparam_fwd_workspace(const ReparamSizes &);   // floats
int64_t reparam_step_workspace(const ReparamSizes &);  // floats

}  // namespace prefixattn
