"""XSUM: a BBC article to its one-sentence summary, from either of the two forms in which it is had.

"lines": train, val and test as NAME.source and NAME.target, a document a line: the archive that the originals read.
"rows": train, validation and test with the columns document and summary, as JSON lines or parquet: the set that is
served today, made anew from the same articles, with line breaks inside a document; they become spaces here.
Its script drops the page's "Share this with" lines, after which nothing is left of some articles (36369226 of train,
EdinburghNLP/XSum#29): such rows are left out. The originals' code stops at an empty line, which is refused here too.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from bench.paper.language.data import SPLITS, Part, Record, Task, described, lines, opened, root_of, words_of
from bench.paper.runs import Refusal, digest

NAME, DISPLAY = "xsum", "XSUM"
LINES, ROWS = "lines", "rows"
NAMES = {"train": ("train",), "dev": ("validation", "val"), "test": ("test",)}
STEMS = {"train": "train", "dev": "val", "test": "test"}  # of the lines
COLUMNS = ["document", "summary"]
ENDINGS = (".jsonl", ".json", ".parquet")
FOLDERS = ("", "data", "default")  # where a copy of the set has its files
EXPECTED = "train.source, train.target, ... or train.jsonl, ... or train-*.parquet, ..."
WHERE = (
    "XSUM: https://cdn-datasets.huggingface.co/summarization/xsum.tar.gz (lines) or "
    "https://huggingface.co/datasets/EdinburghNLP/xsum (rows); licence: none is stated, the articles are the BBC's"
)
MOST = 2**30  # bytes of a file: the largest has about 480 million
PUBLISHED: dict[str, dict[str, dict[str, int]]] = {
    # as counted by users: train and test in huggingface/datasets#672, val in XiangLi1999/PrefixTuning#20
    LINES: {"train": {"rows": 204_017}, "dev": {"rows": 11_327}, "test": {"rows": 11_333}},
    # identifiers in XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json of github.com/EdinburghNLP/XSum, and the set's card
    ROWS: {"train": {"rows": 204_045}, "dev": {"rows": 11_332}, "test": {"rows": 11_334}},
}
SHARD = re.compile(r"-(\d+)-of-(\d+)$")


def load(folder: str) -> Task:
    found = root(folder)
    parts = {split: read(found, split) for split in SPLITS}
    paths = [path for split in SPLITS for path in files(found, split)]
    return Task(NAME, described(DISPLAY, parts, "documents"), digest(*paths), **parts, notes=notes(parts))


def root(folder: str | Path) -> Path:
    return root_of(folder, NAME, EXPECTED)


def form(folder: Path) -> str:
    return LINES if any((folder / f"{stem}.source").exists() for stem in STEMS.values()) else ROWS


def files(folder: Path, split: str) -> list[Path]:
    """The files of a split that are read; of the first form both, whether there or not."""
    if form(folder) == LINES:
        return [folder / f"{STEMS[split]}.{column}" for column in ("source", "target")]
    for place in FOLDERS:
        for ending in ENDINGS:
            for name in NAMES[split]:
                if found := _shards(folder / place, name, ending):
                    return found
    if any(folder.glob("*/*.arrow")):
        raise Refusal(f"{folder}: holds Arrow files; make JSON lines: dataset[split].to_json(split + '.jsonl')")
    raise Refusal(f"{folder}: has no file of {split}; expected {EXPECTED}; {WHERE}")


def _shards(folder: Path, name: str, ending: str) -> list[Path]:
    if (whole := folder / f"{name}{ending}").exists():
        return [whole]
    paths = sorted(folder.glob(f"{name}-*{ending}"))
    found = [(path, match) for path in paths if (match := SHARD.search(path.stem))]
    for expected, (_, match) in enumerate(found):
        number, total = int(match[1]), int(match[2])
        if number != expected or total != len(found):
            raise Refusal(f"{folder}: of {total:,} files {name}-*{ending} {len(found):,} are there; {WHERE}")
    return [path for path, _ in found]


def read(folder: Path, split: str) -> Part:
    """The documents of one split, each of which is decoded: the originals do not look for equal ones."""
    paths = files(folder, split)
    rows = list(_lines(*paths) if form(folder) == LINES else (row for path in paths for row in _rows(path)))
    records = [record for record in rows if record.source.strip()]
    if not records:
        raise Refusal(f"{paths[0]}: no documents")
    return Part(records, distinct=False, left_out=len(rows) - len(records))


def _lines(source: Path, target: Path) -> Iterator[Record]:
    documents, summaries = (list(lines(path, MOST, WHERE)) for path in (source, target))
    if len(documents) != len(summaries):
        raise Refusal(f"{target}: has {len(summaries):,} lines, {source.name} has {len(documents):,}; expected as many")
    for (number, document), (_, summary) in zip(documents, summaries, strict=True):
        for path, line in ((source, document), (target, summary)):
            if not line.strip():
                raise Refusal(f"{path}, line {number}: the line is empty")
        yield Record(document, (summary,), (summary,), f"{source.name}, line {number}")


def _rows(path: Path) -> Iterator[Record]:
    unit, rows = ("row", _parquet(path)) if path.suffix == ".parquet" else ("line", _json_lines(path))
    for number, row in rows:
        try:
            document = _one_line(words_of(row, "document", "the row", empty=True))
            summary = _one_line(words_of(row, "summary", "the row"))
        except ValueError as error:
            raise Refusal(f"{path}, {unit} {number}: {error}") from None
        yield Record(document, (summary,), (summary,), f"{path.name}, {unit} {number}")


def _one_line(words: str) -> str:
    return words.replace("\r\n", "\n").replace("\n", " ")


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in lines(path, MOST, WHERE):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"{path}, line {number}: not JSON ({error}); expected an object a line") from None


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    pyarrow = _pyarrow(path)
    with opened(path, MOST, WHERE) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if missing := [name for name in COLUMNS if name not in table.schema_arrow.names]:
                raise Refusal(f"{path}: has no column {' or '.join(missing)}")
            rows = (row for batch in table.iter_batches(columns=COLUMNS) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
        except Refusal:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise Refusal(f"{path}: not readable as parquet ({str(error).partition(chr(10))[0]})") from None


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise Refusal(f"{path}: needs pyarrow (pip install pyarrow), or JSON lines of the same columns") from None
    return pyarrow


def count(split: str, part: Part) -> dict[str, int]:
    return {"rows": len(part.records) + part.left_out}


def published(counts: dict[str, dict[str, int]], folder: Path) -> dict[str, dict[str, int]]:
    """Of the form in `folder`, unless `counts` are those of the other: one may be written as the other."""
    return next((known for known in PUBLISHED.values() if known == counts), PUBLISHED[form(folder)])


def notes(parts: dict[str, Part]) -> list[str]:
    return [
        f"rows of {split} that have no document and are left out: {part.left_out:,}"
        for split, part in parts.items()
        if part.left_out
    ]
