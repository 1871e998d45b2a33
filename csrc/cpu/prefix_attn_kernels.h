// The functions that one instruction set exports; included by attention/<isa>.cpp.
#pragma once
#include "cpu/kernels.h"
#include "prefix_attn_bwd.h"
#include "prefix_attn_decode.h"
#include "prefix_attn_fwd.h"

namespace prefixattn {
namespace PA_ISA {

#if defined(PA_BF16DOT)
using Bf16Arithmetic = Bf16Dot;
#else
using Bf16Arithmetic = Fp32;
#endif

template <class Storage, class Dot>
void fwd_of(const FwdParams &p) {
    one_query(p) ? Decode<Storage>::run(p) : Forward<Storage, Dot>::run(p);
}

inline void fwd(const FwdParams &p) {
    switch (p.dtype) {
        case DType::kFloat32:
            return fwd_of<float, Fp32>(p);
        case DType::kBFloat16:
            return fwd_of<bf16, Bf16Arithmetic>(p);
        case DType::kFloat16:
            return fwd_of<f16, Fp32>(p);
    }
}

inline void bwd(const BwdParams &p) {
    switch (p.dtype) {
        case DType::kFloat32:
            return Backward<float, Fp32>::run(p);
        case DType::kBFloat16:
            return Backward<bf16, Bf16Arithmetic>::run(p);
        case DType::kFloat16:
            return Backward<f16, Fp32>::run(p);
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
