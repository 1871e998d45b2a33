"""Imports point one way, down; importing the package is cheap; files stay small."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "prefixattn"

# a module may import those in lines below its own, and of its own folder what is in no circle with it
LAYERS = """
    __main__ __init__
    testing
    attach
    optim
    prefixes
    attention.functional reparam.functional
    attention.normal_form
    attention.ops reparam.ops
    backends
    reparam.guard
    attention.guard
    reparam.cpu reparam.triton
    attention.cpu attention.cuda attention.triton
    kernels
    attention.widths
    reparam.fused_step attention.native attention.sinks
    reparam.moments8 reparam.reference attention.reference
    attention.call attention.sequences
    attention.checks attention.invariance attention.philox attention.windows reparam.call
    attention.layout differentiation trials _C _cuda
"""
RANK = {name: i for i, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
FACES = {"attention", "reparam"}  # packages whose own __init__ holds nothing


def place(module: str) -> str:
    """The layer of a module, named without the package's name: its own, or its folder's."""
    while module not in RANK and "." in module:
        module = module.rpartition(".")[0]
    return module


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """The modules of prefixattn that a file imports, wherever in it, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides what it points to"
            # of a package its submodule, if the name is one
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("prefixattn.") in MODULES else str(node.module))
    ours = {name.removeprefix("prefixattn.") for name in found if name.startswith("prefixattn.")}
    return {name + ".__init__" if name + ".__init__" in MODULES else name for name in ours}


SOURCES = sorted(
    Path(folder) / file
    for folder, _, files in os.walk(PACKAGE, followlinks=True)  # kernels/ is there through a link
    for file in files
    if file.endswith(".py")
)


MODULES = {module_of(path) for path in SOURCES} | {"_C", "_cuda"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = place(module_of(path))
    if own in FACES:
        assert not imported(path)
        return
    assert own in RANK, f"{own} has no place in LAYERS"
    others = {place(name) for name in imported(path)} - FACES - {own}
    upward = {name for name in others if RANK[name] <= RANK[own] and RANK[own]}
    assert not upward, f"{own} imports {upward}, which does not stand below it"


def test_no_imports_go_in_a_circle() -> None:
    """Nor those inside functions."""
    imports = {module_of(path): imported(path) & MODULES for path in SOURCES}
    imports["_C"] = imports["_cuda"] = set()
    while free := [name for name, others in imports.items() if not others & imports.keys()]:
        for name in free:
            del imports[name]
    assert not imports, f"in a circle, or above one: {sorted(imports)}"


def test_a_packages_own_file_has_no_logic() -> None:
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            kinds = {type(node) for node in ast.parse(path.read_text()).body}
            assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, path


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
