"""Philox4x32-10 (Salmon et al., SC 2011), so that each backend drops the same weights for the same seed.

The counter is the position, never an order of visits: any tile can draw its own bits, forward and backward alike.
"""

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF

# the last word of the counter keeps the three kinds of draws apart
ATTENTION, PREFIX_K, PREFIX_V = 0, 1, 2


def threshold(p: float) -> int:
    """A 32-bit word is kept iff it is at least this."""
    return int(p * 2**32)


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor, Tensor]) -> Tensor:
    """Ten rounds on a counter of four words that broadcast to [...]; returns their words as int64 [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps around; the shift's sign bits are masked away, which leaves the high half of the product
        m0, m1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((m1 >> 32) & _WORD) ^ c1 ^ k0, m1 & _WORD, ((m0 >> 32) & _WORD) ^ c3 ^ k1, m0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def keep(seed: Tensor, p: float, shape: tuple[int, int, int, int], kind: int, first: int = 0) -> Tensor:
    """Which elements of [B, H, rows, columns] survive dropout of probability `p`: bool of that shape.

    Element (b, h, row, column) is word `column % 4` of counter (column // 4, row, (first + b) * H + h, kind).
    """
    B, H, rows, columns = shape
    seed = seed.reshape(())

    def axis(n: int) -> Tensor:
        return torch.arange(n, device=seed.device)

    counter = (axis((columns + 3) // 4), axis(rows)[:, None], axis(B * H)[:, None, None] + first * H, kind)
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))  # [B * H, rows, columns / 4, 4]
    return (words.flatten(2)[..., :columns] >= threshold(p)).view(shape)
