"""Imports of the benchmarks point one way: subjects stand on the harness, which knows none; studies on models too."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

BENCH = ROOT / "bench"
PAPER = BENCH / "paper"
FOLDERS = ("harness", "attention", "reparam", "static", "models", "paper")
FILES = sorted(path for folder in FOLDERS for path in (BENCH / folder).rglob("*.py"))
# files of paper/ import each other by these
BARE = {path.stem for path in PAPER.glob("*.py")} | {path.parent.name for path in PAPER.glob("*/__init__.py")}


def imported(path: Path) -> set[tuple[str, ...]]:
    """Whole names, in parts."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides what it points to"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {tuple(name.split(".")) for name in found}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(BENCH)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(BENCH).parts[0]
    names = imported(path)
    folders = {name[1] for name in names if name[0] == "bench"}
    bare = {name[0] for name in names} & BARE
    below = {own, "harness"} | ({"models"} if own == "paper" else set())  # the published way has one place
    assert folders <= below, f"{own} imports {folders - below}"
    assert not bare or own == "paper", f"{own} imports {bare} of paper/"


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in BENCH.glob("*/*.py")} == set(FOLDERS)
    assert {path.name for path in BENCH.glob("*.py")} == {"__init__.py", "conftest.py"}
