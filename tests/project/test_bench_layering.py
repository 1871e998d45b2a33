"""Imports of the benchmarks point one way: subjects stand on the harness, which knows none; studies on models too."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

BENCH = ROOT / "bench"
FOLDERS = ("harness", "attention", "reparam", "static", "models", "paper")
FILES = sorted(path for folder in FOLDERS for path in (BENCH / folder).rglob("*.py"))


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
    below = {own, "harness"} | ({"models"} if own == "paper" else set())  # the published way has one place
    folders = {name[1] for name in imported(path) if name[0] == "bench"}
    assert folders <= below, f"{own} imports {folders - below}"


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in BENCH.glob("*/*.py")} == set(FOLDERS)
    assert {path.name for path in BENCH.glob("*.py")} == {"__init__.py", "conftest.py"}


def test_a_script_run_as_a_file_finds_bench_and_not_our_kernels(tmp_path: Path) -> None:
    """With the repository on sys.path, transformers would take kernels/ for the package of that name."""
    (tmp_path / "script.py").write_text(
        f"import runpy, sys\nrunpy.run_path({str(BENCH / 'paper' / 'as_file.py')!r})\n"
        "from bench.harness import command\n"
        f"print(command.__file__, {str(BENCH.parent)!r} in sys.path)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        (sys.executable, str(tmp_path / "script.py")), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stdout == f"{BENCH / 'harness' / 'command.py'} False\n", run.stderr
