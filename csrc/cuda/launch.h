// Which kernels a call leads to, and their launches. A plan is a function of sizes and of what a device offers, so that
// it can be asked without one. Knows no CUDA: python/ includes it, and so do both compilations.
#pragma once
#include "api/prefix_attn.h"
#include "cuda/plan.h"

namespace prefixattn::cuda {

// Null, or the reason why there is no kernel for this type and head size.
const char *refused(const AttnParams &);

Plan plan(const FwdParams &, const Device &);
Plan plan(const BwdParams &, const Device &);

// Null, or an error in words. Nothing waits for the kernels.
const char *run(const FwdParams &, void *workspace, const Device &, void *stream);
const char *run(const BwdParams &, void *workspace, const Device &, void *stream);

// Makes a device this thread's, and says what it offers; null, or an error in words.
const char *use_device(int index, Device &);

// On the host machine alone: what use_device() says from here on.
void set_device(int shared_bytes, int processors);

}  // namespace prefixattn::cuda
