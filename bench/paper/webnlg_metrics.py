"""BLEU, METEOR and TER of WebNLG 2017 outputs, as the challenge's scripts (in DART's copy) compute them.

Seconds, and half a minute more for METEOR. Of the system whose outputs DART ships (seen / unseen / all): BLEU
64.51 / 50.20 / 58.06, METEOR .4577 / .3975 / .4297, TER .3231 / .4414 / .3773, as there.

An output belongs to each entry of gold-old-cat, the seen categories, and then of gold-new-cat, the unseen ones; both
together are gold-all-cat. The .meteor and .ter files hold the texts of the .lex files, which alone are read. BLEU is
sacrebleu's, which agrees with multi-bleu.perl; its TER does not agree with TERCOM (ter.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.paper import meteor, ter
from bench.paper.packages import named, needed
from bench.paper.runs import Refusal
from bench.paper.text_files import read_lines, read_texts

PARTS = {"seen": "old", "unseen": "new"}  # as the papers and as the challenge's files call them, in the outputs' order
COUNTED = 3  # references of an entry; a few have more

Entry = Sequence[str]  # its references, COUNTED of them; of an entry with fewer the last ones are blank


def reference_files(folder: Path, part: str) -> list[Path]:
    return [folder / f"gold-{PARTS[part]}-cat-reference{i}.lex" for i in range(COUNTED)]


def read_references(folder: Path) -> dict[str, list[Entry]]:
    """The entries of each part, from the challenge's files."""
    parts: dict[str, list[Entry]] = {}
    for part in PARTS:
        paths = reference_files(folder, part)
        texts = [read_texts(paths[0]), *map(read_lines, paths[1:])]
        for path, lines in zip(paths, texts, strict=True):
            if len(lines) != len(texts[0]):
                raise Refusal(f"{path}:{len(lines)}: ends there; {paths[0]} has {len(texts[0])} lines")
        parts[part] = list(zip(*texts, strict=True))
    return parts


def tokens(text: str) -> list[str]:
    """Lower-cased ASCII, split at each character that is no letter, digit or underscore: what all metrics see."""
    plain = needed("unidecode", "unidecode").unidecode(text).lower()
    return " ".join(re.split(r"(\W)", plain)).split()


def score(
    references: Mapping[str, Sequence[Entry]], outputs: Sequence[str]
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """For each metric its value by column, BLEU of 100, METEOR of 1, TER in edits a word; and what computed it.

    `outputs` has a text, which may be empty, for each entry of the parts, in their order.
    """
    entries = [entry for part in PARTS for entry in references[part]]
    written = [[ref.lower().split() for ref in entry if ref] for entry in entries]
    hypotheses = [tokens(text) for text in outputs]
    spelt = [" ".join(words) for words in hypotheses]
    seen = len(references["seen"])
    rows = {"seen": slice(seen), "unseen": slice(seen, None), "all": slice(None)}

    edits = ter.statistics(written, hypotheses)
    found: dict[str, dict[str, float | None]] = {
        "BLEU": {column: bleu(entries[part], spelt[part]) for column, part in rows.items()},
        "METEOR": dict.fromkeys(rows),
        "TER": {column: ter.together(edits[part]) for column, part in rows.items()},
    }
    spelling = f"over texts spelt by {named('unidecode')}"
    notes = {"BLEU": f"{named('sacrebleu')} {spelling}", "METEOR": meteor.source(), "TER": f"own code {spelling}"}
    try:
        with meteor.running() as program:
            matches = meteor.statistics(program, written, hypotheses)
            found["METEOR"] = {column: meteor.together(program, matches[part]) for column, part in rows.items()}
    except RuntimeError as error:
        notes["METEOR"] = f"not computed: {error}"
    return found, notes


def bleu(references: Sequence[Entry], hypotheses: Sequence[str]) -> float:
    """BLEU-4 of 100, unsmoothed, of texts whose tokens stand apart: what Moses' multi-bleu.perl -lc prints.

    A blank reference counts, as one of length 0: it is nearest to a hypothesis of less than half of another's length.
    """
    metric = needed("sacrebleu.metrics.bleu", "sacrebleu").BLEU(
        lowercase=True, tokenize="none", smooth_method="none", force=True
    )
    return float(metric.corpus_score(hypotheses, [list(column) for column in zip(*references, strict=True)]).score)
