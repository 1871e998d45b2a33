"""Packed sequences: what describes them, and what it may be."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from prefixattn.attention.checks import check_tensor

_NAMES = "cu_seqlens_q", "cu_seqlens_k"


class Sequences(NamedTuple):
    """Sequence i has queries cu_seqlens_q[i] to cu_seqlens_q[i + 1], and keys likewise."""

    cu_seqlens_q: Tensor  # int32 or int64 [sequences + 1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def number(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1


def normal(given: Sequences, q: Tensor, k: Tensor) -> Sequences:  # q [1, H, total_q, D], k [1, Hkv, total_k, D]
    """With int64 offsets. ValueError for what does not describe q and k; on a GPU and when compiled an assertion."""
    made = []
    totals, most = (q.shape[2], k.shape[2]), (given.max_seqlen_q, given.max_seqlen_k)
    for name, t, total, longest in zip(_NAMES, given[:2], totals, most, strict=True):
        check_tensor(name, t)
        if t.dim() != 1 or t.shape[0] < 1:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected [sequences + 1]")
        if t.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {t.dtype}, expected torch.int32 or torch.int64")
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device}, expected {q.device} as q")
        if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool) or longest < 0:
            raise ValueError(f"max_seqlen_{name[-1]} is {longest!r:.40}, expected a number of tokens")
        _check_offsets(name, t, total, longest)
        made.append(t.long())
    if made[0].shape != made[1].shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k have {len(made[0])} and {len(made[1])} offsets, expected equal"
        )
    return Sequences(made[0], made[1], *most)


def _check_offsets(name: str, t: Tensor, total: int, longest: int) -> None:
    """From 0 to `total` without a step back, or one of more than `longest`."""
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and detect_fake_mode(t) is None:
        offsets = t.tolist()
        if offsets[0] != 0:
            raise ValueError(f"{name}[0] is {offsets[0]}, expected 0")
        for i, (begin, end) in enumerate(pairwise(offsets)):
            if end < begin:
                raise ValueError(f"{name}[{i + 1}] is {end}, below {name}[{i}], {begin}")
            if end - begin > longest:
                raise ValueError(f"sequence {i} of {name} has {end - begin} tokens, max_seqlen_{name[-1]} is {longest}")
        if offsets[-1] != total:
            raise ValueError(f"{name}[{len(offsets) - 1}] is {offsets[-1]}, expected the total of {total} tokens")
        return
    steps = t.diff()
    well = (t[0] == 0) & (t[-1] == total) & ((steps >= 0) & (steps <= longest)).all()
    torch._assert_async(well, f"{name} does not go from 0 to {total} in steps of 0 to {longest}")


def parts(offsets: Tensor) -> list[slice]:
    """The rows of each sequence."""
    return [slice(begin, end) for begin, end in pairwise(offsets.tolist())]
