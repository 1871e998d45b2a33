"""Compiles the CUDA kernels for GPUs that are not here, and records what they need.

    python -m bench.static.cuda_resources                 # prints registers, spills and instructions
    python -m bench.static.cuda_resources --out bench/results/cuda_resources.json
    python -m bench.static.cuda_resources --arch sm_90 --only fwd_bf16_64
    python -m bench.static.cuda_resources --built build/PLATFORM/cuda    # what setup.py compiled

nvcc is found as setup.py finds it; cuobjdump and nvdisasm are Triton's, or on PATH, or of the wheels of those names.

`shared` is what a launch of the kernel asks for, in bytes, by the plan of a call with the most keys that lead to it,
and without a mask; null: on that architecture no call leads to it, as a block has not the shared memory. `blocks` is
how many of them a multiprocessor holds at once, and `bound` what keeps it from more.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.command import NOTHING, command
from bench.harness.record import write_rows
from bench.static import cuda_counts, kernel_sources
from bench.static.triton_shapes import TargetShape
from build_support import cuda
from prefixattn.attention.cuda import load

KIB = 1024


class Gpu(NamedTuple):
    """What a multiprocessor has; from the tables of CUDA's programming guide."""

    processors: int  # of a GPU of that architecture: A100, A6000, L40S, H200, B200
    shared: int  # bytes, of which each block costs RESERVED beside its own
    threads: int
    blocks: int

    @property
    def offers(self) -> tuple[int, int]:
        """Shared memory of a block, and processors: what a plan is made by."""
        return self.shared - RESERVED, self.processors


LONG = 640  # keys, more than a kernel for short axes takes
REGISTERS, PARTITIONS = 65536, 4  # of a multiprocessor, on all of these; a warp's registers are those of one partition
RESERVED = KIB
GPUS = {
    "sm_80": Gpu(108, 164 * KIB, 2048, 32),
    "sm_86": Gpu(84, 100 * KIB, 1536, 16),
    "sm_89": Gpu(142, 100 * KIB, 1536, 24),
    "sm_90": Gpu(132, 228 * KIB, 2048, 32),
    "sm_100": Gpu(148, 228 * KIB, 2048, 32),
}
ARCHS = cuda.ARCHS
UNITS = [f"{p}_{instance}" for p in cuda.PASSES for instance in cuda.INSTANCES]
# what a kernel lives by, and what it must not have: accesses to its stack
COUNTED = {"mma": "HMMA", "ldmatrix": "LDSM", "copy_async": "LDGSTS", "exp2": "MUFU.EX2", "spill": "(STL|LDL)"}


def tool(name: str) -> str:
    """cuobjdump or nvdisasm."""
    folders = [Path(found, "bin") for found in (os.environ.get("CUDA_HOME"),) if found]
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = find_spec(package)
        folders += [Path(at, inside) for at in (spec.submodule_search_locations or [])] if spec else []
    path = shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)
    if path is None:
        raise RuntimeError(f"no {name} found: pip install nvidia-cuda-{name}, or triton")
    return path


def run(*words: str) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout[-2000:]}")
    return done.stdout


def compiled(unit: str, arch: str, folder: Path) -> Path:
    """The machine code of a unit for an architecture, with the flags of a build."""
    toolkit = cuda.find_toolkit()
    passes, _, instance = unit.partition("_")
    source, output = cuda.ROOT / "csrc" / "cuda" / f"{passes}.cu", folder / f"{unit}.{arch}.cubin"
    flags = [flag for flag in cuda.DEVICE_FLAGS if flag not in ("-cudart", "static")]
    flags += [*toolkit.flags, "-I", str(cuda.ROOT / "csrc"), *cuda.INSTANCES[instance]]
    run(str(toolkit.nvcc), "-cubin", f"-arch={arch}", *flags, str(source), "-o", str(output))
    return output


def unpacked(unit: str, built: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """The machine code in a build's object, and its architecture, for each that it was built for."""
    inside = folder / unit
    inside.mkdir()
    found = subprocess.run(
        [tool("cuobjdump"), "-xelf", "all", str((built / f"{unit}.o").resolve())],
        cwd=inside,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise RuntimeError(f"{unit}.o: {found.stderr[-1000:]}")
    for path in inside.glob("*.cubin"):
        yield path, path.stem.split(".")[-1]


def kernels(cubin: Path, arch: str) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a file."""
    used = run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    threads = dict(
        re.findall(
            r"\.nv\.info\.(\S+)\n(?:.*\n)*?.*MAX_THREADS\n.*\n\tValue:\t0x(\w+)",
            run(tool("cuobjdump"), "-elf", str(cubin)),
        )
    )
    code = dict(re.findall(r"\.text\.(\S+):\n((?:.*\n)*?)(?=\.text\.|\Z)", run(tool("nvdisasm"), "-c", str(cubin))))
    for name, registers, stack in re.findall(r"Function (\S+):\n\s+REG:(\d+) STACK:(\d+)", used):
        counts = {word: len(re.findall(rf"\s{pattern}\b", code[name])) for word, pattern in COUNTED.items()}
        yield {
            "arch": arch, "kernel": plain_name(name), "threads": int(threads[name], 16), "registers": int(registers),
            "stack": int(stack), **counts,
        }  # fmt: skip


def occupancy(row: dict[str, Any]) -> dict[str, Any]:
    """Of a launch, or, where there is none, by registers and threads."""
    shared = launched(row["kernel"], row["arch"])
    held, bound = blocks(GPUS[row["arch"]], row["registers"], row["threads"], shared or 0)
    return {"shared": shared, "blocks": held, "bound": bound}


def blocks(gpu: Gpu, registers: int, threads: int, shared: int) -> tuple[int, str]:
    """How many a multiprocessor holds, and what keeps it from more."""
    warps = threads // 32
    a_warp = -(-registers * 32 // 256) * 256
    found = {
        "registers": REGISTERS // PARTITIONS // a_warp * PARTITIONS // warps,
        "shared": gpu.shared // (-(-shared // 128) * 128 + RESERVED),
        "threads": gpu.threads // threads,
        "blocks": gpu.blocks,
    }
    bound = min(found, key=lambda what: found[what])
    return found[bound], bound


@cache
def module() -> Any:
    """The kernels on the host machine, which make the plans of calls for GPUs that are not here."""
    found, reason = load(cuda_counts.library())
    if found is None:
        raise RuntimeError(reason)
    return found


def calls_for(kernel: str) -> Iterator[TargetShape]:
    """Calls that may lead to a kernel, by its plain name: to one for short axes with as many keys as it holds first."""
    name, _, D, *rest = re.findall(r"\w+", kernel)
    sizes: Sequence[int] = [LONG]
    if name == "FwdShort":
        sizes = [int(rest[0])]
    elif name == "BwdShort":  # by its tiles of 128 keys
        sizes = range(128 * int(rest[0]), 128 * (int(rest[0]) - 1), -16)
    causal, none = name == "FwdShort" and rest[1] == "false", (0.0, 0.0)
    for keys in sizes:
        yield TargetShape(kernel, 4, 12, 12, keys - 10, 10, int(D), causal, True, none, 0, 0, none, 0)


def launched(kernel: str, arch: str) -> int | None:
    """The shared memory that a launch of a kernel asks for, or None where no call leads to it."""
    called = re.sub(r"\B(?=[A-Z])", "_", kernel.partition("<")[0]).lower() + "_plain" * kernel.endswith("true>")
    for shape in calls_for(kernel):
        call = cuda_counts.call_of(shape, shape.B, shape.Hkv, filled=False)
        forward, backward = cuda_counts.plan(module(), call, GPUS[arch].offers)
        for step in forward + backward:
            if step["kernel"] == called:
                return int(step["shared_bytes"])
    return None


def plain_name(mangled: str) -> str:
    """`FwdShort<BF16, 64, 208, true>`."""
    words = run("c++filt", mangled).strip()
    inner = re.search(r"entry<(.*)>\(", words)
    return re.sub(r"prefixattn::(cuda|hw)::", "", inner[1] if inner else words).replace(" >", ">").strip()


def measure(archs: list[str], only: str, built: Path | None) -> list[dict[str, Any]]:
    units = [unit for unit in UNITS if re.search(only, unit)]
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(made)

        def job(unit: str, arch: str) -> list[dict[str, Any]]:
            start = time.perf_counter()
            rows = list(kernels(compiled(unit, arch, folder), arch))
            print(f"{unit} {arch} {time.perf_counter() - start:.1f}s", file=sys.stderr, flush=True)
            return rows

        if built is None:
            jobs = [(unit, arch) for arch in archs for unit in units]
            found = [row for rows in pool.map(job, *zip(*jobs, strict=True)) for row in rows]
        else:
            cubins = [cubin for unit in units for cubin in unpacked(unit, built, folder)]
            found = [row for cubin, arch in cubins if arch in archs for row in kernels(cubin, arch)]
    for row in found:
        row |= occupancy(row)
        print(*row.values(), file=sys.stderr)
    return sorted(found, key=lambda row: (archs.index(row["arch"]), row["kernel"]))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Blocks that a multiprocessor holds, with a star where shared memory is what keeps it from more."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = [f"| kernel | warps | {' | '.join(archs)} |", "|---" * (2 + len(archs)) + "|"]
    held: dict[str, dict[str, str]] = {}
    for row in rows:
        kernel = f"`{re.sub(r'(BF16|FP16), ', '', row['kernel'])}` | {row['threads'] // 32}"
        words = "-" if row["shared"] is None else f"{row['blocks']}{'*' * (row['bound'] == 'shared')}"
        of_arch = held.setdefault(kernel, {})
        if of_arch.setdefault(row["arch"], words) != words:
            of_arch[row["arch"]] += f", {words}"  # the two types differ
    lines += [f"| {kernel} | {' | '.join(of_arch[arch] for arch in archs)} |" for kernel, of_arch in held.items()]
    return "\n".join(lines)


def compiler() -> str:
    return cuda.version_of([str(cuda.find_toolkit().nvcc)], -2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHS, action="append", help="default: all of them")
    parser.add_argument("--only", default="", help="a pattern to search for in PASS_TYPE_HEAD_DIM")
    parser.add_argument(
        "--built", type=Path, help="a folder of objects, as setup.py leaves it: nothing is compiled again"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(options.arch or list(ARCHS), options.only, options.built)
    print(markdown(rows))
    record = {"compiler": compiler(), "sources": kernel_sources.native_digest(), "rows": rows}
    if options.out:
        write_rows(options.out, record)


if __name__ == "__main__":
    sys.exit(command("cuda_resources.py", main, NOTHING))
