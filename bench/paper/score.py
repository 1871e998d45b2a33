"""Scores a file of outputs, a text a line, as the official scripts of E2E, WebNLG 2017 and XSUM score it.

    python bench/paper/score.py e2e    --outputs FILE --references FILE_OR_FOLDER [--out JSON]
    python bench/paper/score.py webnlg --outputs FILE --references FOLDER [--out JSON]
    python bench/paper/score.py xsum   --outputs FILE --references FILE_OR_FOLDER [--per-batch N] [--out JSON]

Seconds; METEOR takes half a minute and needs Java. References: of E2E testset_w_refs.csv, or a file with a reference a
line and a blank line between instances, spelt as the outputs are (the papers' are tokenised); of WebNLG the challenge's
folder of gold-*-cat-reference*.lex; of XSUM test.target, a summary a line. What cannot be scored ends in one line that
names the file and the row, with exit status 1, and nothing is written. The metrics, and how their numbers compare with
the official ones: e2e_metrics.py, webnlg_metrics.py, xsum_metrics.py.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import NOTHING, command
from bench.paper import e2e_metrics, runs, webnlg_metrics, xsum_metrics
from bench.paper.text_files import read_outputs, read_texts

PACKAGES = ("numpy", "pycocoevalcap", "rouge-score", "sacrebleu", "unidecode")


class Scored(NamedTuple):
    values: dict[str, dict[str, float | None]]  # of each metric, by column of the table
    notes: dict[str, str]  # of each metric: what computed it, or why it was not
    references: list[Path]  # the files that were read
    digits: dict[str, int]  # that the official script prints behind the point, where they are not four


def e2e(given: argparse.Namespace) -> Scored:
    file = e2e_metrics.references_file(given.references, given.outputs)
    instances = e2e_metrics.read_references(file)
    scores: dict[str, Any] = {**e2e_metrics.score(instances, read_outputs(given.outputs, file, len(instances)))}
    values = {metric: {"all": scores[metric]} for metric in e2e_metrics.METRICS}
    return Scored(values, dict(note.split(": ", 1) for note in scores["notes"]), [file], {})


def webnlg(given: argparse.Namespace) -> Scored:
    parts = webnlg_metrics.read_references(given.references)
    outputs = read_outputs(given.outputs, given.references, sum(map(len, parts.values())))
    values, notes = webnlg_metrics.score(parts, outputs)
    files = [file for part in parts for file in webnlg_metrics.reference_files(given.references, part)]
    return Scored(values, notes, files, {"BLEU": 2})


def xsum(given: argparse.Namespace) -> Scored:
    file = xsum_metrics.references_file(given.references)
    texts = read_texts(file)
    values, notes = xsum_metrics.score(texts, read_outputs(given.outputs, file, len(texts)), given.per_batch)
    return Scored(values, notes, [file], {})


TASKS: dict[str, Callable[[argparse.Namespace], Scored]] = {"e2e": e2e, "webnlg": webnlg, "xsum": xsum}


def table(scored: Scored) -> str:
    """A line for each metric: its values under their columns, and its note."""
    columns = list(dict.fromkeys(column for values in scored.values.values() for column in values))
    rows = [["", *columns]]
    for metric, values in scored.values.items():
        rows.append([metric, *(_shown(metric, value, scored.digits.get(metric, 4)) for value in values.values())])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    notes = ["", *scored.notes.values()]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]), note]).rstrip()
        for row, note in zip(rows, notes, strict=True)
    )


def _shown(metric: str, value: float | None, digits: int) -> str:
    if value is not None:
        return f"{value:.{digits}f}"
    return "needs Java" if metric == "METEOR" and not shutil.which("java") else "-"


def record(task: str, given: argparse.Namespace, scored: Scored) -> dict[str, Any]:
    """What is written: names of files and what was in them, no folder."""
    contents = {
        kind: {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        for kind, files in {"outputs": [given.outputs], "references": scored.references}.items()
    }
    return {"task": task, **contents, "scores": scored.values, "notes": scored.notes, **runs.provenance(PACKAGES)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Scores as the official scripts of a task compute them.")
    tasks = parser.add_subparsers(dest="task", required=True)
    for name in TASKS:
        task = tasks.add_parser(name)
        task.add_argument("--outputs", type=Path, required=True, metavar="FILE", help="a text a line, it may be blank")
        task.add_argument("--references", type=Path, required=True, metavar="PLACE", help="a file or a folder")
        task.add_argument("--out", type=Path, metavar="JSON", help="file to write scores, notes and versions to")
        if name == "xsum":
            task.add_argument("--per-batch", type=int, metavar="N", help="also the published mean over batches of N")
    given = parser.parse_args(arguments)
    if given.task == "xsum" and given.per_batch is not None and given.per_batch < 1:
        raise runs.Refusal(f"--per-batch {given.per_batch}: expected 1 or more documents")
    if given.out and (given.out.is_dir() or given.out.suffix != ".json"):
        raise runs.Refusal(f"--out {given.out}: expected the name of a file that ends in .json")
    return given


def run(arguments: Sequence[str] | None) -> None:
    given = parse(arguments)
    scored = TASKS[given.task](given)
    if given.out:
        runs.write_json(given.out, record(given.task, given, scored))
    print(table(scored))


def main(arguments: Sequence[str] | None = None) -> int:
    return command("score.py", lambda: run(arguments), NOTHING)


if __name__ == "__main__":
    sys.exit(main())
