// What the files of Python's door share.
#pragma once
#include <pybind11/pybind11.h>

namespace prefixattn {

void bind_attention(pybind11::module_ &);
void bind_reparam(pybind11::module_ &);

}  // namespace prefixattn
