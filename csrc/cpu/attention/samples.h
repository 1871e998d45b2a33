// A sample's own part of a call, whether samples have one length or are packed sequences.
#pragma once
#include <initializer_list>

#include "api/semantics.h"
#include "cpu/calls.h"
#include "cpu/vec.h"

namespace prefixattn {
namespace PA_ISA {

// Of lse, dlse and mass, where the rows of one head begin.
template <class Params>
int64_t first_row(const Params &p, int64_t b, int64_t h) {
    return p.cu_seqlens_q ? h * p.total_q + p.cu_seqlens_q[b] : (b * p.H + h) * p.L;
}

inline void move_rows(std::initializer_list<Strided *> tensors, int64_t rows, int64_t size) {
    for (Strided *t : tensors) {
        if (t->data) t->data = (char *)t->data + rows * t->stride2 * size;
        t->stride0 = 0;
    }
}
inline void move_rows(CpuFwdParams &p, int64_t q, int64_t k, int64_t size) {
    move_rows({&p.q, &p.out, &p.attended}, q, size);
    move_rows({&p.k, &p.v}, k, size);
}
inline void move_rows(CpuBwdParams &p, int64_t q, int64_t k, int64_t size) {
    move_rows({&p.q, &p.out, &p.dout, &p.dq}, q, size);
    move_rows({&p.k, &p.v, &p.dk, &p.dv}, k, size);
}

// The call as sample b sees it: of packed sequences its own length and rows. What is indexed by b stays so.
template <class Params>
Params sample_of(const Params &whole, int64_t b) {
    Params p = whole;
    if (!p.cu_seqlens_q) return p;
    const int64_t q = p.cu_seqlens_q[b], k = p.cu_seqlens_k[b];
    p.L = p.cu_seqlens_q[b + 1] - q, p.S = p.cu_seqlens_k[b + 1] - k;
    move_rows(p, q, k, element_size(p.dtype));
    return p;
}

}  // namespace PA_ISA
}  // namespace prefixattn
