"""WebNLG 2017 (the challenge's version): RDF triples to text, from the JSON that Li and Liang's code reads.

An entry's source is ``" | subject : property : object"`` for each triple, names as they are, and no text is stripped.
Training keeps texts whose comment is "good"; outputs are scored against all. Test entries of the five categories that
train lacks are "unseen".
"""

import json
from collections.abc import Sequence
from pathlib import Path

from bench.paper.language.data import SPLITS, Part, Record, Task, described, list_of, root_of, text, words_of
from bench.paper.runs import Refusal, digest

NAME, DISPLAY = "webnlg", "WebNLG 2017"
FILES = {"train": "train.json", "dev": "dev.json", "test": "test.json"}
WHERE = (
    "WebNLG 2017: data/webnlg_challenge_2017 of https://github.com/XiangLi1999/PrefixTuning; licence: CC BY-NC-SA 4.0"
)
MOST = 2**28  # bytes of a file: train.json has 21 million
PUBLISHED: dict[str, dict[str, int]] = {
    "train": {"entries": 6_940, "good texts": 18_025},
    "dev": {"entries": 872, "good texts": 2_258},
    "test": {"entries": 1_862, "seen entries": 971, "unseen entries": 891},
}
SEEN = (
    "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University",
    "WrittenWork",
)  # fmt: skip
UNSEEN = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
BAR = " | "
Triple = tuple[str, str, str]  # subject, property, object


def load(folder: str, entry_zero_quirk: bool = False) -> Task:
    """The three parts from `folder`; `entry_zero_quirk`: see `read`."""
    found = root(folder)
    parts = {split: read(found, split, entry_zero_quirk) for split in SPLITS}
    notes = ("the first entry is decoded from triples without bars, as by the original's code",)
    return Task(
        NAME,
        described(DISPLAY, parts, "entries"),
        digest(*(found / file for file in FILES.values())),
        **parts,
        notes=notes if entry_zero_quirk else (),
    )


def root(folder: str | Path) -> Path:
    return root_of(folder, NAME, ", ".join(FILES.values()))


def read(folder: Path, split: str, entry_zero_quirk: bool = False) -> Part:
    """The entries of one file.

    `entry_zero_quirk`: the first is decoded from its triples without any bar, as gpt2/run_generation.py of the
    originals does, which asks for the number of the entry where it means that of the triple.
    """
    path = folder / FILES[split]
    records = []
    for at, entry in enumerate(_entries(path)):
        try:
            records.append(_record(entry, str(at + 1), f"{path.name}, entry {at + 1}", entry_zero_quirk and at == 0))
        except ValueError as error:
            raise Refusal(f"{path}, entry {at + 1}: {error}") from None
    return Part(records)


def _entries(path: Path) -> list[object]:
    try:
        return list_of(json.loads(text(path, MOST, WHERE)), "entries", "the file")
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not WebNLG's JSON ({error}); {WHERE}") from None


def _record(entry: object, key: str, row: str, without_bars: bool) -> Record:
    """ValueError, in words, for an entry that lacks something."""
    if not isinstance(entry, dict) or list(entry) != [key]:
        raise ValueError(f"expected an object with the one key {key!r}")
    fields, what = entry[key], "the entry"
    triples = [_triple(triple, at) for at, triple in enumerate(list_of(fields, "modifiedtripleset", what), 1)]
    texts = [_text(one, at) for at, one in enumerate(list_of(fields, "lexicalisations", what), 1)]
    return Record(
        source=linearise(triples),
        targets=tuple(words for words, good in texts if good),
        references=tuple(words for words, _ in texts),
        row=row,
        category=words_of(fields, "category", what),
        prompt=linearise(triples, bar="") if without_bars else None,
    )


def _triple(triple: object, at: int) -> Triple:
    subject, name, value = (words_of(triple, key, f"triple {at}") for key in ("subject", "property", "object"))
    return subject, name, value


def _text(lexicalisation: object, at: int) -> tuple[str, bool]:
    """The text, and whether it is marked as good."""
    what = f"lexicalisation {at}"
    return words_of(lexicalisation, "lex", what), words_of(lexicalisation, "comment", what, empty=True) == "good"


def linearise(triples: Sequence[Triple], bar: str = BAR) -> str:
    return "".join(bar + " : ".join(triple) for triple in triples)


def seen(category: str | None) -> bool:
    return category in SEEN


def count(split: str, part: Part) -> dict[str, int]:
    entries = {"entries": len(part.records), "distinct sources": len(part.prompts())}
    if split != "test":
        return {**entries, "good texts": len(part.pairs())}
    known = sum(seen(record.category) for record in part.records)
    return {**entries, "seen entries": known, "unseen entries": len(part.records) - known}
