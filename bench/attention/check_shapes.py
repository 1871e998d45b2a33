"""Right or not, before anything is timed: each benchmark shape against float64, in three types, and bit for bit again.

    python -m bench.attention.check_shapes                # a GPU's, at most two samples; exit status 1 if one is wrong
    python -m bench.attention.check_shapes --small        # a few tiny ones, for compute-sanitizer
    python -m bench.attention.check_shapes --baselines    # every baseline as well: which run here at all, and agree

Without a GPU the kernels are interpreted, and the shapes are the small ones.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    import os

    os.environ["TRITON_INTERPRET"] = "1"

from bench.attention import baselines_gpu, bench_prefix_attn
from bench.attention.baselines import OURS, Attention, BenchShape
from bench.attention.suites import suite
from bench.harness.command import NOTHING, command
from bench.harness.platforms import platform

REPEATS = 10 if torch.cuda.is_available() else 1


def verdict(name: str, attention: Attention, shape: BenchShape, dtype: torch.dtype, passes: str, factor: float) -> str:
    """What is wrong, or ""."""
    device = platform("gpu").device
    try:
        bench_prefix_attn.check(name, attention, shape, dtype, passes, factor, device)
        if factor > 2:
            return ""
        again = bench_prefix_attn.run(attention, replace(shape, B=min(shape.B, 2)), dtype, passes, device)
        first = again()
        for _ in range(REPEATS):
            if not all(torch.equal(a, b) for a, b in zip(again(), first, strict=True)):
                return "another call gave other bits"
    except Exception as error:  # a crash is an answer too, and the next shape may do better
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    return ""


def verdicts(shapes: list[BenchShape], dtypes: list[torch.dtype], with_baselines: bool) -> Iterator[tuple[str, str]]:
    gpu = suite("gpu")
    for shape in shapes:
        for dtype in dtypes:
            for passes in gpu.passes:
                if passes == bench_prefix_attn.PREFIX and not shape.P:
                    continue
                case = f"{shape} {str(dtype).removeprefix('torch.')} {passes}"
                yield f"triton {case}", verdict("triton", OURS["triton"], shape, dtype, passes, 2.0)
                for name, baseline in gpu.baselines.items() if with_baselines else ():
                    if baseline.role == "peer" and shape.causal in baseline.causal and shape.P:
                        yield f"{name} {case}", verdict(name, baseline.attention, shape, dtype, passes, 8.0)
        bench_prefix_attn.expected.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0, help="shapes that are not reached are counted")
    options = parser.parse_args()
    here = torch.cuda.is_available()
    shapes = baselines_gpu.all_shapes() if here and not options.small else baselines_gpu.QUICK
    if options.small and here:  # head sizes that Triton's products take on a GPU
        shapes = [replace(s, D=64) for s in shapes]
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if here and not options.small else [torch.float32]
    if here and options.small:
        dtypes = [torch.bfloat16]
    end, right, wrong, late = time.perf_counter() + 60 * options.minutes, 0, [], 0
    for case, words in verdicts(shapes, dtypes, options.baselines):
        ours = case.startswith("triton ")
        if words:
            print(f"{'WRONG' if ours else 'absent or wrong'}: {case}: {words}", flush=True)
        right += not words
        wrong += [case] if words and ours else []
        if time.perf_counter() > end:
            late = 1
            break
    print(f"{right} right, {len(wrong)} of ours wrong" + (", and the time was up" if late else ""))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(command("check_shapes.py", main, NOTHING))
