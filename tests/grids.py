"""Grids of cases: in every run a cover of all pairs, the whole product by `make test-all`."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch

from prefixattn import backends
from prefixattn.testing.attention import known_from_float32

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# backend="cuda" has few sizes, and the machine that runs its kernels without a GPU is slow: native/cuda has its grids
BACKENDS = [name for name in backends.NAMES if name != "cuda"]
# those that a backend has kernels for
TYPES = {name: [d for d in DTYPES if d != "fp64" or name == "reference"] for name in BACKENDS}
# the interpreter's bfloat16 is float32 inside: test_shapes has enough of it
FEWER_TYPES = {name: [d for d in of if not known_from_float32(name, DTYPES[d])] for name, of in TYPES.items()}


def pairs(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


def cover_of(cases: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A few of the cases in which each two values that meet in one of all cases meet, in their order.

    Each next one is the first of those that bring most new pairs.
    """
    open_pairs = set().union(*map(pairs, cases))
    chosen = set()
    while open_pairs:
        best = max(cases, key=lambda case: len(pairs(case) & open_pairs))
        chosen.add(best)
        open_pairs -= pairs(best)
    return [case for case in cases if case in chosen]


def covered(*axes: Iterable[Any]) -> list[Any]:
    """The product of the axes as pytest's parameters, marked `full` where a cover of all pairs does without."""
    cases = list(product(*axes))
    every_run = set(cover_of(cases))
    return [pytest.param(*case, marks=() if case in every_run else pytest.mark.full) for case in cases]


def by_backend(dtypes: dict[str, Sequence[str]], *axes: Iterable[Any]) -> list[Any]:
    """(backend, dtype, ...): `covered` for each backend, in the types that it has kernels for."""
    kept = [list(axis) for axis in axes]
    return [
        pytest.param(backend, *case.values, marks=case.marks)
        for backend, names in dtypes.items()
        for case in covered(names, *kept)
    ]


def without(dtypes: dict[str, Sequence[str]], *backends: str) -> dict[str, Sequence[str]]:
    return {name: of for name, of in dtypes.items() if name not in backends}


def turns(names: Sequence[Any], *cases: Iterable[Any]) -> list[Any]:
    """(name, *case) for each case of a product: with one of the names in turn, with the others by `make test-all`."""
    kept = list(product(*cases))
    return [
        pytest.param(name, *case, marks=() if i % len(names) == turn else pytest.mark.full)
        for i, case in enumerate(kept)
        for turn, name in enumerate(names)
    ]


def in_turn(dtypes: dict[str, Sequence[str]], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """(backend, dtype, *case): each case in one of a backend's types in every run, in all by `make test-all`."""
    kept = list(cases)
    return [
        pytest.param(backend, turn.values[0], *turn.values[1], marks=turn.marks)
        for backend, names in dtypes.items()
        for turn in turns(names, kept)
    ]
