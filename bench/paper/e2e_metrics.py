"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of E2E outputs, as the challenge's measure_scores.py computes them.

Seconds. On e2e-metrics' own example: BLEU .7203, NIST 7.7889, METEOR .4801, ROUGE-L .7910, CIDEr 2.3039, as there.
The command is score.py. The notes say what computed each score. Libraries are used where they agree with the official
scripts: sacrebleu does, nltk's NIST does not (6.2219 on the example), rouge-score has no form of this ROUGE-L.
Differs from the official scripts: the tokenizer in front of METEOR, ROUGE-L and CIDEr is ours (ptb_tokenize.py), so
that only METEOR needs Java.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from bench.paper import meteor
from bench.paper.caption_metrics import cider, rouge_l
from bench.paper.packages import named
from bench.paper.ptb_tokenize import tokenize
from bench.paper.runs import Refusal
from bench.paper.text_files import read_lines

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


class Scores(TypedDict):
    BLEU: float | None  # of 1
    NIST: float | None
    METEOR: float | None  # of 1
    ROUGE_L: float | None  # of 1
    CIDEr: float | None  # of 10
    notes: list[str]  # for each metric: what computed it, or why it is None


def _require_texts(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
    if not len(references) == len(hypotheses) > 0:
        raise ValueError(f"hypotheses has {len(hypotheses)} texts for {len(references)} references, expected one each")
    for i, (refs, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        if isinstance(refs, str) or not refs:
            raise ValueError(f"references[{i}] is {refs!r}, expected a list of one text or more")
        if not isinstance(hypothesis, str):
            raise ValueError(f"hypotheses[{i}] is {hypothesis!r}, expected a text")
        for j, text in enumerate(refs):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"references[{i}][{j}] is {text!r}, expected a text that is not blank")


def score(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Scores:
    """Scores of one system: a hypothesis (which may be empty) and a list of references for each instance.

    A metric that cannot be computed here is None and its note says why.
    """
    _require_texts(references, hypotheses)
    notes = {}
    found: dict[str, float | None] = dict.fromkeys(METRICS)
    try:
        from bench.paper import ngram_metrics  # here, so that the others can be had without sacrebleu
    except ImportError as error:
        notes["BLEU"] = notes["NIST"] = f"not computed: {error} (pip install sacrebleu)"
    else:
        found["BLEU"] = ngram_metrics.bleu(references, hypotheses)
        found["NIST"] = ngram_metrics.nist(references, hypotheses)
        notes["BLEU"] = f"{named('sacrebleu')}, its counts by mteval-v13a's formula"
        notes["NIST"] = f"own code over the tokens of {named('sacrebleu')}"

    refs = [[tokenize(text) for text in texts] for texts in references]
    hyps = [tokenize(text) for text in hypotheses]
    for metric, computed in (("ROUGE_L", rouge_l), ("CIDEr", cider)):
        try:
            found[metric], notes[metric] = computed(refs, hyps), named("pycocoevalcap")
        except ImportError as error:
            notes[metric] = f"not computed: {error} (pip install --no-deps pycocoevalcap)"
    try:
        found["METEOR"], notes["METEOR"] = meteor.meteor(refs, hyps), meteor.source()
    except RuntimeError as error:
        notes["METEOR"] = f"not computed: {error}"
    return Scores(**found, notes=[f"{metric}: {notes[metric]}" for metric in METRICS])  # type: ignore[typeddict-item]


def references_file(place: Path, outputs: Path) -> Path:
    """`place`, or what the folder `place` holds: the challenge's table, or else the one text file beside `outputs`."""
    if not place.is_dir():
        return place
    if (table := place / "testset_w_refs.csv").is_file():
        return table
    texts = sorted(path for path in place.glob("*.txt") if not (outputs.exists() and path.samefile(outputs)))
    if len(texts) != 1:
        found = ", ".join(path.name for path in texts) or "none"
        raise Refusal(
            f"{place}: expected testset_w_refs.csv, or one .txt of references, and found {found}; name the file"
        )
    return texts[0]


def read_references(path: Path) -> list[list[str]]:
    """References of each instance: of a .csv with the columns mr and ref, or of a text file, a reference a line.

    In the table neighbouring rows with one mr are an instance. In the text file a blank line separates instances;
    where there is none, each line is an instance.
    """
    return _of_table(path) if path.suffix.lower() == ".csv" else _of_lines(path)


def _of_table(path: Path) -> list[list[str]]:
    rows = csv.reader(read_lines(path), strict=True)
    instances: list[list[str]] = []
    last = None
    try:
        header = [name.lower() for name in next(rows)]
        if "mr" not in header or "ref" not in header:
            raise Refusal(f"{path}:1: expected the columns mr and ref, found {','.join(header)[:60]!r}")
        for row in filter(None, rows):
            if len(row) != len(header):
                raise Refusal(f"{path}:{rows.line_num}: expected {len(header)} columns, found {len(row)}")
            mr, reference = row[header.index("mr")], row[header.index("ref")].strip()
            if not reference:
                raise Refusal(f"{path}:{rows.line_num}: the reference is blank")
            if mr != last:
                instances.append([])
            instances[-1].append(reference)
            last = mr
    except csv.Error as error:
        raise Refusal(f"{path}:{rows.line_num}: {error}") from None
    if not instances:
        raise Refusal(f"{path}: no rows after the header")
    return instances


def _of_lines(path: Path) -> list[list[str]]:
    lines = read_lines(path)
    if not lines[-1]:  # the last instance may be closed by a blank line too
        lines.pop()
    if "" not in lines:
        return [[line] for line in lines]
    instances: list[list[str]] = [[]]
    for row, line in enumerate(lines, 1):
        if line:
            instances[-1].append(line)
        elif instances[-1]:
            instances.append([])
        else:
            raise Refusal(f"{path}:{row}: a second blank line; instance {len(instances)} has no reference")
    if not instances[-1]:
        raise Refusal(f"{path}:{len(lines) + 1}: a second blank line; instance {len(instances)} has no reference")
    return instances
