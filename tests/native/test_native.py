"""Below Python: the programs of csrc/tests, compiled as the extension is, for every instruction set that runs here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "tests").glob("*.cpp"))
CUDA_SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda" / "tests").glob("*.cpp"))

if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
    pytest.skip("no C++ compiler to build csrc/tests with", allow_module_level=True)
_C = pytest.importorskip("prefixattn._C", reason="prefixattn._C, which knows what runs here, is not built")


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    """By name. Workers of pytest-xdist wait for one another, and find it done."""
    command = [sys.executable, "setup.py", "-q", "build_tests"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return {Path(line).name: Path(line) for line in done.stdout.splitlines() if line.startswith(str(ROOT))}


# csrc/cpu/isa.cpp alone asks the system for a CPU's tiles, so no program has them
@pytest.mark.parametrize("isa", [name for name in _C.isas() if name not in ("amx_bf16", "amx_fp16")])
@pytest.mark.parametrize("source", SOURCES)
def test_program(source: str, isa: str, programs: dict[str, Path]) -> None:
    done = subprocess.run([programs[f"{source}.{isa}"]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", CUDA_SOURCES)
def test_program_of_the_cuda_kernels(source: str, programs: dict[str, Path]) -> None:
    """On the host machine: no GPU, and no nvcc."""
    test_program(source, "cuda", programs)


def test_the_rules_are_device_code_too(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile csrc/tests/semantics.cu with")
    source, output = ROOT / "csrc" / "tests" / "semantics.cu", tmp_path / "semantics.o"
    command = [
        nvcc,
        "-c",
        "-std=c++17",
        "-arch=sm_90a",
        "-Werror=all-warnings",
        "-I",
        ROOT / "csrc",
        source,
        "-o",
        output,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
