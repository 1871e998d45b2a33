"""Builds `prefixattn._C`, the CPU kernels behind pybind11, and `prefixattn._cuda`, those for GPUs, with ninja.

    pip install -e .                           # the usual way
    python setup.py build_ext --inplace        # after editing C++: only what changed is compiled again
    python setup.py build_tests                # the programs of csrc/tests; tests/native/test_native.py runs them
    python setup.py build_cuda_host            # the CUDA kernels for the machine that the tests run them on

The extensions know no torch, so one build serves every torch. A machine that cannot compile still gets the package:
the reason is written beside it (`prefixattn/_C_build.json`, `prefixattn/_cuda_build.json`) and `python -m prefixattn`
says it; PREFIXATTN_REQUIRE_EXT=1 makes it an error of `_C`, and PREFIXATTN_CUDA=1 of `_cuda`. CXX, CXXFLAGS, LDFLAGS
and MAX_JOBS mean what they usually do. The rest of the package is in pyproject.toml, and of `_cuda` in
build_support/cuda.py.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # an isolated build starts this file with another sys.path

from build_support import cuda
from build_support.common import (
    ROOT,
    CannotBuild,
    build_folder,
    find_compiler,
    include_dirs,
    ninja_command,
    ninja_escape,
    place,
    run_ninja,
    version_of,
    write_if_changed,
)

# no -ffast-math: infinities mark what a mask hides. What is left out (errno, trapping) lets loops become vector code.
BASE_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra".split()
# By a file's stem. Which file runs is decided at run time, so no other may hold such instructions, nor any file more
# than csrc/cpu/isa.cpp asks the CPU for: the compiler uses all that it is allowed.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split()
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12's own headers trip them (its bug 105593)
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vbmi"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx_bf16": [*AVX512_BF16, "-DPA_AMX"],
    "amx_fp16": [*AVX512_BF16, "-DPA_AMX", "-DPA_AMX_FP16"],
    "amx_plain_avx512": [*AVX512_BF16, "-DPA_PLAIN_TILES"],
}
# What is written in assembly is asked of the assembler, which may be older than its compiler.
ASSEMBLY = {"amx_bf16": "tdpbf16ps %tmm0, %tmm1, %tmm2", "amx_fp16": "tdpfp16ps %tmm0, %tmm1, %tmm2"}
ANYWHERE = {"portable": [], "amx_plain": ["-DPA_PLAIN_TILES"]}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def assembles(compiler: list[str], instruction: str) -> bool:
    command = [*compiler, "-x", "c++", "-c", "-", "-o", os.devnull]
    return not subprocess.run(command, input=f'asm("{instruction}");', text=True, capture_output=True).returncode


def isa_flags(compiler: list[str]) -> dict[str, list[str]]:
    """By a file's stem. Files of other instruction sets compile to nothing: they guard themselves with #if."""
    known = {name for name in ISA_FLAGS if name not in ASSEMBLY or assembles(compiler, ASSEMBLY[name])}
    return ANYWHERE | {name: flags for name, flags in ISA_FLAGS.items() if IS_X86 and name in known}


def test_programs() -> dict[str, tuple[Path, list[str]]]:
    """Source and flags of each by its name: a source of csrc/tests for an instruction set, and those of csrc/cuda.

    None is for tiles of a CPU, which csrc/cpu/isa.cpp alone asks the system for.
    """
    isas = ANYWHERE | ({name: flags for name, flags in ISA_FLAGS.items() if name not in ASSEMBLY} if IS_X86 else {})
    sources = sorted(ROOT.glob("csrc/tests/*.cpp"))
    programs = {f"{source.stem}.{isa}": (source, flags) for source in sources for isa, flags in isas.items()}
    machine = sorted(ROOT.glob("csrc/cuda/tests/*.cpp"))
    return programs | {f"{source.stem}.cuda": (source, cuda.HOST_OPTIMIZE) for source in machine}


def ninja_file(sources: list[Path], compiler: list[str], output: Path) -> str:
    flags = [*BASE_FLAGS, "-I", str(ROOT / "csrc"), *(word for path in include_dirs() for word in ("-isystem", path))]
    libs = ["-ldl"]  # dlsym lies outside the C library before glibc 2.34

    lines = [
        f"cxx = {ninja_command(compiler)}",
        f"flags = {ninja_command(flags + shlex.split(os.environ.get('CXXFLAGS', '')))}",
        f"ldflags = {ninja_command(['-shared', *shlex.split(os.environ.get('LDFLAGS', ''))])}",
        f"libs = {ninja_command(libs)}",
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
    objects, isas = [], isa_flags(compiler)
    for source in sources:
        objects.append(ninja_escape(source.relative_to(ROOT).with_suffix(".o")))
        lines += [
            f"build {objects[-1]}: compile {ninja_escape(source)}",
            f"  isa = {' '.join(isas.get(source.stem, []))}",
        ]
    lines += [f"build {ninja_escape(output.name)}: link {' '.join(objects)}", f"default {ninja_escape(output.name)}"]
    for name, (source, flags_of_isa) in test_programs().items():
        lines += [f"build tests/{name}: program {ninja_escape(source)}", f"  isa = {' '.join(flags_of_isa)}"]
    lines.append(f"build all_tests: phony {' '.join(f'tests/{name}' for name in test_programs())}")
    return "\n".join(lines) + "\n"


def compile_with_ninja(output: Path, *targets: str) -> dict[str, object]:
    """Makes `output`, or targets beside it; returns what to record."""
    found = sorted(ROOT.glob("csrc/**/*.cpp"))
    sources = [path for path in found if not {"tests", "cuda"} & set(path.relative_to(ROOT / "csrc").parts)]
    if ROOT / "csrc" / "python" / "module.cpp" not in sources:
        raise CannotBuild("csrc/python/module.cpp is not in this source tree")
    compiler = find_compiler()
    run_ninja(output.parent, ninja_file(sources, compiler, output), targets, shlex.join(compiler))
    return {"built": True, "reason": "", "compiler": version_of(compiler)}


def demanded(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class NinjaBuildExt(build_ext):
    def filename(self, extension: Extension) -> Path:
        return Path(self.get_ext_filename(self.get_ext_fullname(extension.name)))

    def made(self, name: str) -> Path:
        """Where ninja leaves the library; each has a folder, so that the failure of one touches no other."""
        folder = build_folder(self.plat_name)
        return (folder if name == "_C" else folder / name.strip("_")) / self.get_ext_filename(name)

    def target(self, extension: Extension) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / self.filename(extension)

    def run(self) -> None:
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            target = self.target(extension)
            try:
                record = compile_with_ninja(self.made(name)) if name == "_C" else cuda.build(self.made(name))
            except CannotBuild as objection:
                target.unlink(missing_ok=True)  # one of an older source would answer for this one
                record = {"built": False, "reason": str(objection)}
                if name == "_C" or demanded("PREFIXATTN_CUDA"):
                    print(f"prefixattn: installing without prefixattn.{name}: {objection}", file=sys.stderr)
            else:
                place(self.made(name), target)
            write_if_changed(record_beside(target), json.dumps(record, indent=2) + "\n")
            wanted = name == "_C" or demanded("PREFIXATTN_CUDA")
            if not record["built"] and wanted and demanded("PREFIXATTN_REQUIRE_EXT"):
                raise SystemExit(
                    f"prefixattn.{name} was not built and PREFIXATTN_REQUIRE_EXT is set: {record['reason']}"
                )

    def get_outputs(self) -> list[str]:
        targets = [Path(self.build_lib) / self.filename(extension) for extension in self.extensions]
        made = [path for target in targets for path in (target, record_beside(target))]
        return [str(path) for path in made if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # editable: the files already lie where they are imported from

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in grafts csrc


def record_beside(library: Path) -> Path:
    return library.with_name(library.name.partition(".")[0] + "_build.json")


class BuildCudaHost(NinjaBuildExt):
    description = "compile the CUDA kernels for the machine that the tests run them on, and say where that is"

    def run(self) -> None:
        output = self.made("_cuda_host")
        try:
            cuda.build_host(output)
        except CannotBuild as objection:
            raise SystemExit(f"the CUDA kernels were not built for the tests: {objection}") from None
        print(output)


class BuildTests(NinjaBuildExt):
    description = "compile the programs of csrc/tests, and say where they are"

    def run(self) -> None:
        try:
            compile_with_ninja(self.made("_C"), "all_tests")
        except CannotBuild as objection:
            raise SystemExit(f"the tests below Python were not built: {objection}") from None
        for name in test_programs():
            print(self.made("_C").parent / "tests" / name)


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
    ext_modules=[Extension("prefixattn._C", sources=[]), Extension("prefixattn._cuda", sources=[])],
    cmdclass={"build_ext": NinjaBuildExt, "build_tests": BuildTests, "build_cuda_host": BuildCudaHost},
)
