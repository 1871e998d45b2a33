"""The grids of tests/grids.py leave out no pair of values, and `make test-all` nothing."""

from itertools import product
from typing import Any

from prefixattn import backends
from tests.grids import TYPES, by_backend, cover_of, covered, in_turn, pairs

AXES = ("a", "b", "c"), range(5), ("x", "y"), range(4)


def every_run(grid: list[Any]) -> list[tuple[Any, ...]]:
    return [case.values for case in grid if not case.marks]


def test_a_cover_has_each_pair_of_values() -> None:
    cases = list(product(*AXES))
    few = cover_of(cases)
    assert set().union(*map(pairs, few)) == set().union(*map(pairs, cases))
    assert len(few) < len(cases) / 4
    assert few == [case for case in cases if case in few]  # in their order


def test_what_a_cover_leaves_out_is_marked_and_there() -> None:
    grid = covered(*AXES)
    assert [case.values for case in grid] == list(product(*AXES))
    assert every_run(grid) == cover_of(list(product(*AXES)))
    assert {mark.name for case in grid for mark in case.marks} == {"full"}


def test_each_backend_has_a_grid_in_its_own_types() -> None:
    grid = by_backend(TYPES, AXES[0], AXES[1])
    assert set(TYPES) == set(backends.NAMES) - {"cuda"} and TYPES["reference"][0] == "fp64"
    for name, types in TYPES.items():
        found = [case[1:] for case in every_run(grid) if case[0] == name]
        assert {case[0] for case in found} == set(types)
        assert {case[1:] for case in found} == set(product(AXES[0], AXES[1]))  # the two longest axes, whole


def test_in_turn_has_each_case_once_and_each_type() -> None:
    grid = in_turn({"one": ["fp32"], "two": ["fp32", "bf16"]}, [("a", 1), ("b", 2), ("c", 3)])
    assert len(grid) == 9
    assert every_run(grid) == [
        *(("one", "fp32", "a", 1), ("one", "fp32", "b", 2), ("one", "fp32", "c", 3)),
        *(("two", "fp32", "a", 1), ("two", "bf16", "b", 2), ("two", "fp32", "c", 3)),
    ]
