"""Proves what it can of the CUDA kernels' PTX, without a GPU, with sentryward (pip install "sentryward[reference]").

    python -m bench.static.verify_ptx                     # prints each proof
    python -m bench.static.verify_ptx --out bench/results/cuda_proofs.json
    python -m bench.static.verify_ptx --only races

Of a launch with these sizes it proves that barriers and waits behave alike in every schedule and that no two accesses
race ("races"); that the output is the reference's in real arithmetic ("equality"), on either side of the one branch
that depends on scores; and that it objects once a wait or a barrier is taken away ("mutants").
"""

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.command import NOTHING, command
from bench.harness.record import write_rows
from bench.static import kernel_sources
from bench.static.cuda_resources import compiler, run
from build_support import cuda

HERE = Path(__file__).resolve().parent
SECONDS = 600  # of a proof
ARCH = "sm_100"


class Case(NamedTuple):
    kind: str  # races, equality or mutants
    kernel: str
    flags: tuple[str, ...]
    B: int
    H: int
    L: int
    S: int
    P: int
    arch: str = ARCH

    @property
    def sizes(self) -> str:
        return " ".join(f"{name}{getattr(self, name)}" for name in "BHLSP")


SMALL, VIT = ("-DPA_FORWARD=16",), ("-DPA_FORWARD=208",)
CASES = [
    Case("races", "FwdShort<BF16, 64, 16, plain>", SMALL, 2, 2, 20, 11, 5),
    Case("races", "FwdShort<BF16, 64, 16, plain>", SMALL, 1, 1, 16, 11, 5, "sm_80"),
    Case("mutants", "FwdShort<BF16, 64, 16, plain>", SMALL, 1, 1, 16, 11, 5),
    Case("races", "BwdPrefix<BF16, 64>", (), 1, 1, 20, 15, 48),
    Case("races", "BwdPrefix<BF16, 64>", (), 1, 1, 20, 15, 16),
    Case("races", "FwdShort<BF16, 64, 208, plain>", VIT, 1, 1, 197, 197, 10),
    Case("equality", "FwdShort<BF16, 64, 16, plain>", SMALL, 1, 1, 2, 11, 5),
]


def launched(case: Case, folder: Path) -> dict[str, Any]:
    compilers = [os.environ.get("CXX"), shutil.which("g++"), shutil.which("c++"), shutil.which("clang++")]
    program = str(folder / "launched")
    source = str(HERE / "verify_ptx.cpp")
    run(next(filter(None, compilers)), "-std=c++17", "-I", str(kernel_sources.CSRC), *case.flags, source, "-o", program)
    sizes = (case.B, case.H, case.L, case.S, case.P, case.kind != "equality")
    return json.loads(run(program, *(str(int(size)) for size in sizes)))


def ptx_of(case: Case, folder: Path) -> str:
    toolkit, path = cuda.find_toolkit(), folder / "kernel.ptx"
    words = [str(toolkit.nvcc), *toolkit.flags, "-std=c++17", "-x", "cu", "-ptx", f"-arch={case.arch}"]
    run(*words, "-I", str(kernel_sources.CSRC), *case.flags, str(HERE / "verify_ptx.cpp"), "-o", str(path))
    return path.read_text(encoding="utf-8")


def input_of(launch: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the launch; pointers stay unknown, and apart from one another."""
    pointers = {word for begin in launch["pointers"] for word in (begin, begin + 1)}
    words = [(4 * i, value) for i, value in enumerate(launch["words"]) if i not in pointers]
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {"grid_dim": launch["grid"], "block_dim": [128, 1, 1], "dynamic_shared_bytes": launch["shared"]},
        "arguments": [{"parameter": 0, "offset": at, "type": "u32", "value": value} for at, value in words],
    }


def binding_of(case: Case, launch: dict[str, Any]) -> dict[str, Any]:
    """Which tensor of the reference lies at which parameter of the kernel."""
    offsets = [4 * word for word in launch["pointers"]]
    names = [f"6:global{len(f'input.arg0.{at}')}:input.arg0.{at}" for at in offsets]

    def layout(rows: int, *prefixes: str) -> dict[str, Any]:
        where = {f"{prefix}_offset": 0 for prefix in prefixes}
        strides = {f"{prefix}_strides_bytes": [128, 2] for prefix in prefixes}
        return {"shape": [rows, 64], "element_bytes": 2, **where, **strides}

    rows = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), (case.L, case.S, case.S, case.P, case.P), strict=True))
    layouts = {name: layout(n, "source", "target") for name, n in zip(names, rows.values(), strict=False)}
    arguments = [
        {"name": argument, "allocation": name, "shape": [n, 64], "dtype": "bfloat16"}
        for (argument, n), name in zip(rows.items(), names, strict=False)
    ]
    out = {"left_allocation": names[5], "right_allocation": names[5], **layout(case.L, "left", "right")}
    return {
        "reference": {"arguments": arguments},
        "left_inputs": {"layouts": layouts},
        "right_inputs": {"layouts": layouts},
        "outputs": {"kind": "dense_tensors", "tensors": [out]},
    }


def proof(ptx: str, given: dict[str, Any], folder: Path, binding: dict[str, Any] | None = None) -> dict[str, Any]:
    (folder / "kernel.ptx").write_text(ptx, encoding="utf-8")
    (folder / "input.json").write_text(json.dumps(given), encoding="utf-8")
    words = [sys.executable, "-m", "sentryward", "kernel.ptx", "--input", "input.json", "--timeout", str(SECONDS)]
    if binding is not None:
        (folder / "binding.json").write_text(json.dumps(binding), encoding="utf-8")
        shutil.copy(HERE / "verify_reference.py", folder)
        words += ["--reference", "verify_reference.py", "--reference-binding", "binding.json"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    try:
        said = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RuntimeError(f"sentryward: {done.stdout[-1000:]}{done.stderr[-1000:]}") from None
    row = {"result": said["result"], "seconds": round(said["elapsed_seconds"]), **said["checks"]}
    if said["diagnostics"] and said["result"] not in ("potential_race", "not_wellsynced"):
        first = said["diagnostics"][0]
        at = first.get("details", {}).get("ptx_line") or first.get("details", {}).get("location", {}).get("line")
        row["why"] = f"{first['code']}: {first.get('message', '')}"
        if at:
            row["line"] = ptx.splitlines()[at - 1].strip()
    return row


def with_constant(ptx: str, launch: dict[str, Any]) -> str:
    """The factor of scores as a number: sentryward keeps a float parameter as an unknown."""
    factor = struct.unpack("I", struct.pack("f", 0.1803368777036667))[0]
    at = 4 * launch["words"].index(factor)
    load = rf"ld\.param\.f32\s+(%f\d+), \[[^\]]*\+{at}\];"
    changed, found = re.subn(load, rf"mov.f32 \1, 0f{factor:08X};", ptx)
    assert found == 1, f"the factor is loaded {found} times"
    return changed


def proofs(case: Case, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    launch, ptx = launched(case, folder), ptx_of(case, folder)
    given, lines = input_of(launch), ptx.splitlines()
    if case.kind == "races":
        yield "", proof(ptx, given, folder)
    elif case.kind == "mutants":
        for i, line in enumerate(lines):
            if re.match(r"\s*(bar\.sync|barrier\.sync|cp\.async\.wait_group)", line):
                without = "\n".join([*lines[:i], *lines[i + 1 :]])
                yield f"without {' '.join(line.split())} line {i + 1}", proof(without, given, folder)
    else:
        vote = next(i for i, line in enumerate(lines) if "vote.sync.any" in line)
        branch = next(i for i in range(vote, len(lines)) if re.match(r"\s*@%p\d+ bra", lines[i]))
        for taken in True, False:
            given["branch_decisions"] = [{"line": branch + 1, "taken": taken}]
            words = "small shifts" if taken else "large shifts"
            yield words, proof(with_constant(ptx, launch), given, folder, binding_of(case, launch))


def measure(only: str) -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        if only in (case.kind, ""):
            with tempfile.TemporaryDirectory() as name:
                for what, row in proofs(case, Path(name)):
                    whose = {"asked": case.kind, "kernel": case.kernel, "arch": case.arch, "sizes": case.sizes}
                    rows.append(whose | ({"of": what} if what else {}) | row)
                    print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=("races", "equality", "mutants"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = {
        "sentryward": version("sentryward"),
        "compiler": compiler(),
        "sources": kernel_sources.native_digest(),
        "rows": measure(options.only),
    }
    if options.out:
        write_rows(options.out, record)


if __name__ == "__main__":
    sys.exit(command("verify_ptx.py", main, NOTHING))
