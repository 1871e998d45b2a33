"""Imports point one way, down; importing the package is cheap; files stay small."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prefixattn"

# a module may import those in lines below its own; those of one line do not know each other, except the first ones
LAYERS = """
    __main__ __init__ attach checkpoint config files optim peft plus prefix saving taken
    testing
    functional reparam
    ops
    backends testing_plain
    guard
    cpu triton
    kernels
    reference testing_plain
    call reparam.call
    checks philox layout _C
"""
RANK = {name: i for i, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}


def place(parts: list[str]) -> str:
    """A file's own name where it has a place of its own, else its folder's."""
    whole = ".".join(parts[:2])
    return whole if whole in RANK else parts[0]


def layer(path: Path) -> str:
    return place(list(path.relative_to(PACKAGE).with_suffix("").parts))


def imported(path: Path) -> set[str]:
    """The modules of prefixattn that a file imports, by their layer's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides what it points to"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in found]
    return {place(p[1:]) for p in parts if p[0] == "prefixattn" and len(p) > 1 and place(p[1:]) in RANK}


SOURCES = sorted(
    Path(folder) / file
    for folder, _, files in os.walk(PACKAGE, followlinks=True)  # kernels/ is there through a link
    for file in files
    if file.endswith(".py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = layer(path)
    assert own in RANK, f"{own} has no place in LAYERS"
    upward = {name for name in imported(path) if name != own and RANK[name] <= RANK[own] and RANK[own]}
    assert not upward, f"{own} imports {upward}, which does not stand below it"


def test_import_is_light_and_silent() -> None:
    # some builds of torch import triton themselves; what counts is what we add
    code = (
        "import sys, torch; before = set(sys.modules); import prefixattn; added = set(sys.modules) - before;"
        "heavy = added & {'transformers', 'timm', 'triton', 'peft', 'safetensors'}; assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def tracked() -> list[Path]:
    folders = ("prefixattn", "kernels", "csrc", "tests", "bench")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [p for p in found if p.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh")]


def test_files_stay_small() -> None:
    long = {str(p.relative_to(ROOT)): n for p in tracked() if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"more than 400 lines: {long}"
