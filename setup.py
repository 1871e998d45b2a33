"""Builds `prefixattn._C`, the CPU kernels behind pybind11, with ninja; the rest of the package is in pyproject.toml.

    pip install -e .                           # the usual way
    python setup.py build_ext --inplace        # after editing C++: only what changed is compiled again
    python setup.py build_tests                # the programs of csrc/tests; tests/native/test_native.py runs them

The extension knows no torch, so one build serves every torch. A machine that cannot compile still gets the package:
the reason is written beside it (`prefixattn/_C_build.json`) and `python -m prefixattn` says it;
PREFIXATTN_REQUIRE_EXT=1 makes it an error instead. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS mean what they usually do.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# an isolated build starts this file with another working directory and sys.path than a direct call does
ROOT = Path(__file__).resolve().parent
RECORD = "_C_build.json"

# no -ffast-math: infinities mark what a mask hides. What is left out (errno, trapping) lets loops become vector code.
BASE_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra".split()
# By a file's stem. Which file runs is decided at run time, so no other may hold such instructions, nor any file more
# than csrc/cpu/isa.cpp asks the CPU for: the compiler uses all that it is allowed.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split()
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12's own headers trip them (its bug 105593)
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


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


def isa_flags(source: Path) -> list[str]:
    # elsewhere the same files compile to nothing: they guard themselves with #if
    return ISA_FLAGS.get(source.stem, []) if IS_X86 else []


def ninja_escape(text: str | Path) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def test_programs() -> dict[str, tuple[Path, list[str]]]:
    """Source and flags of each by its name: one a source of csrc/tests and an instruction set."""
    isas = {"portable": []} | (ISA_FLAGS if IS_X86 else {})
    sources = sorted(ROOT.glob("csrc/tests/*.cpp"))
    return {f"{source.stem}.{isa}": (source, flags) for source in sources for isa, flags in isas.items()}


def ninja_file(sources: list[Path], compiler: list[str], output: Path) -> str:
    flags = [*BASE_FLAGS, "-I", str(ROOT / "csrc"), *(word for path in include_dirs() for word in ("-isystem", path))]
    libs = ["-ldl"]  # dlsym lies outside the C library before glibc 2.34

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        f"cxx = {command(compiler)}",
        f"flags = {command(flags + shlex.split(os.environ.get('CXXFLAGS', '')))}",
        f"ldflags = {command(['-shared', *shlex.split(os.environ.get('LDFLAGS', ''))])}",
        f"libs = {command(libs)}",
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",  # read as it is: the database that `deps = gcc` makes of it does not survive a kill
        "  description = $out",
        "rule link",
        "  command = $cxx $ldflags $in $libs -o $out",
        "  description = $out",
        "rule program",
        "  command = $cxx $flags $isa -MMD -MF $out.d -MT $out $in -o $out",
        "  depfile = $out.d",
        "  description = $out",
    ]
    objects = []
    for source in sources:
        objects.append(ninja_escape(source.relative_to(ROOT).with_suffix(".o")))
        lines += [f"build {objects[-1]}: compile {ninja_escape(source)}", f"  isa = {' '.join(isa_flags(source))}"]
    lines += [f"build {ninja_escape(output.name)}: link {' '.join(objects)}", f"default {ninja_escape(output.name)}"]
    for name, (source, flags_of_isa) in test_programs().items():
        lines += [f"build tests/{name}: program {ninja_escape(source)}", f"  isa = {' '.join(flags_of_isa)}"]
    lines.append(f"build all_tests: phony {' '.join(f'tests/{name}' for name in test_programs())}")
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def compile_with_ninja(output: Path, *targets: str) -> dict[str, object]:
    """Makes `output`, or targets beside it; returns what to record. Objects stay, so that the next build is short."""
    sources = [path for path in sorted(ROOT.glob("csrc/**/*.cpp")) if path.parent.name != "tests"]
    if ROOT / "csrc" / "python" / "module.cpp" not in sources:
        raise CannotBuild("csrc/python/module.cpp is not in this source tree")
    compiler = find_compiler()
    ninja = [find_ninja(), "-C", str(output.parent), *targets]
    if jobs := os.environ.get("MAX_JOBS"):
        ninja += ["-j", jobs]
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not expect a second one in its folder; freed even by a kill
        write_if_changed(output.parent / "build.ninja", ninja_file(sources, compiler, output))
        done = subprocess.run(ninja, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()[-3:]
        raise CannotBuild(f"{shlex.join(compiler)} failed: " + " | ".join(errors[:3]))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    return {"built": True, "reason": "", "compiler": version}


def place(built: Path, target: Path) -> None:
    """Copies by renaming: a process that has the old library mapped keeps it whole."""
    if target.is_file() and target.read_bytes() == built.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copyfile(built, fresh)
    fresh.replace(target)


class NinjaBuildExt(build_ext):
    @property
    def built(self) -> Path:
        """Where the library is made. Not in self.build_temp: an editable install makes that a folder of one use."""
        [extension] = self.extensions
        filename = Path(self.get_ext_filename(self.get_ext_fullname(extension.name)))
        return ROOT / "build" / f"{self.plat_name}-{sys.implementation.cache_tag}" / filename.name

    def run(self) -> None:
        [extension] = self.extensions
        filename = Path(self.get_ext_filename(self.get_ext_fullname(extension.name)))
        target = (ROOT if self.inplace else Path(self.build_lib)) / filename
        try:
            record = compile_with_ninja(self.built)
        except CannotBuild as objection:
            target.unlink(missing_ok=True)  # one of an older source would answer for this one
            record = {"built": False, "reason": str(objection)}
            print(f"prefixattn: installing without prefixattn._C (the CPU kernels): {objection}", file=sys.stderr)
        else:
            place(self.built, target)
        write_if_changed(target.with_name(RECORD), json.dumps(record, indent=2) + "\n")
        if not record["built"] and os.environ.get("PREFIXATTN_REQUIRE_EXT", "0") not in ("", "0"):
            raise SystemExit(f"prefixattn._C was not built and PREFIXATTN_REQUIRE_EXT is set: {record['reason']}")

    def get_outputs(self) -> list[str]:
        [extension] = self.extensions
        target = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(extension.name))
        return [str(path) for path in (target, target.with_name(RECORD)) if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # editable: the files already lie where they are imported from

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in grafts csrc


class BuildTests(NinjaBuildExt):
    description = "compile the programs of csrc/tests, and say where they are"

    def run(self) -> None:
        try:
            compile_with_ninja(self.built, "all_tests")
        except CannotBuild as objection:
            raise SystemExit(f"the tests below Python were not built: {objection}") from None
        for name in test_programs():
            print(self.built.parent / "tests" / name)


setup(
    # written out: kernels/ would not be found by looking for packages, and bench/ or tests/ must never be
    packages=[
        "prefixattn",
        "prefixattn.attach",
        "prefixattn.attach.hf",
        "prefixattn.attach.timm",
        "prefixattn.attention",
        "prefixattn.kernels",
        "prefixattn.optim",
        "prefixattn.prefixes",
        "prefixattn.reparam",
        "prefixattn.testing",
    ],
    ext_modules=[Extension("prefixattn._C", sources=[])],
    cmdclass={"build_ext": NinjaBuildExt, "build_tests": BuildTests},
)
