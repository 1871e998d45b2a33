"""The CUDA kernels on a GPU: right, the same a thousand times over, and how long they take beside Triton's.

    python -m bench.attention.cuda_kernels                            # exit status 1 if a shape is wrong
    python -m bench.attention.cuda_kernels --out build/cuda.json      # and the table as a file
    python -m bench.attention.cuda_kernels --small                    # a few tiny shapes, for compute-sanitizer

Without a GPU it takes the tiny shapes on the machine that PREFIXATTN_CUDA_HOST names, and times nothing.
"""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.attention import baselines_gpu, bench_prefix_attn
from bench.attention.baselines import OURS, Attention, BenchShape, ours, sdpa_concat
from bench.harness import timing_gpu
from bench.harness.command import NOTHING, command
from bench.harness.record import header, write
from bench.harness.timing import quantiles

HERE = torch.cuda.is_available()
DEVICE = "cuda" if HERE else "cpu"
REPEATS = 1000
SMALL = [  # each kernel once: short and long, with and without a bank
    BenchShape("vit", 2, 2, 37, 10, 64, form="packed"),
    BenchShape("gpt", 2, 4, 70, 5, 128, Hkv=2),
    BenchShape("gpt", 3, 2, 9, 20, 64, S=9, form="bank"),
    BenchShape("gpt", 1, 2, 150, 120, 64),
    BenchShape("gpt", 1, 2, 40, 230, 128),
]
CUDA: Attention = partial(ours, backend="cuda")


def wrong(shape: BenchShape, dtype: torch.dtype, passes: str, repeats: int) -> str:
    """What is wrong, or ""."""
    try:
        bench_prefix_attn.check("cuda", CUDA, shape, dtype, passes, 2.0, DEVICE)
        again = bench_prefix_attn.run(CUDA, replace(shape, B=min(shape.B, 2)), dtype, passes, DEVICE)
        first = again()
        for _ in range(repeats):
            if not all(torch.equal(a, b) for a, b in zip(again(), first, strict=True)):
                return "another call gave other bits"
    except Exception as error:  # a crash is an answer too, and the next shape may do better
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    return ""


def timed(shape: BenchShape, passes: str, seconds: float) -> dict[str, Any]:
    """Milliseconds at three quantiles, in alternation."""
    ways: dict[str, Attention] = {"cuda": CUDA, "triton": OURS["triton"], "sdpa_concat": sdpa_concat}
    calls = {name: bench_prefix_attn.run(way, shape, torch.bfloat16, passes, DEVICE) for name, way in ways.items()}
    samples, clocks = timing_gpu.interleave(calls, seconds)
    found = {name: quantiles(ms) for name, ms in samples.items()}
    print(
        f"{shape} {passes}: " + ", ".join(f"{name} {1e3 * p50:.1f} us" for name, (_, p50, _) in found.items()),
        flush=True,
    )
    return {"shape": str(shape), "pass": passes, "ms": found, "clocks": clocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0, help="shapes that are not reached are counted")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    small = options.small or not HERE
    shapes = SMALL if small else list(baselines_gpu.TARGETS)
    cases = [
        (s, d, p) for s in shapes for d in (torch.bfloat16, torch.float16) for p in ("fwd", "fwd+bwd", "prefix grads")
    ]
    end, bad, reached = time.perf_counter() + 60 * options.minutes, 0, 0
    for shape, dtype, passes in cases:
        if time.perf_counter() > end:
            break
        reached += 1
        if words := wrong(shape, dtype, passes, 2 if small else REPEATS):
            bad += 1
            print(f"WRONG: {shape} {dtype} {passes}: {words}", flush=True)
    print(f"{reached - bad} right, {bad} wrong, {len(cases) - reached} not reached")
    if HERE and not small and not bad:
        each = max(0.5, (end - time.perf_counter()) / (2 * len(shapes)))
        rows = [timed(shape, passes, min(each, 5.0)) for shape in shapes for passes in ("fwd", "fwd+bwd")]
        if options.out:
            write(options.out, header(DEVICE) | {"rows": rows})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    sys.exit(command("cuda_kernels.py", main, NOTHING))
