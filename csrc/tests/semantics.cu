// That api/semantics.h is device code, too: compiled by tests/native/test_native.py where nvcc is, and not run.
#include "api/semantics.h"

using namespace prefixattn;

__global__ void rules(AttnParams p, int64_t b, int64_t l, int64_t *indices, float *numbers, uint32_t *words) {
    indices[0] = prefix_row(p, b);
    indices[1] = memory_row(p, b);
    indices[2] = prefix_length(p, b);
    indices[3] = causal_end(p, l);
    indices[4] = mask_element(p) + is_key_padding(p) + has_float_mask(p);
    numbers[0] = mask_term(numbers[0]);
    numbers[1] = mask_term(numbers[1] > 0);
    numbers[2] = prefix_gain(p.prefix_dropout_p);
    const PhiloxWords drawn = philox4x32(dropout_seed(p), dropout_counter(l, b, 0, kDropsAttention));
    words[0] = drawn.x[dropout_word(b)] >= Keep(p.dropout_p).threshold;
}
