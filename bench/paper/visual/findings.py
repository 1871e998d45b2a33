"""What the cells of a results JSON say: names of its methods, differences between them, and sentences on these."""

from collections.abc import Sequence
from typing import Any

from bench.paper.sweeps import compare
from bench.paper.sweeps.cells import Cell
from bench.paper.sweeps.compare import CLEAR, Sample, in_errors
from bench.paper.sweeps.tables import Entry, Table, span, words
from bench.paper.visual import paper

SHARED, SEPARATE = ("deep", "simple"), "none"
WITH_LENGTH = (*SHARED, SEPARATE, "original", "plus", "vpt")  # methods that P tells something
CAPTION = (
    "Shared against separate: the difference of the means in points of top 1, and in standard errors of the "
    "difference, sqrt(s1²/n1 + s2²/n2) of the deviations s over n seeds"
)
HEAD = ("task", "layers", "method", "minus", "points", "standard errors")


def paper_layers(layers: str) -> str:
    return "DEEP" if layers == "all" else "SHALLOW"


# --- names ---


def titles(results: dict[str, Any]) -> dict[str, str]:
    """A name for each label, no two of them the same."""
    return compare.titles(results["cells"], _named, WITH_LENGTH)


def _named(cells: Sequence[Cell]) -> str | None:
    method, layers = cells[0]["method"], cells[0]["layers"]
    if method == "partial":
        return f"Partial-{span(cell['last'] for cell in cells)}"
    return paper.NAMES.get((method, layers))


# --- differences ---


def pairs(results: dict[str, Any], tasks: Sequence[str], method: str, base: str) -> list[tuple[Cell, Cell]]:
    """Each cell of `method` with that of `base` it is compared with, where both have a number."""
    found = compare.pairs(results["cells"], tasks, method, base)
    return [pair for pair in found if all(cell["mean"] is not None for cell in pair)]


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
