"""From finished runs to Tables 2 and 8: one JSON, and a Markdown and a page that are made of it alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper.language import paper
from bench.paper.language.paper import COLUMNS, COMPARED, Column
from bench.paper.language.train import Settings
from bench.paper.meteor import NO_JAVA
from bench.paper.runs import write_json, write_text
from bench.paper.sweeps import cells as cells_of
from bench.paper.sweeps import tables as documents
from bench.paper.sweeps.cells import Cell
from bench.paper.sweeps.compare import CLEAR, Sample, failed, failures, in_errors, pairs
from bench.paper.sweeps.compare import titles as titles_of
from bench.paper.sweeps.grid import Grid, Method
from bench.paper.sweeps.ledger import Ledger
from bench.paper.sweeps.tables import EDGE, Entry, Table, measure, number, words

DEV = "loss on dev"
DEV_COLUMN = Column(DEV, (DEV,), form=".3f")
COMPARISONS = (("deep", "none"), ("deep", "none-word"), ("simple", "none"), ("deep", "finetune"), ("deep", "original"))
CAPTION = (
    "Differences of the means, and in standard errors of the difference, sqrt(s1²/n1 + s2²/n2) of the deviations s "
    "over n seeds; of a loss less is better"
)
OF_ONE = ("trained", "kept", "pairs", "steps", "decoded", "notes")  # equal in all runs of a cell
MEANS = ("seconds_per_step", "seconds_decoding")


def collect(grid: Grid, ledger: Ledger) -> dict[str, Any]:
    """The results of a grid: a cell for each task and method, with what is measured of it so far.

    Raises:
        Refusal: as sweeps.cells.collect.
    """
    return cells_of.collect(grid, ledger, _kept, _measured)


def _kept(method: Method) -> Cell:
    return {"length": method.settings.get("length"), "last": method.settings.get("last", Settings.last)}


def _measured(records: cells_of.Records) -> Cell:
    results = [record["result"] for _, record in records]
    whole = next((result for result in results if result["dev_loss"] is not None), results[0] if results else {})
    scored = [(run.config["seed"], record["result"]) for run, record in records]
    return {
        "dev": [(seed, result["dev_loss"]) for seed, result in scored],
        "scores": {
            column.title: [(seed, value) for seed, result in scored if (value := _value(result, column)) is not None]
            for column in (COLUMNS[records[0][0].config["task"]] if records else ())
        },
        "metrics": whole.get("scores", {}).get("notes"),
        "diverged": sum(result["dev_loss"] is None for result in results),
        **{name: whole.get(name) for name in OF_ONE},
        **{name: cells_of.mean(result.get(name) for result in results) for name in MEANS},
        "curve": whole.get("losses", []),
        "records": [
            {"source": record["source"], "references": record["references"], "text": whole["texts"][record["place"]]}
            for record in whole.get("records", [])
        ],
    }


def _value(result: dict[str, Any], column: Column) -> float | None:
    found = result.get("scores")
    for name in column.path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


# --- tables ---


def titles(results: dict[str, Any]) -> dict[str, str]:
    """A name for each label, no two of them the same."""
    return titles_of(results["cells"], paper.named, paper.WITH_LENGTH)


def sample(cell: Cell, title: str) -> Sample | None:
    """The seeds of a score, or of the loss on dev, as it is stored; None of none."""
    rows = cell["dev"] if title == DEV else cell["scores"].get(title, [])
    values = [value for _, value in rows if value is not None]
    if not values:
        return None
    return Sample(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def tables(results: dict[str, Any]) -> list[Table]:
    """Every table of the report, task by task."""
    made: list[Table] = []
    for task in results["tasks"]:
        made.append(_scores(results, task))
    made += [table for table in (differences(results),) if table is not None]
    return [*made, cost(results)]


def _scores(results: dict[str, Any], task: str) -> Table:
    """The paper's number, then ours, in each column; the loss on dev is ours alone."""
    names, rows = titles(results), []
    cells = [cell for cell in results["cells"] if cell["task"] == task]
    for cell in cells:
        theirs = paper.reported(cell) or (None,) * len(COLUMNS[task])
        row = [words(names[cell["label"]])]
        for column, value in zip(COLUMNS[task], theirs, strict=True):
            found = sample(cell, column.title)
            row.append(Entry(f"{number(value, column.form)} / {_ours(cell, column)}", found and found.mean))
        found = sample(cell, DEV)
        row.append(Entry(_ours(cell, DEV_COLUMN), found and found.mean))
        rows.append([*row, measure(cell["decoded"])])
    head = ["method", *(column.title for column in COLUMNS[task]), DEV, "texts"]
    title = {"xsum": "Table 2, XSUM"}.get(task, f"Tables 2 and 8, {'E2E' if task == 'e2e' else 'WebNLG'}")
    caption = f"{title}: the paper's {paper.BACKBONES[task]} / ours, mean ± deviation over seeds"
    return Table(caption, head, rows, notes(results, task))


def _ours(cell: Cell, column: Column) -> str:
    if (found := sample(cell, column.title)) is None:
        return _without(cell, column)
    text = _spread(found, column.times, column.form) + "*" * cell["edge"]
    return text if found.n == cell["seeds"] else f"{text} ({_seeds(found.n, cell)})"


def _seeds(done: int, cell: Cell) -> str:
    return f"{done} of {cell['seeds']} seeds" + (f", {cell['diverged']} diverged" if cell["diverged"] else "")


def _without(cell: Cell, column: Column) -> str:
    said = _metrics(cell)
    why = said.get(column.path[0], said.get("all", ""))
    if "not computed" in why:
        return "needs Java" if why.endswith(NO_JAVA) else "not computed"
    return "failed" if failed(cell) else "diverged" if cell["diverged"] else "-"


def _metrics(cell: Cell) -> dict[str, str]:
    """What computed each score, or why it was not."""
    said = cell["metrics"] or {}
    return said if isinstance(said, dict) else dict(line.split(": ", 1) for line in said)


def _spread(found: Sample | None, times: float, form: str) -> str:
    if found is None:
        return "-"
    text = format(times * found.mean, form)
    return text if found.std is None else f"{text} ± {format(times * found.std, form)}"


def notes(results: dict[str, Any], task: str) -> list[str]:
    """What a task's table needs to be told of."""
    names, cells = titles(results), [cell for cell in results["cells"] if cell["task"] == task]
    found = [EDGE] if any(cell["edge"] and sample(cell, DEV) for cell in cells) else []
    if {"none", "none-word"} & {cell["method"] for cell in cells}:
        found.append(paper.NO_SHARE)
    counts = sorted({cell["decoded"] for cell in cells if cell["decoded"]})
    if len(counts) > 1:
        found.append("Methods with fewer texts were scored on a part of those that others were.")
    said = [note for cell in cells for note in cell["notes"] or ()]
    said += [
        f"{metric}: {why}" for cell in cells for metric, why in _metrics(cell).items() if why.startswith("not computed")
    ]
    return found + list(dict.fromkeys(note if note.endswith(".") else f"{note}." for note in said)) + failures(
        cells, names
    )  # fmt: skip


def cost(results: dict[str, Any]) -> Table:
    head = ["task and method", "lr", "trained", "kept", "pairs", "steps", "s a step", "hours", "s decoding", "peak MiB"]
    names, rows = titles(results), []
    for cell in results["cells"]:
        hours = None if cell["seconds"] is None else cell["seconds"] / 3600
        rows.append(
            [
                words(f"{cell['task']}: {names[cell['label']]}"), measure(cell["lr"], "g"),
                *(measure(cell[name], ",") for name in ("trained", "kept", "pairs", "steps")),
                measure(cell["seconds_per_step"], ".2f"), measure(hours, ".2f"),
                measure(cell["seconds_decoding"], ".0f"), measure(cell["peak_mib"], ",.0f"),
            ]
        )  # fmt: skip
    below = (
        "Means over seeds. Peak memory is that of a whole run, with its weights; runs may have had company, so that "
        "seconds do not compare methods: `nlg.py times` does."
    )
    return Table("What a run takes", head, rows, [below])


# --- differences ---


def differences(results: dict[str, Any]) -> Table | None:
    """Of the scores that the paper argues with, and of the loss on dev; None where nothing can be compared."""
    names, rows = titles(results), []
    for method, base in COMPARISONS:
        for cell, other in pairs(results["cells"], results["tasks"], method, base):
            for title in (*COMPARED[cell["task"]], DEV):
                if (gap := difference(cell, other, title)) is None:
                    continue
                points, errors = gap
                rows.append(
                    [
                        words(cell["task"]), words(names[cell["label"]]), words(names[other["label"]]), words(title),
                        Entry(f"{points:+.3f}" if title == DEV else f"{points:+.1f}", points),
                        Entry("-" if errors is None else f"{errors:+.1f}", errors),
                    ]
                )  # fmt: skip
    head = ("task", "method", "minus", "score", "difference", "standard errors")
    return Table(CAPTION, head, rows, sentences(results)) if rows else None


def difference(cell: Cell, base: Cell, title: str) -> tuple[float, float | None] | None:
    """As the table of scores shows it, and in standard errors.

    None where one of them has no number, or they are scores of other texts.
    """
    if title != DEV and cell["decoded"] != base["decoded"]:
        return None
    one, other = sample(cell, title), sample(base, title)
    if one is None or other is None:
        return None
    times = next((column.times for column in COLUMNS[cell["task"]] if column.title == title), 1.0)
    return times * (one.mean - other.mean), in_errors(one, other)


def sentences(results: dict[str, Any]) -> list[str]:
    """For each comparison: in how many scores the first is clearly better, and in how many clearly worse."""
    names, tallies = titles(results), {}
    for method, base in COMPARISONS:
        for cell, other in pairs(results["cells"], results["tasks"], method, base):
            for title in (*COMPARED[cell["task"]], DEV):
                gap = difference(cell, other, title)
                if gap is not None and gap[1] is not None:
                    better = -gap[1] if title == DEV else gap[1]
                    tallies.setdefault((names[cell["label"]], names[other["label"]]), []).append(better)
    return [
        f"{name} is better than {other} by more than two standard errors in {_some(sum(b > CLEAR for b in found))} of "
        f"{len(found)} scores, and worse so in {_some(sum(b < -CLEAR for b in found))}."
        for (name, other), found in tallies.items()
    ]


def _some(count: int) -> str:
    return str(count or "none")


# --- documents ---


def markdown(results: dict[str, Any]) -> str:
    return documents.markdown(results["name"], describe(results), tables(results))


def describe(results: dict[str, Any]) -> str:
    """What was measured and on what, in words."""
    done, wanted = (sum(values) for values in zip(*((_done(c), c["seeds"]) for c in results["cells"]), strict=True))
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    where = "; ".join(results["provenance"]["device"]) or "nothing"
    lost = sum(cell["diverged"] for cell in results["cells"])
    more = f" {lost} more diverged; means are over the others." if lost else ""
    return f"{done} of {wanted} final runs are measured, on {where}.{more} Settings: {settings}."


def _done(cell: Cell) -> int:
    return sum(loss is not None for _, loss in cell["dev"])


def write(grid: Grid, ledger: Ledger, out: Path) -> str:
    """OUT.json, .md and .html of the runs in the folder OUT; returns the tables, and some sentences, as text."""
    results = collect(grid, ledger)
    write_json(out.with_name(f"{out.name}.json"), results)
    return publish(results, out) + examples(results)


def publish(results: dict[str, Any], out: Path) -> str:
    """All that is made of a results JSON."""
    from bench.paper.language.page import page_of

    text = markdown(results)
    write_text(out.with_name(f"{out.name}.md"), text)
    write_text(out.with_name(f"{out.name}.html"), page_of(results))
    return text


def examples(results: dict[str, Any], most: int = 2) -> str:
    """What each method wrote of the first records, beside a reference, for a terminal."""
    lines = []
    for task in results["tasks"]:
        for record, texts in sentences_of(results, task)[:most]:
            lines += ["", record["source"].strip()]
            rows = [*texts, ("a reference", record["references"][0])]
            width = max(len(name) for name, _ in rows)
            lines += [f"  {name:{width}}  {text}" for name, text in rows]
    return "\n".join(lines)


def sentences_of(results: dict[str, Any], task: str) -> Sequence[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """A few records of a task, each with what every method wrote of it, by the method's name."""
    names, found = titles(results), {}
    for cell in results["cells"]:
        for record in cell["records"] if cell["task"] == task else ():
            texts = found.setdefault(record["source"], (record, []))[1]
            texts.append((names[cell["label"]], record["text"]))
    return list(found.values())
