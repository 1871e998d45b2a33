// The records of prefix_attention for Python: a dict of the members of FwdParams or BwdParams, which every module of
// ours reads. Shapes were checked by whoever called the op (normal_form.py), types and devices by the backend.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "api/prefix_attn.h"
#include "python/reader.h"

namespace prefixattn {

template <class Call>
std::vector<Field<Call>> attn_fields() {
    return {PA_FIELD(Call, dtype),
            PA_FIELD(Call, B),
            PA_FIELD(Call, H),
            PA_FIELD(Call, Hkv),
            PA_FIELD(Call, L),
            PA_FIELD(Call, S),
            PA_FIELD(Call, T),
            PA_FIELD(Call, P),
            PA_FIELD(Call, D),
            PA_FIELD(Call, q),
            PA_FIELD(Call, k),
            PA_FIELD(Call, v),
            PA_FIELD(Call, prefix_k),
            PA_FIELD(Call, prefix_v),
            PA_FIELD(Call, memory),
            PA_FIELD(Call, memories),
            PA_FIELD(Call, phi),
            PA_FIELD(Call, prefix_ids),
            PA_FIELD(Call, prefix_lengths),
            PA_FIELD(Call, mask_kind),
            PA_FIELD(Call, mask),
            PA_FIELD(Call, mask_stride3),
            PA_FIELD(Call, scale),
            PA_FIELD(Call, softcap),
            PA_FIELD(Call, causal),
            PA_FIELD(Call, dropout_p),
            PA_FIELD(Call, prefix_dropout_p),
            PA_FIELD(Call, seed)};
}

// Without these the kernels would write beyond their buffers, or drop the same for every call.
inline void require_sense(const AttnParams &p) {
    if (p.D < 1 || p.D > kMaxHeadDim || p.D % kHeadDimStep)
        throw pybind11::value_error("head_dim is " + std::to_string(p.D) + ", expected a multiple of " +
                                    std::to_string(kHeadDimStep) + " up to " + std::to_string(kMaxHeadDim));
    if ((p.dropout_p > 0 || p.prefix_dropout_p > 0) && !p.seed) throw pybind11::value_error("dropout has no seed");
}

// Call: FwdParams, or what has further members, whose fields are `more`.
template <class Call = FwdParams>
Call read_fwd(const pybind11::dict &fields, const std::vector<Field<Call>> &more = {}) {
    static const Record<Call> record(
        "prefix_attn_fwd", attn_fields<Call>(),
        {PA_FIELD(Call, out), PA_FIELD(Call, attended), PA_FIELD(Call, lse), PA_FIELD(Call, mass)}, more);
    Call p{};
    record.read(fields, p);
    require_sense(p);
    return p;
}

template <class Call = BwdParams>
Call read_bwd(const pybind11::dict &fields, const std::vector<Field<Call>> &more = {}) {
    static const Record<Call> record("prefix_attn_bwd", attn_fields<Call>(),
                                     {PA_FIELD(Call, dout), PA_FIELD(Call, out), PA_FIELD(Call, lse),
                                      PA_FIELD(Call, dlse), PA_FIELD(Call, dq), PA_FIELD(Call, dk), PA_FIELD(Call, dv),
                                      PA_FIELD(Call, dprefix_k), PA_FIELD(Call, dprefix_v), PA_FIELD(Call, dmemory)},
                                     more);
    Call p{};
    record.read(fields, p);
    require_sense(p);
    return p;
}

}  // namespace prefixattn
