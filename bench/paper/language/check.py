"""What of the language data is there, what is missing and where it is to be had, before hours are spent on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.paper.language import e2e, webnlg, xsum
from bench.paper.language.data import SPLITS, Part
from bench.paper.runs import Refusal

Counts = dict[str, dict[str, int]]  # of a split, of what is counted


@dataclass(frozen=True)
class Benchmark:
    display: str
    where: str
    root: Callable[[str | Path], Path]
    read: Callable[[Path, str], Part]
    count: Callable[[str, Part], dict[str, int]]
    published: Callable[[Counts, Path], Counts]
    notes: Callable[[dict[str, Part]], list[str]]


def _overlap(parts: dict[str, Part]) -> list[str]:
    return [str(e2e.overlap(parts["train"], parts["test"]))] if {"train", "test"} <= set(parts) else []


BENCHMARKS: Mapping[str, Benchmark] = {
    e2e.NAME: Benchmark(
        e2e.DISPLAY, e2e.WHERE, e2e.root, e2e.read, e2e.count, lambda counts, folder: e2e.PUBLISHED, _overlap
    ),
    webnlg.NAME: Benchmark(
        webnlg.DISPLAY, webnlg.WHERE, webnlg.root, webnlg.read, webnlg.count,
        lambda counts, folder: webnlg.PUBLISHED, lambda parts: [],
    ),
    xsum.NAME: Benchmark(xsum.DISPLAY, xsum.WHERE, xsum.root, xsum.read, xsum.count, xsum.published, xsum.notes),
}  # fmt: skip


def check_task(name: str, folder: str | Path) -> tuple[list[str], bool]:
    """A table of counts beside the published ones and, below it, what is wrong; and whether nothing is.

    Trouble with the data is told in the lines; Refusal is for a task that does not exist.
    """
    if name not in BENCHMARKS:
        raise Refusal(f"no task {name!r}; there are {', '.join(BENCHMARKS)}")
    the = BENCHMARKS[name]
    try:
        root = the.root(folder)
    except Refusal as refusal:
        return [f"{the.display}: {refusal}", the.where], False
    parts, problems = _read(the, root)
    counts = {split: the.count(split, part) for split, part in parts.items()}
    published = the.published(counts, root)
    problems += _differences(counts, published)
    lines = _table(counts, published)
    lines += [f"{the.display}: {line}" for line in (*problems, *the.notes(parts))]
    lines.append(the.where if problems else f"{the.display}: all counts are as published")
    return lines, not problems


def _read(the: Benchmark, root: Path) -> tuple[dict[str, Part], list[str]]:
    """The parts that can be read, and why the others cannot."""
    parts: dict[str, Part] = {}
    problems = []
    for split in SPLITS:
        try:
            parts[split] = the.read(root, split)
        except Refusal as refusal:
            problems.append(str(refusal).removesuffix(f"; {the.where}"))
    return parts, problems


def _differences(counts: Counts, published: Counts) -> list[str]:
    return [
        f"{split} has {counts[split][what]:,} {what}, published are {expected:,}"
        for split in counts
        for what, expected in published[split].items()
        if counts[split][what] != expected
    ]


def _table(counts: Counts, published: Counts) -> list[str]:
    rows: list[tuple[str, ...]] = [("part", "count", "found", "published")]
    for split in SPLITS:
        for what in {**published[split], **counts.get(split, {})}:
            numbers = (counts.get(split, {}).get(what), published[split].get(what))
            rows.append((split, what, *("-" if number is None else f"{number:,}" for number in numbers)))
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    return [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
