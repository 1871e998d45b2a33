// Enums and limits of both ops, said here alone: Python reads them from `_C`, by the names in this file.
#pragma once

namespace prefixattn {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };
enum class MaskKind : int { kNone, kBool, kSameAsQ, kFloat32 };
enum class Phi : int { kNone, kElu, kGelu, kRelu };
enum class MomentFormat : int { kFloat32, kBFloat16, kEightBit };  // kEightBit: prefixattn/reparam/moments8.py

template <class E>
struct Named {
    const char *name;
    E value;
};

template <class E>
struct Names;
template <>
struct Names<DType> {  // torch's names
    static constexpr Named<DType> all[] = {
        {"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}};
};
template <>
struct Names<MaskKind> {
    static constexpr Named<MaskKind> all[] = {{"none", MaskKind::kNone},
                                              {"bool", MaskKind::kBool},
                                              {"same_as_q", MaskKind::kSameAsQ},
                                              {"float32", MaskKind::kFloat32}};
};
template <>
struct Names<Phi> {
    static constexpr Named<Phi> all[] = {
        {"none", Phi::kNone}, {"elu", Phi::kElu}, {"gelu", Phi::kGelu}, {"relu", Phi::kRelu}};
};
template <>
struct Names<MomentFormat> {  // torch's names
    static constexpr Named<MomentFormat> all[] = {
        {"float32", MomentFormat::kFloat32}, {"bfloat16", MomentFormat::kBFloat16}, {"uint8", MomentFormat::kEightBit}};
};

constexpr float kMinusInf = -__builtin_inff();
constexpr int kMaxHeadDim = 256, kHeadDimStep = 8;  // head_dim is a multiple of the step, up to the most
constexpr int kMomentBlock = 256;                   // numbers along a row of the matrix whose codes share a scale

}  // namespace prefixattn
