"""What of the vision data is there, what is missing and where it is to be had, before hours are spent on it."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.paper.runs import Refusal
from bench.paper.visual import fgvc, vtab
from bench.paper.visual.data import Files

SUITES: dict[str, Mapping[str, "fgvc.Set | vtab.Benchmark"]] = {fgvc.SUITE: fgvc.SETS, vtab.SUITE: vtab.TASKS}
ARCHIVES: dict[str, dict[str, int]] = {  # of a set or a suite: bytes of the files that are served
    "cub200": {"CUB_200_2011.tgz": 1_150_585_339},
    "dogs": {"images.tar": 793_579_520},
    "cars": {"car_ims.tgz": 1_956_628_579, "stanford-cars.tgz": 1_957_803_273},
    vtab.SUITE: {"vtab-1k.zip": 4_660_000_000},
}
ROUNDED = {"vtab-1k.zip": 5_000_000}  # bytes by which the number above may be off


@dataclass(frozen=True)
class Folders:
    """`images`: a folder for all sets; `splits`: that of FGVC's lists (None: beside the images)."""

    images: Path
    splits: Path | None = None


@dataclass(frozen=True)
class Count:
    """Of one part; None: not known, as its list cannot be read (or images were not decoded: `damaged`)."""

    expected: int
    found: int | None = None
    classes: int | None = None
    missing: int | None = None
    damaged: int | None = None


@dataclass(frozen=True)
class Row:
    """Of one set: `problems` in words, a line each, none if all is well."""

    suite: str
    name: str
    display: str
    classes: int
    parts: Mapping[str, Count]
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    where: Sequence[str] = ()  # where the data are to be had, and their licence


def check(suite: str, folders: Folders, names: Sequence[str] = (), deep: bool = False) -> list[Row]:
    """A row for each set of `suite` ("fgvc" or "vtab") or of `names` in it.

    `deep` decodes every image (minutes to an hour) and shows how far it is on stderr. Trouble with the data is told
    in the rows; Refusal is for a suite or a name that does not exist.
    """
    if suite not in SUITES:
        raise Refusal(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    one = {fgvc.SUITE: _fgvc, vtab.SUITE: _vtab}[suite]
    known = {fgvc.SUITE: fgvc.known, vtab.SUITE: vtab.known}[suite]
    chosen = list(names or SUITES[suite])
    for name in chosen:
        known(name)
    return [one(name, folders, deep) for name in chosen]


def well(rows: Iterable[Row]) -> bool:
    return not any(row.problems for row in rows)


def table(rows: Sequence[Row]) -> str:
    """A line a part, then what is wrong and where the sets that lack something are to be had."""
    head = ("set", "part", "images", "expected", "classes", "expected", "missing", "damaged")
    lines = [head]
    for row in rows:
        for part, count in row.parts.items():
            numbers = (count.found, count.expected, count.classes, row.classes, count.missing, count.damaged)
            lines.append((row.display, part, *("-" if number is None else f"{number:,}" for number in numbers)))
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    text = [_line(line, widths) for line in lines]
    for row in rows:
        words = (*row.problems, *row.notes, *(row.where if row.problems else ()))
        text += [f"{row.display}: {line}" for line in words]
    bad = sum(bool(row.problems) for row in rows)
    text.append(f"{len(rows) - bad} of {len(rows)} sets are whole" + ("" if bad == 0 else f", {bad} are not"))
    return "\n".join(text) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join((*left, *right)).rstrip()


def _fgvc(name: str, folders: Folders, deep: bool) -> Row:
    the, problems = fgvc.SETS[name], _Problems()
    splits = folders.splits or folders.images
    lists: dict[str, Path] = {}
    root = None
    with problems:
        found = fgvc.splits_folder(name, splits)
        lists = {part: found / f"{part}.json" for part in fgvc.PARTS}
    rows: dict[str, list[tuple[int, str, fgvc.Id]]] = {}
    for part, path in lists.items():
        with problems:
            rows[part] = fgvc.entries(path)
    first = next((path for entries in rows.values() for _, path, _ in entries), "")
    with problems:
        root = fgvc.images_folder(name, folders.images, first)
    parts = {part: Count(the.counts[part]) for part in fgvc.PARTS}
    for part, entries in rows.items():
        files = fgvc.files(lists[part], root or folders.images, [(row, path, 0) for row, path, _ in entries])
        classes = len({found for _, _, found in entries})
        parts[part] = _count(the, the.counts[part], files, classes, root is not None, deep, problems)
    notes: Sequence[str] = ()
    with problems:  # and what shows only where lists are laid side by side
        notes = fgvc.read(name, splits, folders.images).notes
    places = {folders.images, splits, *(path.parent for path in lists.values()), *([root, root.parent] if root else [])}
    where = (f"images: {the.where}; licence: {the.licence}", f"lists: {fgvc.SPLITS}")
    notes = (*notes, *archives(name, places))
    return Row(fgvc.SUITE, name, the.display, the.classes, parts, problems.lines, notes, where)


def _vtab(name: str, folders: Folders, deep: bool) -> Row:
    the, problems = vtab.TASKS[name], _Problems()
    folder = folders.images / name
    parts = {part: Count(the.counts[part]) for part in vtab.LISTS}
    for part, file in vtab.LISTS.items() if folder.is_dir() else ():
        with problems:
            files = vtab.files(folder / file, folder, vtab.entries(folder / file, the.classes))
            classes = len(set(files.labels.tolist()))
            parts[part] = _count(the, the.counts[part], files, classes, True, deep, problems)
    notes: Sequence[str] = ()
    with problems:
        notes = vtab.read(name, folders.images).notes
    where = (f"{vtab.WHERE}; licence: {vtab.LICENCE}",)
    notes = (*notes, *archives(vtab.SUITE, {folders.images, folders.images.parent}))
    return Row(vtab.SUITE, name, the.display, the.classes, parts, problems.lines, notes, where)


class _Problems:
    """A block whose refusal becomes a line, once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, Refusal):
            self.add(str(error))
        return isinstance(error, Refusal)


def _count(
    the: "fgvc.Set | vtab.Benchmark", expected: int, files: Files, classes: int, there: bool, deep: bool,
    problems: _Problems,
) -> Count:  # fmt: skip
    """Counts `files`, and adds to `problems`; `there`: the folder of images exists."""
    with problems:
        fgvc.counted(Path(files.source), len(files), expected)
    if not there:
        return Count(expected, len(files), classes)
    missing = [at for at, path in enumerate(files.paths) if not (files.root / path).is_file()]
    if missing:
        first = f"{files.source}, row {files.rows[missing[0]]}: {files.root / files.paths[missing[0]]}: no such file"
        problems.add(f"{first} ({len(missing):,} of {len(files):,} are missing)")
    if not deep:
        return Count(expected, len(files), classes, len(missing))
    shown = f"{the.display}, {Path(files.source).name}"
    damaged = list(_damaged(shown, files, np.setdiff1d(np.arange(len(files)), missing)))
    if damaged:
        problems.add(f"{damaged[0]} ({len(damaged):,} of {len(files):,} are damaged)")
    return Count(expected, len(files), classes, len(missing), len(damaged))


def _damaged(shown: str, files: Files, rows: Sequence[int]) -> Iterator[str]:
    """The refusals of the images that do not decode; a line of progress on stderr."""
    for done, at in enumerate(rows, 1):
        try:
            files.image(int(at))
        except Refusal as refusal:
            yield str(refusal)
        if done % 500 == 0 or done == len(rows):
            end = "\n" if done == len(rows) else ""
            print(f"\r{shown}: {done:,} of {len(rows):,} decoded", end=end, file=sys.stderr, flush=True)


def archives(of: str, places: Iterable[Path]) -> list[str]:
    """A line for each archive `of` a set or a suite that lies in `places`, with its size beside the published one."""
    lines = []
    for name, expected in ARCHIVES.get(of, {}).items():
        for path in sorted(place / name for place in set(places)):
            if path.is_file():
                size = path.stat().st_size
                whole = abs(size - expected) <= ROUNDED.get(name, 0)
                words = "as published" if whole else f"published are {expected:,}: cut short, or another archive"
                lines.append(f"{path}: {size:,} bytes, {words}")
    return lines
