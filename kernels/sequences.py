"""Where a packed sequence lies: `packed` is a Packed of arguments.py, or None where samples have an axis of their own.

A packed sequence is known by its first row, and its tensors' `sample` stride is that of a row.
"""

import triton
import triton.language as tl


@triton.jit
def sequence(offsets, b):
    """The first row of sequence b, and how many it has; of several, if b is a tensor."""
    first = tl.load(offsets + b)
    return first, (tl.load(offsets + b + 1) - first).to(tl.int32)


@triton.jit
def first_of_head(packed, head, h, first, L):
    """Where the rows of a head begin in lse, mass and delta: [B, H, L], or of packed sequences [1, H, total]."""
    at = head * L
    if packed is not None:
        at = h * packed.total + first
    return at
