"""A grid of experiments from a TOML file: a search over lr and weight decay, then the best with each seed.

    name = "tiny"
    tasks = ["dogs", "cats"]
    seeds = [42, 44, 82, 100, 800]  # the search takes the first

    [common]                        # every setting of a run, with its usual value
    length = 10
    epochs = 100

    [task.dogs]                     # over common, in this task
    epochs = 50

    [[methods]]
    name = "deep"
    layers = "all"                  # or "first"
    lr = [5.0, 1.0]
    weight_decay = [0.001, 0.0]
    length = 20                     # over common and task
    label = "deep-all-P20"          # in names of runs; this is the default: name, layers and, if it is set, length
    seeds = [42]                    # of this method, over those above; its search takes the first

    [methods.task.cats]             # over all of them
    lr = [0.5]

A second block of one name, layers and length needs a label of its own. Where there is one lr and one weight decay,
nothing is searched.
"""

import math
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from bench.paper.runs import Refusal
from bench.paper.sweeps.ledger import PART, Ledger, Run

SEEDS = (42, 44, 82, 100, 800)
LAYERS = ("all", "first")
RESERVED = ("task", "method", "label", "layers", "lr", "weight_decay", "seed", "phase")  # keys of a run's config
SCALARS = (str, int, float, bool)


@dataclass(frozen=True)
class Method:
    """A method in one task, with all of its settings."""

    task: str
    name: str
    label: str
    layers: str
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    settings: dict[str, Any]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What a search selects by: a key of its runs' results."""

    name: str
    larger: bool  # whether more of it is better


VAL_ACCURACY = Score("val_accuracy", larger=True)


@dataclass(frozen=True)
class Choice:
    """What the search of a method in a task came to: the config of the best run and its score, or None and why.

    stuck: a launch ends without it; the search failed or diverged.
    """

    best: dict[str, Any] | None
    value: float | None
    reason: str
    stuck: bool = False


@dataclass(frozen=True)
class Grid:
    name: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]  # one for each task and block, task by task
    score: Score = VAL_ACCURACY

    def only(self, tasks: Collection[str] | None = None, methods: Collection[str] | None = None) -> "Grid":
        """The part of these tasks and of the methods with these names or labels; None is all. This one stays whole.

        Raises:
            Refusal: a word that is not in the grid, or nothing is left.
        """
        words = {word: None for method in self.methods for word in (method.name, method.label)}
        for kind, known, given in (("task", self.tasks, tasks), ("method", words, methods)):
            for word in given or ():
                if word not in known:
                    raise Refusal(f"{kind} {word!r}: not in grid {self.name}; there are {', '.join(known)}")
        kept = tuple(
            method for method in self.methods
            if (tasks is None or method.task in tasks) and (methods is None or {method.name, method.label} & {*methods})
        )  # fmt: skip
        if not kept:
            raise Refusal(f"nothing is left of grid {self.name}")
        return replace(self, tasks=tuple(task for task in self.tasks if tasks is None or task in tasks), methods=kept)

    def search_runs(self) -> list[Run]:
        """All combinations of lr and weight decay of each task and method, with the first seed."""
        return [run for method in self.methods if _pairs(method) > 1 for run in self._search(method)]

    def final_runs(self, ledger: Ledger) -> list[Run]:
        """One run for each seed, with the best lr and weight decay, of the methods whose search has ended."""
        return [
            self._run(method, best["lr"], best["weight_decay"], seed, "final")
            for method in self.methods
            if (best := self._choice(ledger, method).best) is not None
            for seed in method.seeds
        ]

    def plan(self, ledger: Ledger) -> list[Run]:
        return self.search_runs() + self.final_runs(ledger)

    def choices(self, ledger: Ledger) -> dict[tuple[str, str], Choice]:
        """By task and label: the best of the search by `score`; of equals the smaller lr, then weight decay.

        A run that diverged, whose score is None or not finite, is worse than any other. One that failed might
        have been the best: the choice waits for it.

        Raises:
            Refusal: a finished run without the score, or whatever `Ledger.record` refuses.
        """
        return {(method.task, method.label): self._choice(ledger, method) for method in self.methods}

    def reasons(self, ledger: Ledger) -> list[str]:
        """One line for each task and method whose search ended without a choice: runs failed, or all diverged."""
        found = self.choices(ledger).items()
        return [f"{self.name}/{'/'.join(place)}: {choice.reason}" for place, choice in found if choice.stuck]

    def _choice(self, ledger: Ledger, method: Method) -> Choice:
        runs, failures, diverged, waiting = self._search(method), [], [], 0
        if _pairs(method) == 1:
            return Choice(runs[0].config, None, "")
        valued: list[tuple[float, float, float, dict[str, Any]]] = []
        for run in runs:
            result = ledger.result(run)
            if result is None:
                if (failure := ledger.failure(run)) is None:
                    waiting += 1
                else:
                    failures.append(failure)
                continue
            name = self.score.name
            if name not in result:
                raise Refusal(f"{ledger.path(run)}: its result has no {name}; delete it to do this run again")
            value = result[name]
            if isinstance(value, SCALARS[1:]) and math.isfinite(value):
                valued.append(
                    (-value if self.score.larger else value, run.config["lr"], run.config["weight_decay"], run.config)
                )
            else:
                diverged.append(f"{name} is {value}")
        if waiting:
            return Choice(None, None, f"waits for {waiting} of {len(runs)} runs of its search")
        if failures:
            why = f"waits for {len(failures)} of {len(runs)} runs of its search that failed: {failures[0]}"
            return Choice(None, None, f"{why}; --retry tries them again", stuck=True)
        if not valued:
            why = f"no final runs, all {len(runs)} of its search diverged: {diverged[0]}"
            return Choice(None, None, why, stuck=True)
        best = min(valued, key=lambda entry: entry[:3])
        return Choice(best[3], -best[0] if self.score.larger else best[0], "")

    def _search(self, method: Method) -> list[Run]:
        pairs = product(method.lr, method.weight_decay)
        return [self._run(method, lr, decay, method.seeds[0], "search") for lr, decay in pairs]

    def _run(self, method: Method, lr: float, decay: float, seed: int, phase: str) -> Run:
        name = f"{self.name}/{method.task}/{method.label}/{phase}-lr{lr:g}-wd{decay:g}-s{seed}"
        config = {"task": method.task, "method": method.name, "layers": method.layers, "lr": lr, "weight_decay": decay,
                  "seed": seed, "phase": phase, **method.settings}  # fmt: skip
        return Run(name, config)


def _pairs(method: Method) -> int:
    return len(method.lr) * len(method.weight_decay)


def grid_of(
    content: dict[str, Any], source: str, known: Collection[str] | None = None, score: Score = VAL_ACCURACY
) -> Grid:
    """A grid from what `load_grid` finds in a file; refusals name `source`."""
    return replace(_Reader(Path(source), known).grid(content), score=score)


def load_grid(path: Path | str, known: Collection[str] | None = None, score: Score = VAL_ACCURACY) -> Grid:
    """Reads a grid file, whose searches select by `score`.

    `known` names the settings that there are; without it a setting of a task or method must be one of [common].

    Raises:
        Refusal: in one line with file and key, whatever is unknown, missing, doubled, empty or of a wrong type.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: not readable as TOML ({error})") from None
    return grid_of(content, str(path), known, score)


class _Reader:
    def __init__(self, path: Path, known: Collection[str] | None) -> None:
        self.path, self.known, self.common, self.seeds = path, known, {}, SEEDS

    def wrong(self, key: str, why: str) -> Refusal:
        return Refusal(f"{self.path}: {key}: {why}")

    def grid(self, content: dict[str, Any]) -> Grid:
        self.only(content, ("name", "tasks", "seeds", "common", "task", "methods"), "")
        name = self.word(content, "name", "")
        tasks = tuple(self.items(content, "tasks", "", (str,), "strings"))
        for at, task in enumerate(tasks):
            self.word({"": task}, "", f"tasks[{at}]")
        self.seeds = seeds = self.seeds_of({"seeds": list(SEEDS), **content}, "")
        self.common = self.settings(self.table(content, "common"), "common", None)
        over = self.by_task(content, tasks, "")
        task_settings = {task: self.settings(table, f"task.{task}", self.common) for task, table in over.items()}
        blocks = content.get("methods")
        if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
            raise self.wrong("methods", "expected one [[methods]] block or more")
        read = [self.block(block, f"methods[{at}]", tasks, task_settings) for at, block in enumerate(blocks)]
        labels = [block[0].label for block in read]
        for at, label in enumerate(labels):
            if label in labels[:at]:
                raise self.wrong(f"methods[{at}]", f"the second with the label {label}; give one of them another label")
        return Grid(name, tasks, seeds, tuple(block[at] for at in range(len(tasks)) for block in read))

    def block(self, block: dict[str, Any], where: str, tasks: tuple[str, ...], of_task: dict[str, Any]) -> list[Method]:
        name = self.word(block, "name", where)
        where = f"{where} ({name})"
        over = self.by_task(block, tasks, where + ".")
        plain = {key: value for key, value in block.items() if key not in ("name", "task", "label", "seeds")}
        own = self.method_settings(plain, where)
        length = {**self.common, **own}.get("length")
        default = "-".join([name, own.get("layers", ""), *([f"P{length}"] if length is not None else [])])
        label = self.word(block, "label", where) if "label" in block else default
        seeds = self.seeds_of(block, where) if "seeds" in block else self.seeds
        found = []
        for task in tasks:
            table = self.method_settings(over.get(task, {}), f"{where}.task.{task}")
            merged = {**self.common, **of_task.get(task, {}), **own, **table}
            for key in ("layers", "lr", "weight_decay"):
                if key not in merged:
                    raise self.wrong(f"{where}.{key}", f"missing for task {task}")
            layers, lr, decay = (merged.pop(key) for key in ("layers", "lr", "weight_decay"))
            found.append(Method(task, name, label, layers, lr, decay, merged, seeds))
        return found

    def seeds_of(self, table: dict[str, Any], where: str) -> tuple[int, ...]:
        seeds = tuple(self.items(table, "seeds", where, (int,), "whole numbers"))
        if min(seeds) < 0:
            raise self.wrong(f"{where}.seeds" if where else "seeds", f"{min(seeds)} is below 0")
        return seeds

    def method_settings(self, table: dict[str, Any], where: str) -> dict[str, Any]:
        """Those of a method: layers, lr, weight_decay as they are to be, and the others."""
        own: dict[str, Any] = {}
        if "layers" in table:
            own["layers"] = table["layers"]
            if own["layers"] not in LAYERS:
                raise self.wrong(f"{where}.layers", f"is {own['layers']!r}, expected {' or '.join(LAYERS)}")
        for key in ("lr", "weight_decay"):
            if key in table:
                values = [float(value) for value in self.items(table, key, where, (int, float), "numbers")]
                for value in values:
                    if not math.isfinite(value) or value < 0 or (key == "lr" and value == 0):
                        least = "above 0" if key == "lr" else "from 0"
                        raise self.wrong(f"{where}.{key}", f"{value:g} is not a finite number {least}")
                if len({f"{value:g}" for value in values}) < len(values):
                    raise self.wrong(f"{where}.{key}", "two of its values are the same in six digits")
                own[key] = tuple(values)
        rest = {key: value for key, value in table.items() if key not in ("layers", "lr", "weight_decay")}
        return {**own, **self.settings(rest, where, self.common)}

    def settings(self, table: dict[str, Any], where: str, common: dict[str, Any] | None) -> dict[str, Any]:
        for key, value in table.items():
            place = f"{where}.{key}"
            if key in RESERVED:
                raise self.wrong(place, "is of each run, and no setting")
            if self.known is not None and key not in self.known:
                raise self.wrong(place, f"unknown; there are {', '.join(sorted(self.known))}")
            if self.known is None and common is not None and key not in common:
                raise self.wrong(place, "unknown; a setting has its usual value in [common]")
            if type(value) not in SCALARS or (isinstance(value, float) and not math.isfinite(value)):
                raise self.wrong(place, f"is {value!r}, expected a string, a finite number, true or false")
            usual = (common or {}).get(key, value)
            if type(usual) is not type(value) and {type(usual), type(value)} != {int, float}:
                raise self.wrong(place, f"is {value!r}, and {usual!r} in [common]: not of one type")
        return dict(table)

    def by_task(self, content: dict[str, Any], tasks: tuple[str, ...], where: str) -> dict[str, dict[str, Any]]:
        found = self.table(content, "task", where)
        for task in found:
            if task not in tasks:
                raise self.wrong(f"{where}task.{task}", f"no such task; there are {', '.join(tasks)}")
            self.table(found, task, f"{where}task.")
        return found

    def table(self, content: dict[str, Any], key: str, where: str = "") -> dict[str, Any]:
        if not isinstance(found := content.get(key, {}), dict):
            raise self.wrong(where + key, f"is {found!r}, expected a table")
        return found

    def only(self, content: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
        for key in content:
            if key not in keys:
                raise self.wrong(where + key, f"unknown; there are {', '.join(keys)}")

    def word(self, content: dict[str, Any], key: str, where: str) -> str:
        place = ".".join(part for part in (where, key) if part)
        if key not in content:
            raise self.wrong(place, "missing")
        value = content[key]
        if not isinstance(value, str) or not PART.fullmatch(value) or value.endswith(".failed"):
            raise self.wrong(place, f"is {value!r}, expected a word of letters, digits and ._+=-")
        return value

    def items(self, content: dict[str, Any], key: str, where: str, kinds: tuple[type, ...], words: str) -> list[Any]:
        place = ".".join(part for part in (where, key) if part)
        if key not in content:
            raise self.wrong(place, "missing")
        values = content[key]
        if not isinstance(values, list) or not values or any(type(value) not in kinds for value in values):
            raise self.wrong(place, f"is {values!r}, expected a list of {words} that is not empty")
        if len(set(values)) < len(values):
            raise self.wrong(place, f"is {values!r}, one of them twice")
        return values
