"""Moments of 8 bits: a code for each number and a float32 scale for each block of BLOCK numbers along a row.

    exp_avg:     code c in 0..254, k = c - 127,  m = scale * sign(k) * (k / 127)^2,  scale = max |m| of the block
    exp_avg_sq:  code c in 0..255,               v = (scale * (c / 255)^2)^2,        scale = sqrt(max v) of the block

Squares put the codes close where the numbers are small: m keeps 4 decades below its block's largest, v 9 of them. Zero
is exact. A positive v never gets code 0, for that would let m / (sqrt(v) + eps) explode: it takes at least code 1.

Rounding is stochastic, unbiased in m and v themselves. To nearest would not do: v moves by 1 - beta2 of its distance a
step, a thousandth, which is less than half the distance of two codes, so that it would never move. The coin is a hash
of the number's place in the matrix and the step: a run repeats to the bit, also when it is interrupted and loaded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
SMALLEST = 2.0**-112  # scales below are 0: their reciprocals would be infinite
_MASK = 0xFFFFFFFF


class Moment8(NamedTuple):
    """A moment [G, O, M] in 8 bits."""

    code: Tensor  # uint8 [G, O, M]
    scale: Tensor  # float32 [G, O, ceil(M / BLOCK)]
    signed: bool  # exp_avg; else exp_avg_sq

    def decode(self, g: int, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of the moment, [rows, M], as new numbers."""
        code = self.code[g, rows]
        unit = _along_row(self.scale[g, rows] / self._most**2, code.shape[-1])
        if self.signed:
            k = code.float() - 127
            return (k * k.abs() * unit).to(dtype)
        return (code.float().square() * unit).square().to(dtype)

    def encode(self, g: int, rows: slice, values: Tensor, step: int) -> None:
        """Writes rows [rows, M]; `step` is part of the coin."""
        outputs, width = self.code.shape[1:]
        values = values.to(torch.float32)
        magnitude = values.abs() if self.signed else values.sqrt()
        blocks = torch.nn.functional.pad(magnitude, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
        scale = blocks.amax(-1)  # [rows, ceil(M / BLOCK)]
        scale = torch.where(scale < SMALLEST, 0, scale)
        self.scale[g, rows] = scale
        # in units in which a code of magnitude k stands for k^2
        square = magnitude * _along_row(torch.where(scale > 0, self._most**2 / scale, 0), width)
        low = square.sqrt().floor().clamp(0, self._most - 1)  # the code below
        below, gap = low * low, low + low + 1
        start = torch.arange(g * outputs + rows.start, g * outputs + rows.start + len(values), device=values.device)
        coin = _coin(start[:, None] * width, width, step, self.signed)
        if self.signed:
            code = low + (square - below > coin * gap)
            code = 127 + torch.where(values < 0, -code, code)
        else:  # v itself is a fourth power
            code = low + ((square - below) * (square + below) > coin * (gap * (below + below + gap)))
            code = torch.where((magnitude > 0) & (code == 0), 1, code)
        self.code[g, rows] = code.to(torch.uint8)

    @property
    def _most(self) -> int:
        return 127 if self.signed else 255


def _along_row(scale: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, -1)[..., :width]


def salt(step: int) -> int:
    """32 bits that the coins of a step share."""
    return step * 0x9E3779B9 & _MASK


def _coin(start: Tensor, width: int, step: int, signed: bool) -> Tensor:
    """A number in [0, 1) for each place in rows that start at numbers `start`, [rows, 1], of the matrix.

    32 bits of place and step, mixed as by a finalizer of shifts and products; exp_avg takes the first 24, exp_avg_sq
    the last 16 and then the first 8.
    """
    x = (start + torch.arange(width, device=start.device)) & _MASK
    x = x ^ (start >> 32) ^ salt(step)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # products wrap in int64; their low 32 bits are right
        x = ((x ^ (x >> shift)) * factor) & _MASK
    x = x ^ (x >> 16)
    if not signed:
        x = (x << 16 | x >> 16) & _MASK
    return (x >> 8).to(torch.float32) * 2.0**-24
