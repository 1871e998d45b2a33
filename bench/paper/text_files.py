"""Files that hold a text a line: read whole, or refused with the file and the row that cannot be."""

from __future__ import annotations

from pathlib import Path

from bench.paper.runs import Refusal


def read_lines(path: Path) -> list[str]:
    """The file's lines, stripped; a byte order mark and any of the three line ends are allowed."""
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


def read_texts(path: Path) -> list[str]:
    """The lines of a file in which each must hold a text."""
    lines = read_lines(path)
    if "" in lines:
        raise Refusal(f"{path}:{lines.index('') + 1}: blank, expected a text on each line")
    return lines


def read_outputs(path: Path, references: Path, expected: int) -> list[str]:
    """A hypothesis for each of the `expected` instances of `references`; a blank line is an empty one."""
    lines = read_lines(path)
    if len(lines) < expected:
        raise Refusal(f"{path}:{len(lines)}: ends after {len(lines)} hypotheses; {references} has {expected} instances")
    if len(lines) > expected:
        raise Refusal(f"{path}:{expected + 1}: one hypothesis too many; {references} has {expected} instances")
    return lines
