"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of E2E outputs, as the challenge's measure_scores.py computes them.

    python bench/paper/e2e_metrics.py REFERENCES HYPOTHESES

Seconds. Files as in e2e-metrics: a reference a line with a blank line between instances (no blank line at all: one
reference each); a hypothesis a line. On e2e-metrics' own example: BLEU .7203, NIST 7.7889, METEOR .4801, ROUGE-L .7910,
CIDEr 2.3039, as there. The notes say what computed each score. Libraries are used where they agree with the official
scripts: sacrebleu does, nltk's NIST does not (6.2219 on the example), rouge-score has no form of this ROUGE-L.
Differs from the official scripts: the tokenizer in front of METEOR, ROUGE-L and CIDEr is ours (ptb_tokenize.py), so
that only METEOR needs Java.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import meteor
from caption_metrics import cider, rouge_l
from ptb_tokenize import tokenize
from runs import Refusal

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


class Scores(TypedDict):
    BLEU: float | None  # of 1
    NIST: float | None
    METEOR: float | None  # of 1
    ROUGE_L: float | None  # of 1
    CIDEr: float | None  # of 10
    notes: list[str]  # for each metric: what computed it, or why it is None


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:  # a copy beside the code has no version
        return name


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
        import ngram_metrics  # here, so that the others can be had without sacrebleu
    except ImportError as error:
        notes["BLEU"] = notes["NIST"] = f"not computed: {error} (pip install sacrebleu)"
    else:
        found["BLEU"] = ngram_metrics.bleu(references, hypotheses)
        found["NIST"] = ngram_metrics.nist(references, hypotheses)
        notes["BLEU"] = f"{_package('sacrebleu')}, its counts by mteval-v13a's formula"
        notes["NIST"] = f"own code over the tokens of {_package('sacrebleu')}"

    refs = [[tokenize(text) for text in texts] for texts in references]
    hyps = [tokenize(text) for text in hypotheses]
    found["ROUGE_L"], notes["ROUGE_L"] = rouge_l(refs, hyps), "own code"
    found["CIDEr"], notes["CIDEr"] = cider(refs, hyps), "own code"
    if reason := meteor.missing():
        notes["METEOR"] = f"not computed: {reason}"
    else:
        try:
            found["METEOR"] = meteor.meteor(refs, hyps)
            notes["METEOR"] = f"METEOR 1.5 (Java) out of {_package('pycocoevalcap')}"
        except RuntimeError as error:
            notes["METEOR"] = f"not computed: {error}"
    return Scores(**found, notes=[f"{metric}: {notes[metric]}" for metric in METRICS])  # type: ignore[typeddict-item]


def _lines(path: Path) -> list[str]:
    """The file's lines, stripped."""
    try:
        rows = path.read_bytes().splitlines()
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}") from None
    lines = []
    for row, data in enumerate(rows, 1):
        try:
            lines.append(data.decode("utf-8-sig" if row == 1 else "utf-8").strip())
        except UnicodeDecodeError as error:
            raise Refusal(f"{path}:{row}: not UTF-8 (byte {data[error.start]:#04x})") from None
    if not any(lines):
        raise Refusal(f"{path}: no text in it")
    return lines


def read_references(path: Path) -> list[list[str]]:
    """Instances separated by one blank line; in a file without any, each line is an instance."""
    lines = _lines(path)
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


def read_hypotheses(path: Path, references: Path, expected: int) -> list[str]:
    """One text for each of the `expected` instances of the file `references`; a blank line is an empty text."""
    lines = _lines(path)
    if len(lines) < expected:
        raise Refusal(f"{path}:{len(lines)}: ends after {len(lines)} hypotheses; {references} has {expected} instances")
    if len(lines) > expected:
        raise Refusal(f"{path}:{expected + 1}: one hypothesis too many; {references} has {expected} instances")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="BLEU, NIST, METEOR, ROUGE-L and CIDEr as e2e-metrics computes them.")
    parser.add_argument("references", type=Path, help="a reference a line, a blank line between instances")
    parser.add_argument("hypotheses", type=Path, help="a hypothesis a line")
    paths = parser.parse_args(arguments)
    try:
        references = read_references(paths.references)
        scores = score(references, read_hypotheses(paths.hypotheses, paths.references, len(references)))
    except Refusal as error:
        print(error, file=sys.stderr)
        return 1
    for metric, note in zip(METRICS, scores["notes"], strict=True):
        value = scores[metric]  # type: ignore[literal-required]
        print(f"{metric:8}{'-' if value is None else f'{value:.4f}':>8}  {note.partition(': ')[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
