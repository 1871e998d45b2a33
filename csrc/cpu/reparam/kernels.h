// The functions that one instruction set exports; included by <isa>.cpp.
#pragma once
#include "cpu/kernels.h"
#include "cpu/reparam/fused_step.h"
#include "cpu/reparam/fwd.h"
