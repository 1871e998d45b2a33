"""The CUDA kernels without a GPU: their build for the host machine, which memory they may touch, what they counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from bench.static import cuda_counts
from prefixattn.attention import cuda

Fields = dict[str, Any]
_OUTPUTS = "out", "lse", "mass", "dq", "dk", "dv", "dprefix_k", "dprefix_v"


class Watched:
    """The compiled module, whose kernels may touch the tensors of their call and no other memory."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def prefix_attn_fwd(self, *args: Any) -> None:
        self._run(self.module.prefix_attn_fwd, *args)

    def prefix_attn_bwd(self, *args: Any) -> None:
        self._run(self.module.prefix_attn_bwd, *args)

    def _run(self, run: Callable[..., None], fields: Fields, allocate: Callable[[int], int], *rest: Any) -> None:
        def allocate_and_allow(size: int) -> int:
            at = allocate(size)
            self.module.allow(at, size, True)
            return at

        try:
            for name, at, size in extents(fields):
                self.module.allow(at, size, name in _OUTPUTS)
            run(fields, allocate_and_allow, *rest)
        finally:
            self.module.forget_tensors()


def extents(fields: Fields) -> Iterator[tuple[str, int, int]]:
    """Name, address and bytes of each tensor of a call, from its shape and strides."""
    B, H, Hkv, L, S, T, P, D = (fields[letter] for letter in ("B", "H", "Hkv", "L", "S", "T", "P", "D"))
    rows: dict[str, tuple[int, int, int]] = {}
    rows |= dict.fromkeys(("q", "out", "dout", "dq"), (B, H, L))
    rows |= dict.fromkeys(("k", "v", "dk", "dv"), (B, Hkv, S))
    rows |= dict.fromkeys(("prefix_k", "prefix_v", "dprefix_k", "dprefix_v"), (T, Hkv, P))
    for name, shape in rows.items():
        address, *strides = fields.get(name) or (0,)
        if address and all(shape):
            elements = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + D
            yield name, address, 2 * elements
    plain = {"lse": 4 * B * H * L, "dlse": 4 * B * H * L, "mass": 4 * B * H * L}
    plain |= {"prefix_ids": 8 * B, "prefix_lengths": 8 * B, "seed": 8}
    for name, size in plain.items():
        if fields.get(name):
            yield name, fields[name], size
    address, *strides = fields["mask"]
    if address:
        strides.append(fields["mask_stride3"])
        element = {"bool": 1, "same_as_q": 2, "float32": 4}[kind_of_mask(fields)]
        shape_of_mask = zip((B, H, L, S), strides, strict=True)
        yield "mask", address, element * (sum((n - 1) * stride for n, stride in shape_of_mask) + 1)


def kind_of_mask(fields: Fields) -> str:
    return next(name for name, number in cuda._native.MASK_KINDS.items() if number == fields["mask_kind"])


@cache
def watched() -> Watched:
    """Built where it was not; workers of pytest-xdist wait for one another."""
    try:
        file = cuda_counts.library()
    except RuntimeError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    module, reason = cuda.load(file)
    assert module is not None, reason
    return Watched(module)


@contextmanager
def host_machine() -> Iterator[Watched]:
    """The backend "cuda" takes tensors on the CPU, and its kernels run there."""
    before = cuda._native, cuda._missing
    cuda._native, cuda._missing = watched(), ""
    try:
        yield watched()
    finally:
        cuda._native, cuda._missing = before
