"""Moments of 8 bits: a code for each number and a float32 scale for each block of BLOCK numbers along a row.

    exp_avg:     code c in 0..254, k = c - 127,  m = scale * sign(k) * (k / 127)^2,  scale = max |m| of the block
    exp_avg_sq:  code c in 0..255,               v = (scale * (c / 255)^2)^2,        scale = sqrt(max v) of the block

Squares put the codes close where the numbers are small: m keeps 4 decades below its block's largest, v 9 of them. Zero
is exact. A positive v never becomes zero, for that would let m / (sqrt(v) + eps) explode: it takes at least code 1.

Rounding is stochastic, unbiased in m and v themselves. To nearest would not do: v moves by 1 - beta2 of its distance a
step, a thousandth, which is less than half the distance of two codes, so that it would never move. The coin is a hash
of the number's place in the matrix and the step: a run repeats to the bit, also when it is interrupted and loaded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
_MASK = 0xFFFFFFFF


class Moment8(NamedTuple):
    """A moment [G, O, M] in 8 bits."""

    code: Tensor  # uint8 [G, O, M]
    scale: Tensor  # float32 [G, O, ceil(M / BLOCK)]
    signed: bool  # exp_avg; else exp_avg_sq

    def decode(self, g: int, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of the moment, [rows, M], as new numbers."""
        code = self.code[g, rows]
        scale = _along_row(self.scale[g, rows], code.shape[-1])
        return _value(code.to(torch.int32), scale, self.signed).to(dtype)

    def encode(self, g: int, rows: slice, values: Tensor, step: int) -> None:
        """Writes rows [rows, M]; `step` is part of the coin."""
        outputs, width = self.code.shape[1:]
        values = values.to(torch.float32)
        magnitude = values.abs() if self.signed else values.sqrt()
        blocks = torch.nn.functional.pad(magnitude, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
        scale = blocks.amax(-1)  # [rows, ceil(M / BLOCK)]
        self.scale[g, rows] = scale
        scale = _along_row(scale, width)
        most = 127 if self.signed else 255
        share = torch.where(scale > 0, magnitude / scale, 0)
        low = (share.sqrt() * most).floor().clamp(0, most - 1).to(torch.int32)  # the code below, by magnitude
        below, above = (_value(c + 127 * self.signed, scale, self.signed) for c in (low, low + 1))
        first = (g * outputs + rows.start) * width
        place = torch.arange(first, first + values.numel(), device=values.device).view_as(values)
        coin = _hash(place, 2 * step + self.signed)
        up = values.abs() - below > coin * (above - below)
        code = low + up.to(torch.int32)
        code = torch.where(values == 0, 0, code)
        if self.signed:
            code = 127 + torch.where(values < 0, -code, code)
        else:
            code = torch.where((values > 0) & (code == 0), 1, code)
        self.code[g, rows] = code.to(torch.uint8)


def _value(code: Tensor, scale: Tensor, signed: bool) -> Tensor:
    if signed:
        k = (code - 127).to(torch.float32) / 127
        return k * k.abs() * scale
    root = (code.to(torch.float32) / 255).square() * scale
    return root.square()


def _along_row(scale: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, -1)[..., :width]


def _hash(place: Tensor, salt: int) -> Tensor:
    """A number in [0, 1) for each place: 32 bits of it and the salt, mixed as by a finalizer of shifts and products."""
    x = (place ^ (place >> 32) ^ (salt * 0x9E3779B9 & _MASK)) & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # products wrap in int64; their low 32 bits are right
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return ((x ^ (x >> 16)) >> 8).to(torch.float32) * 2.0**-24
