"""What the ledger of a grid holds: a cell for each task and method, its choice and what its final runs measured."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.paper.runs import Refusal
from bench.paper.sweeps.grid import Grid, Method
from bench.paper.sweeps.ledger import Ledger, Run

Cell = dict[str, Any]
Records = Sequence[tuple[Run, dict[str, Any]]]  # final runs of a cell that are done, with their records


def collect(
    grid: Grid, ledger: Ledger, kept: Callable[[Method], Cell], measured: Callable[[Records], Cell]
) -> dict[str, Any]:
    """The results of a grid so far; a cell has what `kept` and `measured` say beside the choice of its search.

    Raises:
        Refusal: two runs with one backbone or task by name and two by content, or whatever `Ledger.record` refuses.
    """
    _of_one("backbone", "weights", grid, ledger)
    _of_one("task", "data_sha256", grid, ledger)
    choices, cells, provenances = grid.choices(ledger), [], []
    finals: dict[tuple[str, str], list[Run]] = {}
    for run in grid.final_runs(ledger):
        finals.setdefault(_place(run.name), []).append(run)
    for method in grid.methods:
        choice = choices[method.task, method.label]
        runs = finals.get((method.task, method.label), [])
        found = [(run, ledger.record(run)) for run in runs]
        records = [(run, record) for run, record in found if record is not None]
        provenances += [record["provenance"] for _, record in records]
        cells.append(
            {
                "task": method.task, "label": method.label, "method": method.name, "layers": method.layers,
                **kept(method), "edge": _edge(method.lr, choice.best),
                "lr": choice.best and choice.best["lr"], "weight_decay": choice.best and choice.best["weight_decay"],
                grid.score.name: choice.value, "reason": choice.reason, "stuck": choice.stuck,
                "seeds": len(method.seeds), **measured(records), **_cost(records),
                "lost": [why for run in runs if (why := ledger.failure(run)) is not None],
            }
        )  # fmt: skip
    return {
        "name": grid.name,
        "tasks": list(grid.tasks),
        "settings": _common([method.settings for method in grid.methods]),
        "cells": cells,
        "provenance": _merged(provenances),
    }


def _of_one(named: str, content: str, grid: Grid, ledger: Ledger) -> None:
    """Refusal where runs of one backbone, or task, were made with others than the rest."""
    seen: dict[Any, tuple[str, str]] = {}
    for run in grid.plan(ledger):
        record = ledger.record(run)
        found = record and record["result"].get(content)
        if found is None:  # not done, or it ended before it could say
            continue
        name, cell = run.config.get(named), "/".join(_place(run.name))
        other, first = seen.setdefault(name, (found, cell))
        if other != found:
            what = content.replace("_", " ")
            raise Refusal(
                f"{cell}: made with {what} {found[:16]} of the {named} {name}, but {first} with {other[:16]}; delete "
                "the runs of one of them"
            )


def _edge(rates: Sequence[float], best: dict[str, Any] | None) -> bool:
    return best is not None and len(rates) > 1 and best["lr"] in (min(rates), max(rates))


def _place(name: str) -> tuple[str, str]:
    _, task, label, _ = name.split("/")
    return task, label


def _cost(records: Records) -> Cell:
    results = [record["result"] for _, record in records]
    return {
        "weights": next((result["weights"] for result in results if result.get("weights") is not None), None),
        "seconds": mean(record["seconds"] for _, record in records),
        "peak_mib": mean(record["peak_mib"] for _, record in records),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None of none."""
    found = [value for value in values if value is not None]
    return round(statistics.mean(found), 3) if found else None


def _common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all methods share."""
    first = settings[0] if settings else {}
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in settings)}


def _merged(provenances: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs were made with: each value that occurs, once."""
    merged: dict[str, Any] = {}
    for key in ("date", "device", "commit", "tree", "python"):
        merged[key] = sorted({str(p.get(key)) for p in provenances})
    names = sorted({name for p in provenances for name in p.get("versions", {})})
    merged["versions"] = {name: sorted({p["versions"].get(name, "") for p in provenances}) for name in names}
    return merged
