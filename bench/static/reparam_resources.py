"""As triton_resources.py, for the kernels of the reparameterization and its fused steps: what they need on absent GPUs.

python -m bench.static.reparam_resources              # prints registers, spills and shared memory
python -m bench.static.reparam_resources --out bench/results/reparam_resources.json
python -m bench.static.reparam_resources --arch sm_90 --only P200
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from bench.harness.command import NOTHING, command
from bench.harness.record import write
from bench.static import kernel_sources
from bench.static.reparam_counts import CASES, Case, moment, step
from bench.static.triton_resources import TARGETS, Compiled, Target, resources
from prefixattn.kernels import launch_reparam
from prefixattn.reparam.call import Form
from prefixattn.reparam.moments8 import Moment8

SOURCES = kernel_sources.digest("launch_reparam.py")
COMPILED = (
    "GPT-2m P5",
    "GPT-2m P10",
    "GPT-2m P50",
    "GPT-2m P100",
    "GPT-2m P200",
    "GPT-2m P500",
    "LLaMA-7B P30",
    "ViT-B P10",
)


def rest(case: Case) -> None:
    """What `step` does not launch: the gradients of kv, SGD, and AdamW with what is optional."""
    G, P, _, M, n, Hkv, D, interleaved, *_ = case
    form = Form(n, Hkv, D, interleaved, "tanh")
    kv = torch.empty(G * n, 2, Hkv, P, D, dtype=torch.bfloat16, device="meta")
    h, w2, dy = (torch.empty(G, *size, device="meta") for size in ((P, M), (case.outputs, M), (P, case.outputs)))
    launch_reparam.matrix_gradient(kv, h, w2, form)
    launch_reparam.hidden_gradient(kv, w2, P, form)
    halves = torch.empty_like(w2, dtype=torch.bfloat16)
    numbers = (1.0, 1.0, 0.1, 0.999, 0.001, 1e-8, 1e-3, 1.0, -7)
    launch_reparam.adamw(w2, halves, halves, (None, None), h, dy, None, numbers, want_dh=False)
    m, v = moment(w2, True), moment(w2, False)
    for first, second in ((m, v), (m, halves), (halves, v)):
        kept = [t.code if isinstance(t, Moment8) else t for t in (first, second)]
        scales = tuple(t.scale if isinstance(t, Moment8) else None for t in (first, second))
        launch_reparam.adamw(w2, *kept, scales, h, kv, form, numbers, want_dh=True)
    flags = {"nesterov": True, "first": False, "want_dh": True}
    launch_reparam.sgd(w2, w2, h, kv, form, (1.0, 1e-3, 0.9, 1.0, 0.1), **flags)


def launched(case: Case) -> list[Compiled]:
    found: list[Compiled] = []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        start = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(Compiled(self.__name__, time.perf_counter() - start, compiled))

    run, JITFunction.run = JITFunction.run, compile_only
    try:
        step(case)
        rest(case)
    finally:
        JITFunction.run = run
    return found


def measure(arch: str, only: str = "") -> Iterator[dict[str, Any]]:
    Target(TARGETS[arch]).activate(arch)
    seen = set()
    for name in COMPILED:
        if only and not re.search(only, name):
            continue
        for compiled in launched(CASES[name]):
            if compiled.result.hash in seen:
                continue
            seen.add(compiled.result.hash)
            meta = compiled.result.metadata
            row = {"arch": arch, "case": name, "kernel": compiled.kernel, "warps": meta.num_warps}
            row |= {"stages": meta.num_stages, **resources(compiled.result)}
            print(*row.values(), f"{compiled.seconds:.1f}s", file=sys.stderr, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--only", default="", help="a pattern to search for in a case's name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for arch in options.arch or TARGETS for row in measure(arch, options.only)]
    about = {"triton": triton.__version__, "table": launch_reparam.DATE, "sources": SOURCES}
    record = {**about, "rows": rows}
    if options.out:
        write(options.out, record)


if __name__ == "__main__":
    sys.exit(command("reparam_resources.py", main, NOTHING))
