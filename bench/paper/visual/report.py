"""From finished runs to the paper's tables: one JSON, and a Markdown, a figure and a page that are made of it alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper.runs import replacing, write_json, write_text
from bench.paper.sweeps import cells as cells_of
from bench.paper.sweeps import tables as documents
from bench.paper.sweeps.cells import Cell
from bench.paper.sweeps.compare import failed, failures
from bench.paper.sweeps.grid import Grid, Method
from bench.paper.sweeps.ledger import Ledger
from bench.paper.sweeps.tables import EDGE, Entry, Table, span, words
from bench.paper.visual import paper
from bench.paper.visual.findings import SEPARATE, SHARED, differences, numbers, paper_layers, titles


def collect(grid: Grid, ledger: Ledger) -> dict[str, Any]:
    """The results of a grid: a cell for each task and method, with what is measured of it so far.

    Raises:
        Refusal: as sweeps.cells.collect.
    """
    return cells_of.collect(grid, ledger, _kept, _measured)


def _kept(method: Method) -> Cell:
    return {
        "length": method.settings.get("length"), "last": method.settings.get("last", 1),
        "doubtful": method.task in paper.LENGTHS and paper.doubtful(method.task, method.layers),
    }  # fmt: skip


def _measured(records: cells_of.Records) -> Cell:
    results = [record["result"] for _, record in records]
    scores = [(run.config["seed"], result["test_accuracy"]) for (run, _), result in zip(records, results, strict=True)]
    values = [score for _, score in scores if score is not None]
    first = results[0] if results else {}
    whole = next((result for result in results if result["test_accuracy"] is not None), first)
    return {
        "test": scores,
        "mean": statistics.mean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "diverged": len(scores) - len(values),
        **{name: whole.get(name) for name in ("trained", "kept", "head", "images", "classes", "cached", "notes")},
        "curve": first.get("curve", []),
        "busy_steps": cells_of.mean(result.get("busy_steps") for result in results),
    }


# --- tables ---


def shown(cell: Cell | None) -> str:
    """Mean and deviation in %, * for an lr at the edge, how many seeds if not all; "-" where nothing was measured."""
    if cell is None:
        return "-"
    if cell["mean"] is None:
        return _without(cell)
    text = f"{100 * cell['mean']:.1f}"
    if cell["std"] is not None:
        text += f" ± {100 * cell['std']:.1f}"
    text += "*" * cell["edge"]
    return text if numbers(cell) == cell["seeds"] else f"{text} ({seeds(cell)})"


def _without(cell: Cell) -> str:
    if cell["diverged"]:
        return "diverged" if cell["diverged"] == cell["seeds"] else f"diverged ({seeds(cell)})"
    return "failed" if failed(cell) else "-"


def seeds(cell: Cell) -> str:
    """How many have a number, of how many; how many diverged, if any did."""
    return f"{numbers(cell)} of {cell['seeds']} seeds" + (f", {cell['diverged']} diverged" if cell["diverged"] else "")


def notes(results: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    """What a table of these tasks needs to be told of: its * and the searches that failed."""
    names, cells = titles(results), [cell for cell in results["cells"] if cell["task"] in tasks]
    found = [EDGE] if any("*" in shown(cell) for cell in cells) else []
    return found + failures(cells, names)


def rows_of(results: dict[str, Any]) -> list[tuple[str, dict[str, Cell]]]:
    """(a method's title, its cells by task), in the grid's order."""
    names = titles(results)
    rows: dict[str, dict[str, Cell]] = {}
    for cell in results["cells"]:
        rows.setdefault(cell["label"], {})[cell["task"]] = cell
    return [(names[label], cells) for label, cells in rows.items()]


def mean_of(cells: dict[str, Cell], tasks: Sequence[str]) -> float | None:
    """The mean over tasks, if each of them has a number."""
    means = [cells[task]["mean"] for task in tasks if task in cells]
    return statistics.mean(means) if means and len(means) == len(tasks) and None not in means else None


def tables(results: dict[str, Any]) -> list[Table]:
    """Every table of the report, suite by suite."""
    tasks = results["tasks"]
    suites = [(prefix, names) for prefix, names in _paper_suites() if any(task.startswith(prefix) for task in tasks)]
    made: list[Table | None] = []
    for prefix, names in suites:
        made += _papers_tables(results, prefix, names)
        made.append(differences(results, [task for task in tasks if task.startswith(prefix)]))
    others = [task for task in tasks if not any(task.startswith(prefix) for prefix, _ in suites)]
    if others:
        made += [_plain_table(results, others), differences(results, others)]
    return [table for table in made if table is not None]


def _plain_table(results: dict[str, Any], tasks: Sequence[str]) -> Table:
    rows = []
    for name, cells in rows_of(results):
        mean = mean_of(cells, tasks)
        trained = [cells[task]["trained"] for task in tasks if cells[task]["trained"] is not None]
        row = [words(name), Entry(span(trained), max(trained, default=None))]
        row += [Entry(shown(cells.get(task)), cells[task]["mean"]) for task in tasks]
        rows.append([*row, Entry("-" if mean is None else f"{100 * mean:.1f}", mean)])
    return Table("Top 1 on test, %", ["method", "trained", *tasks, "mean"], rows, notes(results, tasks))


def _paper_suites() -> tuple[tuple[str, tuple[str, ...]], ...]:
    vtab = tuple(name for group in paper.GROUPS.values() for name in group)
    return ("fgvc-", paper.FGVC), ("vtab-", vtab)


def _papers_tables(results: dict[str, Any], prefix: str, names: tuple[str, ...]) -> list[Table]:
    """The paper's cell, then ours, in each column."""
    tasks = [prefix + name for name in names]
    groups = {"FGVC": tasks} if prefix == "fgvc-" else {g: [prefix + n for n in m] for g, m in paper.GROUPS.items()}
    rows, group_rows = [], []
    for name, cells in rows_of(results):
        any_cell = next(iter(cells.values()))
        values, means = _published(any_cell, prefix)
        row, line = [words(name)], [words(name)]
        for i, task in enumerate(tasks):
            cell = cells.get(task)
            row.append(Entry(f"{values[i] if values else '-'} / {shown(cell)}", cell and cell["mean"]))
        for i, members in enumerate(groups.values()):
            ours = mean_of(cells, members)
            theirs = f"{means[i]:.2f}" if means else "-"
            line.append(Entry(f"{theirs} / {'-' if ours is None else f'{100 * ours:.2f}'}", ours))
        rows.append(row)
        group_rows.append(line)
    number = "6" if prefix == "fgvc-" else "5"
    return [
        Table(f"Table {number} (and 1): the paper / ours, top 1, %", ["method", *names], rows, notes(results, tasks)),
        Table("Tables 1 and 7: means, the paper / ours", ["method", *groups], group_rows),
    ]


def _published(cell: Cell, prefix: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The paper's numbers of a method in a suite's tasks and their means, in %; () where it has none."""
    key = cell["method"], cell["layers"]
    if cell["method"] == "partial" and cell["last"] != 1:  # the paper has Partial-1
        return (), ()
    if prefix != "fgvc-":
        return paper.TABLE_5.get(key, ()), paper.TABLE_7.get(key, ())[1:]
    values = paper.TABLE_6.get(key, ())
    return values[:5], values[5:] or paper.TABLE_7.get(key, ())[:1]


def markdown(results: dict[str, Any]) -> str:
    return documents.markdown(results["name"], describe(results), tables(results))


def describe(results: dict[str, Any]) -> str:
    """What was measured and on what, in words."""
    done = sum(numbers(cell) for cell in results["cells"])
    diverged = sum(cell["diverged"] for cell in results["cells"])
    wanted = sum(cell["seeds"] for cell in results["cells"])
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    found = results["provenance"]
    where = "; ".join(found["device"]) or "nothing"
    said = {cell["task"]: cell["notes"] for cell in results["cells"] if cell["notes"]}
    doubtful = sorted({cell["task"] for cell in results["cells"] if cell["doubtful"]})
    parts = [f"{done} of {wanted} final runs are measured, on {where}."]
    if diverged:
        parts.append(f"{diverged} more diverged; means are over the others.")
    parts.append(f"Settings: {settings}.")
    if doubtful:
        parts.append(f"Prefix lengths from memory, which nothing confirms: {', '.join(doubtful)}.")
    return " ".join([*parts, *(f"{task}: {'; '.join(note.rstrip('.') for note in said[task])}." for task in said)])


def figure(results: dict[str, Any], path: Path) -> None:
    """`drawing` as a PNG; the old file stays until the new one is whole."""
    with replacing(path) as temporary:
        drawing(results).savefig(temporary, dpi=90, format="png")


def drawing(results: dict[str, Any]) -> Any:
    """Figure 2, a matplotlib Figure: Deep-, Simple- and No-share in bars, SHALLOW and DEEP; the paper's as diamonds."""
    from matplotlib.figure import Figure

    tasks = results["tasks"]
    drawn = Figure(figsize=(max(6, 1.2 * len(tasks)) + 2, 6), layout="constrained")
    for axes, layers in zip(drawn.subplots(2, 1), ("first", "all"), strict=True):
        _bars(axes, results, layers)
        axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right", fontsize=8)
        axes.set(ylabel="top 1 on test, %", title=paper_layers(layers))
        axes.grid(axis="y", alpha=0.3)
    return drawn


def _bars(axes: Any, results: dict[str, Any], layers: str) -> None:
    """A bar for each label of these layers in each task; of one method they differ by hatch."""
    tasks, names = results["tasks"], titles(results)
    methods = (*SHARED, SEPARATE)
    cells = [cell for cell in results["cells"] if cell["layers"] == layers and cell["method"] in methods]
    cells.sort(key=lambda cell: methods.index(cell["method"]))
    blocks = list(dict.fromkeys((cell["method"], cell["label"]) for cell in cells))
    width, theirs = 0.81 / max(1, len(blocks)), []
    for at, (method, label) in enumerate(blocks):
        mine = {cell["task"]: cell for cell in cells if cell["label"] == label}
        kept = [(i, mine[task]) for i, task in enumerate(tasks) if task in mine and mine[task]["mean"] is not None]
        shift = (at - (len(blocks) - 1) / 2) * width
        before = sum(one == method for one, _ in blocks[:at])
        axes.bar(
            [i + shift for i, _ in kept], [100 * cell["mean"] for _, cell in kept], 0.92 * width, capsize=2,
            yerr=[100 * (cell["std"] or 0) for _, cell in kept], color=f"C{methods.index(method)}",
            hatch=("", "//", "..", "xx")[before % 4], label=names[label].replace(f", {paper_layers(layers)}", ""),
        )  # fmt: skip
        for i, task in enumerate(tasks):
            name = task.removeprefix("fgvc-")
            if task in mine and task.startswith("fgvc-") and name in paper.FGVC:
                value = paper.TABLE_6[method, layers][paper.FGVC.index(name)]
                theirs.append((i + shift + 0.3 * width, value))  # beside the error bar
    if theirs:
        axes.plot(*zip(*theirs, strict=True), linestyle="", marker="d", markersize=4, color="black", label="the paper")
    if blocks:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside: inside it would hide what is drawn


def write(grid: Grid, ledger: Ledger, out: Path) -> str:
    """OUT.json, .md, .png and .html of the runs in the folder OUT; returns the tables as text."""
    results = collect(grid, ledger)
    write_json(out.with_name(f"{out.name}.json"), results)
    return publish(results, out)


def publish(results: dict[str, Any], out: Path) -> str:
    """All that is made of a results JSON."""
    from bench.paper.visual.page import page_of

    text = markdown(results)
    write_text(out.with_name(f"{out.name}.md"), text)
    write_text(out.with_name(f"{out.name}.html"), page_of(results))
    figure(results, out.with_name(f"{out.name}.png"))
    return text
