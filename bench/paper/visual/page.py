"""A results JSON of vision as one HTML page: the report's tables, the runs, curves of accuracy."""

from typing import Any

from bench.paper.sweeps.page import Panel, curves, page, paragraph, section, table
from bench.paper.sweeps.tables import Entry, Table, measure, number, words
from bench.paper.visual import report
from bench.paper.visual.findings import numbers, titles


def page_of(results: dict[str, Any]) -> str:
    """The whole page."""
    parts = [paragraph(report.describe(results))]
    parts += [table(shown) for shown in (*report.tables(results), _runs(results))]
    parts.append(section("Accuracy by epoch, first seed", curves(titles(results), _panels(results))))
    return page(results["name"], parts)


def _runs(results: dict[str, Any]) -> Table:
    head = ["task and method", "P", "lr", "weight decay", "val, %", "test, %", "seeds", "trained", "kept", "seconds",
            "peak MiB"]  # fmt: skip
    names, rows = titles(results), []
    for cell in results["cells"]:
        val = cell["val_accuracy"]
        rows.append(
            [
                words(f"{cell['task']}: {names[cell['label']]}"),
                Entry(number(cell["length"]) + ("?" if cell["doubtful"] else ""), cell["length"]),
                measure(cell["lr"], "g"), measure(cell["weight_decay"], "g"),
                Entry("-" if val is None else f"{100 * val:.1f}", val), Entry(report.shown(cell), cell["mean"]),
                Entry(report.seeds(cell).replace(" seeds", ""), numbers(cell)), measure(cell["trained"], ","),
                measure(cell["kept"], ","), measure(cell["seconds"], ".1f"), measure(cell["peak_mib"], ",.0f"),
            ]
        )  # fmt: skip
    return Table("Runs", head, rows, report.notes(results, results["tasks"]))


def _panels(results: dict[str, Any]) -> list[Panel]:
    found = []
    for task in results["tasks"]:
        points = {
            cell["label"]: [(row[0], row[2]) for row in cell["curve"] if row[2] is not None]
            for cell in results["cells"] if cell["task"] == task
        }  # fmt: skip
        lines = {label: line for label, line in points.items() if line}
        found.append(Panel(f"{task}, test, %", "epoch", lines, scale=100))
    return found
