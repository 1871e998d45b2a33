// The functions that one instruction set exports; included by reparam/<isa>.cpp.
#pragma once
#include "cpu/kernels.h"
#include "reparam_fwd.h"
#include "reparam_sweep.h"
