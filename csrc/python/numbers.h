// Enums of csrc/api/limits.h as dicts for Python.
#pragma once
#include <pybind11/pybind11.h>

#include "api/limits.h"

namespace prefixattn {

template <class E>
pybind11::dict numbers() {
    pybind11::dict found;
    for (const Named<E> &x : Names<E>::all) found[x.name] = static_cast<int>(x.value);
    return found;
}

}  // namespace prefixattn
