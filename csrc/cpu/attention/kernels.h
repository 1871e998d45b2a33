// The functions that one instruction set exports; included by <isa>.cpp.
#pragma once
#include "cpu/attention/bwd.h"
#include "cpu/attention/decode.h"
#include "cpu/attention/fwd.h"
#include "cpu/attention/fwd_tiles.h"
#include "cpu/kernels.h"

namespace prefixattn {
namespace PA_ISA {

#if defined(PA_TILES)
using Bf16Arithmetic = TileDot<bf16>;
#elif defined(PA_BF16DOT)
using Bf16Arithmetic = Bf16Dot;
#else
using Bf16Arithmetic = Fp32;
#endif
// Of float32 that is split.
#if defined(PA_TILES)
using HighArithmetic = SplitDot;
#else
using HighArithmetic = Fp32;
#endif
#if defined(PA_AMX_FP16) || defined(PA_PLAIN_TILES)
using Fp16Arithmetic = TileDot<f16>;
#else
using Fp16Arithmetic = Fp32;
#endif

#if defined(PA_TILES)
inline bool multiplies() {
#if defined(PA_AMX_FP16) || defined(PA_PLAIN_TILES)
    if (!tiles_multiply<f16>()) return false;
#endif
    return tiles_multiply<bf16>();
}
#endif

template <class Storage, class Dot>
void fwd_of(const CpuFwdParams &p, int threads) {
    if (one_query(p)) return Decode<Storage>::run(p, threads);
    if constexpr (Dot::kTiles)
        TileForward<Storage, Dot>::run(p, threads);
    else
        Forward<Storage, Dot>::run(p, threads);
}

inline void fwd(const CpuFwdParams &p, int threads) {
    switch (p.dtype) {
        case DType::kFloat32:
            return p.splits_float32 ? fwd_of<float, HighArithmetic>(p, threads) : fwd_of<float, Fp32>(p, threads);
        case DType::kBFloat16:
            return fwd_of<bf16, Bf16Arithmetic>(p, threads);
        case DType::kFloat16:
            return fwd_of<f16, Fp16Arithmetic>(p, threads);
    }
}

inline void bwd(const CpuBwdParams &p, int threads) {
    switch (p.dtype) {
        case DType::kFloat32:
            return p.splits_float32 ? Backward<float, HighArithmetic>::run(p, threads)
                                    : Backward<float, Fp32>::run(p, threads);
        case DType::kBFloat16:
            return Backward<bf16, Bf16Arithmetic>::run(p, threads);
        case DType::kFloat16:
            return Backward<f16, Fp16Arithmetic>::run(p, threads);
    }
}

}  // namespace PA_ISA
}  // namespace prefixattn
