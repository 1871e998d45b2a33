"""What the cells of a results JSON say: names of its methods, differences between them, and sentences on these."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sweeps.cells import Cell, Sample, in_errors
from sweeps.tables import Entry, Table, span, words
from visual import paper

SHARED, SEPARATE = ("deep", "simple"), "none"
WITH_LENGTH = (*SHARED, SEPARATE, "original", "plus", "vpt")  # methods that P tells something
CAPTION = (
    "Shared against separate: the difference of the means in points of top 1, and in standard errors of the "
    "difference, sqrt(s1²/n1 + s2²/n2) of the deviations s over n seeds"
)
HEAD = ("task", "layers", "method", "minus", "points", "standard errors")
CLEAR = 2.0  # standard errors


def paper_layers(layers: str) -> str:
    return "DEEP" if layers == "all" else "SHALLOW"


# --- names ---


def titles(results: dict[str, Any]) -> dict[str, str]:
    """A name for each label, no two of them the same: the paper's, with P and the label where it needs them."""
    blocks: dict[str, list[Cell]] = {}
    for cell in results["cells"]:
        blocks.setdefault(cell["label"], []).append(cell)
    often = Counter(kind for cells in blocks.values() for kind in _kinds(cells))
    names = {label: _name(label, cells, often) for label, cells in blocks.items()}
    count = Counter(names.values())
    return {label: name if count[name] == 1 else f"{name} ({label})" for label, name in names.items()}


def _kinds(cells: Sequence[Cell]) -> set[tuple[str, str]]:
    return {(cell["method"], cell["layers"]) for cell in cells}


def _name(label: str, cells: Sequence[Cell], often: Counter[tuple[str, str]]) -> str:
    kinds = _kinds(cells)
    if len(kinds) > 1:  # its layers differ by task
        return label
    [(method, layers)] = kinds
    name = paper.NAMES.get((method, layers))
    if method == "partial":
        name = f"Partial-{span(cell['last'] for cell in cells)}"
    if name is None:
        return label
    if often[method, layers] > 1 and method in WITH_LENGTH:
        name += f", P {span(cell['length'] for cell in cells)}"
    usual = f"{method}-{layers}"
    plain = label in (method, usual) or re.fullmatch(rf"{re.escape(usual)}-P\d+", label)
    return name if plain else f"{name} ({label})"


# --- differences ---


def pairs(results: dict[str, Any], tasks: Sequence[str], method: str, base: str) -> list[tuple[Cell, Cell]]:
    """Each cell of `method` with that of `base` it is compared with, where both have a number.

    That is one of the same task, layers and length; where there is none of this length, the nearest.
    """
    found = []
    for layers in ("first", "all"):
        for task in tasks:
            here = [cell for cell in results["cells"] if (cell["task"], cell["layers"]) == (task, layers)]
            bases = [cell for cell in here if cell["method"] == base]
            for cell in here:
                if cell["method"] == method and bases:
                    other = min(bases, key=lambda one, cell=cell: _distance(cell, one))
                    if cell["mean"] is not None and other["mean"] is not None:
                        found.append((cell, other))
    return found


def _distance(cell: Cell, base: Cell) -> tuple[float, bool]:
    lengths = cell["length"], base["length"]
    apart = math.inf if None in lengths else abs(lengths[0] - lengths[1])
    twin = cell["label"].replace(cell["method"], base["method"], 1)  # of two with one length, that with our settings
    return 0 if lengths[0] == lengths[1] else apart, base["label"] != twin


def difference(cell: Cell, base: Cell) -> tuple[float, float | None]:
    """In points, and in standard errors of it over the seeds; None of one seed, or where no seed deviates."""
    one, other = (Sample(each["mean"], each["std"], numbers(each)) for each in (cell, base))
    return 100 * (one.mean - other.mean), in_errors(one, other)


def numbers(cell: Cell) -> int:
    """Of its seeds, those that have an accuracy."""
    return sum(score is not None for _, score in cell["test"])


def differences(results: dict[str, Any], tasks: Sequence[str]) -> Table | None:
    """The shared methods less No-share, and simple less deep, in these tasks; None where nothing can be compared."""
    names, rows = titles(results), []
    kinds = (*((method, SEPARATE) for method in SHARED), ("simple", "deep"))
    found = [pair for method, base in kinds for pair in pairs(results, tasks, method, base)]
    found.sort(key=lambda pair: (pair[0]["layers"] == "all", tasks.index(pair[0]["task"])))
    for cell, other in found:
        points, errors = difference(cell, other)
        rows.append(
            [
                words(cell["task"]), words(paper_layers(cell["layers"])), words(names[cell["label"]]),
                words(names[other["label"]]), Entry(f"{points:+.1f}", points),
                Entry("-" if errors is None else f"{errors:+.1f}", errors),
            ]
        )  # fmt: skip
    return Table(CAPTION, HEAD, rows, sentences(results, tasks)) if rows else None


# --- sentences ---


def sentences(results: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    """One for each kind of layers: clear wins over No-share and of it, and where simple is the best of the grid."""
    names, found = titles(results), []
    for layers in ("first", "all"):
        parts = []
        for method in SHARED:
            tallies: dict[tuple[str, str], list[float]] = {}
            for cell, base in pairs(results, tasks, method, SEPARATE):
                errors = difference(cell, base)[1]
                if cell["layers"] == layers and errors is not None:
                    tallies.setdefault((names[cell["label"]], names[base["label"]]), []).append(errors)
            for (name, other), errors_of in tallies.items():
                won, lost = sum(e > CLEAR for e in errors_of), sum(e < -CLEAR for e in errors_of)
                parts.append(
                    f"{name} beats {other} by more than two standard errors in {_of(won, len(errors_of))}, "
                    f"and {other} beats it so in {lost}"
                )
        parts += _best(results, tasks, layers, names)
        if parts:
            found.append(f"{paper_layers(layers)}: {'; '.join(parts)}.")
    return found


def _best(results: dict[str, Any], tasks: Sequence[str], layers: str, names: dict[str, str]) -> list[str]:
    """In how many tasks each simple has a higher mean than every other method; only of tasks that are done."""
    wins: dict[str, list[bool]] = {}
    for task in tasks:
        cells = [cell for cell in results["cells"] if cell["task"] == task]
        if not all(_ended(cell) for cell in cells):
            continue
        for cell in cells:
            if (cell["method"], cell["layers"]) == ("simple", layers):
                others = [one["mean"] for one in cells if one is not cell and one["mean"] is not None]
                best = cell["mean"] is not None and all(cell["mean"] > mean for mean in others)
                wins.setdefault(cell["label"], []).append(best)
    return [
        f"{names[label]} is the best of all methods of the grid in {_of(sum(won) or 'none', len(won))} where all are "
        "measured"
        for label, won in wins.items()
    ]


def _of(some: int | str, all_: int) -> str:
    return f"{some} of {all_} task{'s' * (all_ != 1)}"


def _ended(cell: Cell) -> bool:
    """Whether no run can add to it; of a search that failed, --retry can."""
    return cell["reason"].startswith("no final") or len(cell["test"]) == cell["seeds"]
