"""Finds launch parameters for the Triton kernels and prints the table of kernels/table.py to paste.

    python -m bench.static.tune                       # on a GPU: the fastest candidate that fits, timed, for this GPU
    python -m bench.static.tune --arch sm_80          # without one: the first candidate that fits, compiled, not run
    python -m bench.static.tune --kernel fwd --type bf16 --head-dim 64
    python -m bench.static.tune --arch sm_90 --every  # compiles all candidates into Triton's cache, before a timed run

Candidates stand in the order in which they are preferred unmeasured: large tiles first. One fits if no register spills
and its shared memory suffices in every case of triton_resources.py. Each verdict is printed at once; an interrupted run
has lost nothing but the table.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel does not compile

import torch

from bench.harness.command import NOTHING, command
from bench.harness.record import write
from bench.static.triton_resources import ALL, CASES, TARGETS, TYPES, Case, Target, launched, operands, resources
from prefixattn.attention.call import Given, Wants
from prefixattn.kernels import table
from prefixattn.kernels.launch_bwd import backward
from prefixattn.kernels.launch_fwd import forward
from prefixattn.kernels.table import Launch

KERNELS = ("fwd", "fwd_medium", "fwd_short", "fwd_fold", "bwd_short", "bwd_keys", "bwd_prefix", "bwd_queries")
WIDTHS = 64, 128, 256
# queries, keys of a tile; warps; stages
HALF = {
    64: """128,64,4,3 64,128,8,2 128,64,8,2 64,64,4,3 64,64,4,2 64,64,4,1 64,32,4,2 64,32,4,1 32,32,4,1""",
    128: """128,64,8,3 128,64,8,2 64,128,8,2 64,64,8,2 64,64,4,2 64,64,4,1 64,32,4,2 32,64,4,2 32,64,8,1 64,32,8,1
        32,32,4,1 16,32,4,1""",
    256: """64,64,8,2 64,32,8,2 64,32,8,1 32,64,8,1 64,32,4,1 32,32,8,1 32,32,4,1 16,32,8,1 16,32,4,1 16,16,4,1
        16,16,8,1""",
}
FLOAT = "64,32,8,1 32,32,4,1 32,32,8,1 16,32,4,1 32,16,4,1 16,16,4,1 16,16,8,1"


def candidates(kernel: str, dtype: str, width: int) -> Iterator[Launch]:
    """In the order of preference; a kernel without loops needs no stages."""
    for numbers in (HALF[width] if dtype != "fp32" else FLOAT).split():
        plan = Launch(*map(int, numbers.split(",")))
        if kernel in ("fwd_short", "bwd_short"):
            if plan.stages > 1 or max(plan.block_m, plan.block_n) > 64:
                continue
        # a product's rows are split over the warps, 16 each: more warps than that would compute the same twice
        rows = plan.block_n if kernel in ("bwd_keys", "bwd_prefix") else plan.block_m
        if dtype == "fp32" or rows >= 16 * plan.warps or plan.block_m * plan.block_n <= 2048 or width == 256:
            yield plan


def cases(kernel: str) -> dict[str, Case]:
    """The cases that may launch the kernel with these parameters."""
    plain = {name: case for name, case in CASES.items() if not case.features}
    if kernel.startswith("bwd"):
        return {name: case for name, case in plain.items() if case.backward}
    if kernel in ("fwd", "fwd_medium"):
        medium = kernel == "fwd_medium"
        return {name: case for name, case in plain.items() if (case.L <= table.MEDIUM_QUERIES) == medium}
    return plain


def objection(kernel: str, arch: str, dtype: str, D: int, device: str) -> str:
    """Why the parameters on trial do not fit, in words; "" if they do."""
    compiles, launch = 0, f"prefix_attn_{kernel.removesuffix('_medium')}"
    for name, case in cases(kernel).items():
        try:
            for compiled in launched(case, D, TYPES[dtype], launch, device):
                compiles += 1
                use = resources(compiled.result)
                if use["stack"]:
                    return f"spills {use['stack']} bytes in {name}"
                if use["shared_kib"] > table.SHARED_KIB[arch]:
                    return f"needs {use['shared_kib']} KiB in {name}"
        except Exception as error:  # whatever a compiler raises is an answer
            return f"{type(error).__name__} in {name}"
    return "" if compiles else "no case launches it"


def milliseconds(kernel: str, dtype: str, D: int) -> float:
    """The sum over the cases of the pass that launches the kernel, medians."""
    from triton.testing import do_bench

    total = 0.0
    for case in cases(kernel).values():
        # two key heads a sample: enough of them for the kernel that wants one for each processor
        call = operands(case, D, TYPES[dtype], batch=128, device="cuda")
        if kernel.startswith("fwd"):
            run = partial(forward, call, False)
        else:
            out, lse, *_ = forward(call, Wants())
            run = partial(backward, call, Given(out, None, out, lse), ALL, None)
        total += do_bench(run, return_mode="median")
    return total


def best(kernel: str, arch: str, dtype: str, width: int, timed: bool, every: bool, end: float) -> Launch | None:
    found: dict[Launch, float] = {}
    for plan in candidates(kernel, dtype, width):
        start = time.perf_counter()
        if start > end:
            print(f"{arch} {kernel} {dtype} {width}: the time is up before {tuple(plan)}", file=sys.stderr, flush=True)
            break
        table.trial = {kernel: plan}
        words = objection(kernel, arch, dtype, width, "cuda" if timed else "cpu")
        if not words:
            found[plan] = milliseconds(kernel, dtype, width) if timed else 0.0
        words = words or (f"{found[plan]:.3f} ms" if timed else "fits")
        took = f"{time.perf_counter() - start:.0f}s"
        print(f"{arch} {kernel} {dtype} {width} {tuple(plan)}: {words} ({took})", file=sys.stderr, flush=True)
        if found and not timed and not every:
            break
    table.trial = {}
    # the first of equals: unmeasured all are equal, and preferred in this order
    return min(found, key=lambda plan: found[plan]) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TARGETS, help="default: that of the GPU that is here")
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--type", choices=TYPES, action="append")
    parser.add_argument("--head-dim", type=int, choices=WIDTHS, action="append")
    parser.add_argument("--every", action="store_true", help="without a GPU: go on after the first that fits")
    parser.add_argument("--minutes", type=float, default=60.0, help="candidates that are not reached are named")
    parser.add_argument("--out", type=Path, help="also write the choices as JSON")
    options = parser.parse_args()
    timed = torch.cuda.is_available() and options.arch is None
    if not timed and options.arch is None:
        parser.error("there is no GPU here: name an architecture with --arch to choose by resources alone")
    arch = options.arch or table.architecture(torch.device("cuda"))
    if not timed:
        Target(TARGETS[arch]).activate(arch)
    rows, end = {}, time.perf_counter() + 60 * options.minutes
    for dtype in options.type or TYPES:
        for kernel in options.kernel or KERNELS:
            for width in options.head_dim or WIDTHS:
                if dtype == "fp32" and kernel in ("fwd_short", "bwd_short"):
                    continue
                if plan := best(kernel, arch, dtype, width, timed, options.every, end):
                    rows[f"{arch} {dtype} {kernel} {width}"] = plan
    print(f"# {arch}, {'measured' if timed else 'not measured'}")
    for name, plan in rows.items():
        _, dtype, kernel, width = name.split()
        kind = "float" if dtype == "fp32" else "half"
        print(f'("{kernel}", "{kind}"): {{{width}: Launch{tuple(plan)}}},')
    if options.out:
        write(options.out, {name: list(plan) for name, plan in rows.items()})


if __name__ == "__main__":
    sys.exit(command("tune.py", main, NOTHING))
