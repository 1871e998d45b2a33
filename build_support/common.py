"""What the builds of both extensions share: compilers, ninja, and files that are written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class CannotBuild(Exception):
    """Why there will be no extension, in words for the user."""


def find_compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise CannotBuild(f"CXX={os.environ['CXX']}: no such program")
        return named
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise CannotBuild("no C++ compiler found (g++, c++ or clang++); install one, or name it in CXX, and install again")


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        if path := shutil.which("ninja"):
            return path
        raise CannotBuild("ninja is missing: pip install ninja") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def include_dirs() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 is missing: pip install pybind11") from None
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise CannotBuild(f"{include} has no Python.h; install Python's headers (python3-dev)")
    return [include, pybind11.get_include()]


def build_folder(plat_name: str) -> Path:
    """Where libraries are made. Not setuptools' build_temp: an editable install makes that a folder of one use."""
    return ROOT / "build" / f"{plat_name}-{sys.implementation.cache_tag}"


def ninja_escape(text: str | Path) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run_ninja(folder: Path, text: str, targets: tuple[str, ...], compiler: str) -> None:
    """Makes targets of the build file `text` in `folder`. Objects stay, so that the next build is short."""
    ninja = [find_ninja(), "-C", str(folder), *targets]
    if jobs := os.environ.get("MAX_JOBS"):
        ninja += ["-j", jobs]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not expect a second one in its folder; freed even by a kill
        write_if_changed(folder / "build.ninja", text)
        done = subprocess.run(ninja, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()[-3:]
        raise CannotBuild(f"{compiler} failed: " + " | ".join(errors[:3]))


def version_of(command: list[str], line: int = 0) -> str:
    lines = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()
    return lines[line] if lines else ""


def place(built: Path, target: Path) -> None:
    """Copies by renaming: a process that has the old library mapped keeps it whole."""
    if target.is_file() and target.read_bytes() == built.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copyfile(built, fresh)
    fresh.replace(target)
