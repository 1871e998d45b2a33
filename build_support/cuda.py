"""Builds `prefixattn._cuda`, the CUDA kernels, with nvcc, and the same sources with g++ for the machine of the tests.

Whether, and for what, is said by the environment:

    PREFIXATTN_CUDA=1          built wherever there is an nvcc; 0: never; unset: where there is an NVIDIA GPU too
    PREFIXATTN_CUDA_ARCHS=...  for these, such as "sm_80;sm_90", or "native": the GPUs of this machine
    CUDA_HOME=...              the toolkit; else nvcc on PATH, or the one of the wheel nvidia-cuda-nvcc

A machine with a compiler and no GPU is asked for its consent, because a build takes minutes of its processors and a
toolkit is often there for something else.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from build_support.common import (
    ROOT,
    CannotBuild,
    find_compiler,
    include_dirs,
    ninja_command,
    ninja_escape,
    run_ninja,
    version_of,
)

ARCHS = "sm_80", "sm_86", "sm_89", "sm_90", "sm_100"
# name: the element type of hw.h and the head size. A pass, a type and a head size are a file's worth of compilation.
INSTANCES = {
    f"{name}_{D}": (f"-DPA_ELEMENT={element}", f"-DPA_HEAD_DIM={D}", f"-DPA_INSTANCE={name}_{D}")
    for name, element in (("bf16", "BF16"), ("fp16", "FP16"))
    for D in (64, 128)
}
PASSES = "fwd", "bwd"
DRIVERS = "/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version"  # one of them is where a GPU is
HOST_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra".split()
HOST_OPTIMIZE = ["-O2", "-g1"]  # -O3 takes longer to compile than it saves
# no --use_fast_math: what may be approximate is written so
DEVICE_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -cudart static".split()


class Toolkit(NamedTuple):
    nvcc: Path
    flags: tuple[str, ...]  # folders that this nvcc does not find by itself


def _of_wheels() -> Path | None:
    """The root that NVIDIA's wheels share, if the compiler's is among them."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for root in sorted(Path(folder).glob("cu*"), reverse=True):
            if (root / "bin" / "nvcc").is_file():
                return root
    return None


def find_toolkit() -> Toolkit:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            if not Path(home, "bin", "nvcc").is_file():
                raise CannotBuild(f"{name}={home} has no bin/nvcc")
            return Toolkit(Path(home, "bin", "nvcc"), ())
    if path := shutil.which("nvcc"):
        return Toolkit(Path(path), ())
    if (root := _of_wheels()) is None:
        raise CannotBuild(
            "no nvcc found (CUDA_HOME, PATH, or pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm "
            "nvidia-cuda-runtime nvidia-cuda-cccl)"
        )
    if not (root / "lib" / "libcudart_static.a").is_file():
        raise CannotBuild(f"{root} has no lib/libcudart_static.a: pip install nvidia-cuda-runtime")
    includes = [path for path in (root / "include", root / "include" / "cccl") if path.is_dir()]
    return Toolkit(root / "bin" / "nvcc", (*(f"-I{path}" for path in includes), f"-L{root / 'lib'}"))


def why_not() -> str:
    """Why the kernels are not built although they could be; empty if they are to be."""
    asked = os.environ.get("PREFIXATTN_CUDA", "")
    if asked == "0":
        return "PREFIXATTN_CUDA=0"
    if asked or any(Path(place).exists() for place in DRIVERS):
        return ""
    return "this machine has no NVIDIA GPU; PREFIXATTN_CUDA=1 builds it all the same"


def archs() -> list[str]:
    named = os.environ.get("PREFIXATTN_CUDA_ARCHS", "")
    if named == "native":
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotBuild(
                f"PREFIXATTN_CUDA_ARCHS=native: nvidia-smi does not say which GPUs are here: {error}"
            ) from None
        return sorted({"sm_" + line.strip().replace(".", "") for line in said.splitlines()}, key=_number)
    found = [word for word in re.split(r"[;,\s]+", named) if word] or list(ARCHS)
    for arch in found:
        if not re.fullmatch(r"sm_\d+[af]?", arch) or _number(arch) < 80:
            raise CannotBuild(f"PREFIXATTN_CUDA_ARCHS={named}: {arch} is none of sm_80 and later")
    return found


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def gencode(names: list[str]) -> list[str]:
    """Machine code for each, and PTX of the last for what comes after it."""
    flags = []
    for name in names:
        virtual = name.replace("sm_", "compute_")
        code = f"[{name},{virtual}]" if name == names[-1] else name
        flags += ["-gencode", f"arch={virtual},code={code}"]
    return flags


def _units() -> list[tuple[str, Path, tuple[str, ...]]]:
    """Name, source and flags of what holds kernels."""
    source = ROOT / "csrc" / "cuda"
    units = [(f"{p}_{name}", source / f"{p}.cu", flags) for p in PASSES for name, flags in INSTANCES.items()]
    return [("launch", source / "launch.cu", ()), *units]


def ninja_file(output: str, compiler: list[str], toolkit: Toolkit) -> str:
    device = [*DEVICE_FLAGS, "-ccbin", compiler[0], *toolkit.flags, *gencode(archs())]
    device += shlex.split(os.environ.get("NVCCFLAGS", ""))
    lines = [
        f"nvcc = {ninja_escape(toolkit.nvcc)}",
        f"device = {ninja_command(['-I', str(ROOT / 'csrc'), *device])}",
        "rule kernels",
        "  command = $nvcc $device $unit -MMD -MF $out.d -MT $out -c $in -o $out",
        "  depfile = $out.d",
        "  description = $out",
        "rule link",
        "  command = $nvcc -shared $device $in -o $out",
        "  description = $out",
        *_host_rule(compiler, ["-O2", "-DPA_MODULE=_cuda"]),
    ]
    return _with_units(lines, output, "kernels")


def host_ninja_file(output: str, compiler: list[str]) -> str:
    """The same sources as C++, with the host machine in the place of a GPU."""
    lines = [
        *_host_rule(compiler, [*HOST_OPTIMIZE, "-DPA_MODULE=_cuda_host", "-DPA_HOST_MACHINE"]),
        "rule link",
        f"  command = {ninja_command(compiler)} -shared $in -o $out",
        "  description = $out",
    ]
    return _with_units(lines, output, "compile")


def _host_rule(compiler: list[str], flags: list[str]) -> list[str]:
    system = [word for path in include_dirs() for word in ("-isystem", path)]
    words = [*compiler, *HOST_FLAGS, *flags, "-I", str(ROOT / "csrc"), *system]
    words += shlex.split(os.environ.get("CXXFLAGS", ""))
    return [
        "rule compile",
        f"  command = {ninja_command(words)} $unit -MMD -MF $out.d -MT $out -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  description = $out",
    ]


def _with_units(lines: list[str], output: str, rule: str) -> str:
    objects = []
    for name, source, flags in _units():
        objects.append(f"{name}.o")
        lines += [f"build {name}.o: {rule} {ninja_escape(source)}", f"  unit = {' '.join(flags)}"]
    for source in sorted((ROOT / "csrc" / "cuda" / "python").glob("*.cpp")):
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {ninja_escape(source)}")
    lines += [f"build {output}: link {' '.join(objects)}", f"default {output}"]
    return "\n".join(lines) + "\n"


def build(output: Path) -> dict[str, object]:
    """Makes `output`; returns what to record of it. CannotBuild says why not."""
    if reason := why_not():
        raise CannotBuild(reason)
    toolkit, compiler = find_toolkit(), find_compiler()
    run_ninja(output.parent, ninja_file(output.name, compiler, toolkit), (), str(toolkit.nvcc))
    version = version_of([str(toolkit.nvcc)], -2)
    return {"built": True, "reason": "", "compiler": version, "archs": archs()}


def build_host(output: Path) -> None:
    compiler = find_compiler()
    run_ninja(output.parent, host_ninja_file(output.name, compiler), (), shlex.join(compiler))
