"""E2E NLG as a task: the records of e2e_data.py, and how near its test set is to what is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.paper import e2e_data
from bench.paper.language.data import SPLITS, Pair, Part, Record, Task, root_of

NAME, DISPLAY = "e2e", "E2E NLG"
WHERE = "E2E NLG: https://github.com/tuetschek/e2e-dataset; licence: CC BY-SA 4.0"
PUBLISHED = {
    "train": {"rows": 42_061, "distinct sources": 4_862},
    "dev": {"rows": 4_672, "distinct sources": 547},
    "test": {"rows": 4_693, "distinct sources": 630},
}
NAMES = ("name", "near")


def load(folder: str | None) -> Task:
    """The records from `folder`, as e2e_data.load finds them; the task of generated ones is called "generated"."""
    found = e2e_data.load(folder)
    parts = {split: part(getattr(found, split), e2e_data.FILES[split]) for split in SPLITS}
    notes = () if found.source == e2e_data.GENERATED else (str(overlap(parts["train"], parts["test"])),)
    return Task(found.source, found.where, found.sha256, **parts, notes=notes or (found.where,))


def root(folder: str | Path) -> Path:
    return root_of(folder, NAME, ", ".join(e2e_data.FILES.values()))


def read(folder: Path, split: str) -> Part:
    file = e2e_data.FILES[split]
    return part(e2e_data.read_csv(folder / file), file)


def part(pairs: Sequence[Pair], file: str) -> Part:
    """The originals' targets end in a space, which their scripts take off references."""
    return Part([
        Record(source, (f"{reference} ",), (reference,), f"{file}, row {row}")
        for row, (source, reference) in enumerate(pairs, 1)
    ])  # fmt: skip


def count(split: str, part: Part) -> dict[str, int]:
    return {"rows": len(part.records), "distinct sources": len(part.prompts())}


@dataclass(frozen=True)
class Overlap:
    """Test sources that also occur in train; `bare` ones are without name and near, and each is counted once."""

    sources: int
    in_train: int
    bare: int
    bare_in_train: int
    with_bare_in_train: int  # of `sources`

    def __str__(self) -> str:
        return (
            f"{self.in_train:,} of the {self.sources:,} distinct test sources occur in train; without name and near "
            f"{self.bare:,} are distinct, of which {self.bare_in_train:,} occur in train "
            f"({self.with_bare_in_train:,} of the {self.sources:,} sources)"
        )


def overlap(train: Part, test: Part) -> Overlap:
    trained = {record.source for record in train.records}
    trained_bare = {bare(source) for source in trained}
    sources = {record.source for record in test.records}
    bared = [bare(source) for source in sources]
    return Overlap(
        sources=len(sources),
        in_train=len(sources & trained),
        bare=len(set(bared)),
        bare_in_train=len(set(bared) & trained_bare),
        with_bare_in_train=sum(source in trained_bare for source in bared),
    )


def bare(source: str) -> str:
    """A linearised source without the slots that hold names of places."""
    return " | ".join(slot for slot in source.split(" | ") if slot.partition(" : ")[0] not in NAMES)
