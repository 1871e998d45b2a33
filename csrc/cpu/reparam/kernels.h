// The functions that one instruction set exports; included by <isa>.cpp.
#pragma once
#include "cpu/kernels.h"
#include "cpu/reparam/fwd.h"
#include "cpu/reparam/sweep.h"
