"""Tables that are shown as Markdown and, sorted by a click, on a page."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

EDGE = "A * marks an lr at the edge of those searched: a better one may lie beyond."


class Entry(NamedTuple):
    """What a table shows in a place, and what a page sorts it by; None is nothing to sort by."""

    text: str
    value: float | str | None = None


class Table(NamedTuple):
    """`rows` are as wide as `head`; `notes` are sentences to stand under it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    notes: Sequence[str] = ()


def words(text: str) -> Entry:
    return Entry(text, text)


def measure(value: float | None, form: str = "") -> Entry:
    return Entry(number(value, form), value)


def number(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def span(values: Iterable[float | None]) -> str:
    """One number, or the least and the largest; "-" of none."""
    found = sorted({value for value in values if value is not None})
    if not found:
        return "-"
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def markdown(caption: str, lead: str, tables: Sequence[Table]) -> str:
    """A whole document: its title, a paragraph, and each table with its notes below."""
    parts = [f"# {caption}", lead]
    for title, head, rows, below in tables:
        parts += [f"{title}:", markdown_table(head, [[entry.text for entry in row] for row in rows]), *below]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
