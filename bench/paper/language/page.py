"""A results JSON of language as one HTML page: the report's tables, curves of the loss, sentences beside references."""

from html import escape
from typing import Any

from bench.paper.language import report
from bench.paper.sweeps.page import Panel, curves, page, paragraph, section, table


def page_of(results: dict[str, Any]) -> str:
    """The whole page."""
    parts = [paragraph(report.describe(results))]
    parts += [table(shown) for shown in report.tables(results)]
    parts.append(
        section(
            "Training loss of a step, of the first seed that has one", curves(report.titles(results), _panels(results))
        )
    )
    parts += [
        section(f"What was written of {task}", texts) for task in results["tasks"] if (texts := _texts(results, task))
    ]
    return page(results["name"], parts)


def _panels(results: dict[str, Any]) -> list[Panel]:
    found = []
    unit = "nats a token" if results["settings"].get("objective") == "mean" else "nats a text"
    for task in results["tasks"]:
        cells = [cell for cell in results["cells"] if cell["task"] == task and cell["curve"]]
        lines = {cell["label"]: [(step, loss) for step, loss in cell["curve"]] for cell in cells}
        found.append(Panel(f"{task}, {unit}", "step", lines))
    return found


def _texts(results: dict[str, Any], task: str) -> str:
    parts = []
    for record, texts in report.sentences_of(results, task):
        references = "".join(f"<li>{escape(text)}</li>" for text in record["references"])
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts)
        parts.append(
            f"<h3>{escape(record['source'])}</h3>\n<dl>{rows}<dt>References</dt><dd><ul>{references}</ul></dd></dl>"
        )
    return "\n".join(parts)
