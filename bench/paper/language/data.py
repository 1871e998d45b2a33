"""What a language task is: parts of records, for training as pairs and for decoding as prompts; and how files are read.

Readers make a task, encode.py and training take it.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bench.paper.runs import Refusal

TRAIN, DEV, TEST = SPLITS = ("train", "dev", "test")
Pair = tuple[str, str]  # source, target


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file: a source, the texts that training learns and those that outputs are scored against."""

    source: str
    targets: tuple[str, ...]
    references: tuple[str, ...]
    row: str  # the file's name and where in it
    category: str | None = None
    prompt: str | None = None  # what is decoded from, where that is not the source


@dataclass(frozen=True, slots=True)
class Prompt:
    source: str
    references: tuple[str, ...]
    category: str | None = None


@dataclass(frozen=True)
class Part:
    """The records of one split.

    `distinct`: decoding meets each prompt once, with the references of all its records. `left_out`: rows of the files
    that no record stands for.
    """

    records: Sequence[Record]
    distinct: bool = True
    left_out: int = 0

    def pairs(self) -> list[Pair]:
        return [(record.source, target) for record in self.records for target in record.targets]

    def prompts(self) -> list[Prompt]:
        """In the order of first appearance; a prompt has the category of its first record."""
        found = [Prompt(record.prompt or record.source, record.references, record.category) for record in self.records]
        return merged(found) if self.distinct else found


def merged(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those of one source as one."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.source, []).append(prompt)
    return [
        Prompt(source, tuple(text for prompt in group for text in prompt.references), group[0].category)
        for source, group in groups.items()
    ]


@dataclass(frozen=True)
class Task:
    name: str
    where: str  # one line for the reader
    sha256: str  # of the files that were read
    train: Part
    dev: Part
    test: Part
    notes: Sequence[str] = ()  # for the report: what differs from the published data


def described(display: str, parts: dict[str, Part], unit: str) -> str:
    """One line with the number of records of each part."""
    return f"{display}: {', '.join(f'{len(part.records):,} {split}' for split, part in parts.items())} {unit}"


# --- files ---


def root_of(folder: str | Path, name: str, expected: str) -> Path:
    """`folder`, or what it holds for the task `name`; Refusal if there is no such folder."""
    root = Path(os.path.expanduser(folder)).absolute()  # a ~name that is nobody's stays, and is no folder
    root = root / name if (root / name).is_dir() else root
    if not root.is_dir():
        raise Refusal(f"{root}: no such folder; expected one with {expected}")
    return root


def text(path: Path, most: int, where: str) -> str:
    """The text of a UTF-8 file of at most `most` bytes, without its byte order mark."""
    with opened(path, most, where) as file:
        return decoded(file.read(), path)


def lines(path: Path, most: int, where: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a UTF-8 file; a line ends in LF or CR LF and nowhere else."""
    with opened(path, most, where) as file:
        for number, raw in enumerate(file, 1):
            line = decoded(raw, path, number).removesuffix("\n").removesuffix("\r")
            if "\r" in line:
                raise Refusal(f"{path}, line {number}: a carriage return inside it; lines end in LF or CR LF")
            yield number, line


def opened(path: Path, most: int, where: str) -> BinaryIO:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise Refusal(f"{path}: not a file; {where}")
        if status.st_size > most:
            raise Refusal(f"{path}: has {status.st_size:,} bytes, expected at most {most:,}; {where}")
        return open(path, "rb")
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror}); {where}") from None


def decoded(content: bytes, path: Path, line: int = 1) -> str:
    """`content`, which begins at `line` of the file, as text."""
    try:
        found = content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise Refusal(f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    if (at := found.find("\0")) >= 0:
        raise Refusal(f"{path}, line {line + found.count(chr(10), 0, at)}: a NUL character")
    return found


# --- values of JSON ---


def words_of(record: object, key: str, what: str, empty: bool = False) -> str:
    """The text `record[key]` as it is; ValueError, which calls the record `what`, unless a tokenizer can take it."""
    value = value_of(record, key, what)
    if not isinstance(value, str):
        raise ValueError(f"the {key} of {what} is not text")
    if not empty and not value.strip():
        raise ValueError(f"the {key} of {what} is empty")
    if "\0" in value:
        raise ValueError(f"the {key} of {what} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {key} of {what} holds half of a surrogate pair") from None
    return value


def value_of(record: object, key: str, what: str) -> object:
    if not isinstance(record, dict):
        raise ValueError(f"{what} is not a JSON object")
    if key not in record:
        raise ValueError(f"{what} has no {key}")
    return record[key]


def list_of(record: object, key: str, what: str) -> list[object]:
    """The list `record[key]`, at least one value long; ValueError if it is not."""
    value = value_of(record, key, what)
    if not isinstance(value, list):
        raise ValueError(f"the {key} of {what} is not a list")
    if not value:
        raise ValueError(f"the {key} of {what} is empty")
    return value
