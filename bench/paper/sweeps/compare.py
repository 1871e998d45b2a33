"""Names for the blocks of a grid, which cells are compared with which, and by how much they differ."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from bench.paper.sweeps.cells import Cell
from bench.paper.sweeps.tables import span

Named = Callable[[Sequence[Cell]], str | None]  # of cells of one method and layers, the paper's name for them
CLEAR = 2.0  # standard errors


class Sample(NamedTuple):
    """n values: their mean, and their standard deviation, None of one."""

    mean: float
    std: float | None
    n: int


def titles(cells: Sequence[Cell], named: Named, with_length: Collection[str]) -> dict[str, str]:
    """A name for each label, no two of them the same: the paper's, with P and the label where it needs them.

    `with_length` are the methods that P tells something.
    """
    blocks: dict[str, list[Cell]] = {}
    for cell in cells:
        blocks.setdefault(cell["label"], []).append(cell)
    often = Counter(kind for block in blocks.values() for kind in _kinds(block))
    names = {label: _title(label, block, often, named, with_length) for label, block in blocks.items()}
    count = Counter(names.values())
    return {label: name if count[name] == 1 else f"{name} ({label})" for label, name in names.items()}


def _kinds(cells: Sequence[Cell]) -> set[tuple[str, str]]:
    return {(cell["method"], cell["layers"]) for cell in cells}


def _title(
    label: str, cells: Sequence[Cell], often: Counter[tuple[str, str]], named: Named, with_length: Collection[str]
) -> str:
    kinds = _kinds(cells)
    if len(kinds) > 1:  # its layers differ by task
        return label
    [(method, layers)] = kinds
    if (name := named(cells)) is None:
        return label
    if often[method, layers] > 1 and method in with_length:
        name += f", P {span(cell['length'] for cell in cells)}"
    usual = f"{method}-{layers}"
    plain = label in (method, usual) or re.fullmatch(rf"{re.escape(usual)}-P\d+", label)
    return name if plain else f"{name} ({label})"


def pairs(cells: Sequence[Cell], tasks: Sequence[str], method: str, base: str) -> list[tuple[Cell, Cell]]:
    """Each cell of `method` with that of `base` it is compared with: one of the same task, layers and length.

    Where there is none of this length, the nearest.
    """
    found = []
    for layers in ("first", "all"):
        for task in tasks:
            here = [cell for cell in cells if (cell["task"], cell["layers"]) == (task, layers)]
            bases = [cell for cell in here if cell["method"] == base]
            for cell in here:
                if cell["method"] == method and bases:
                    found.append((cell, min(bases, key=lambda one, cell=cell: _distance(cell, one))))
    return found


def _distance(cell: Cell, base: Cell) -> tuple[float, bool]:
    lengths = cell["length"], base["length"]
    apart = math.inf if None in lengths else abs(lengths[0] - lengths[1])
    twin = cell["label"].replace(cell["method"], base["method"], 1)  # of two with one length, that with our settings
    return 0 if lengths[0] == lengths[1] else apart, base["label"] != twin


def in_errors(one: Sample, other: Sample) -> float | None:
    """The difference of two means in standard errors of it, sqrt(s1²/n1 + s2²/n2).

    None of one value, or where no value deviates.
    """
    if one.std is None or other.std is None:
        return None
    error = math.sqrt(one.std**2 / one.n + other.std**2 / other.n)
    return (one.mean - other.mean) / error if error else None


def failures(cells: Sequence[Cell], names: dict[str, str]) -> list[str]:
    """A sentence for each cell whose search ended without a choice, or of whose final runs some failed."""
    found = []
    for cell in (cell for cell in cells if failed(cell)):
        why = cell["reason"] or f"{len(cell['lost'])} of {cell['seeds']} final runs: {cell['lost'][0]}"
        found.append(f"Failed: {cell['task']}, {names[cell['label']]}: {why.rstrip('.')}.")
    return found


def failed(cell: Cell) -> bool:
    """Whether its search ended without a choice, as runs of it failed or all diverged; or final runs failed."""
    return bool(cell["stuck"] or cell["lost"])
