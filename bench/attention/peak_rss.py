"""Peak memory that a forward and backward needs beyond its inputs, in a process of its own.

    python -m bench.attention.peak_rss sdpa_concat < cases.json

Outputs and gradients are held until the peak is read.
"""

import json
import sys
from dataclasses import asdict, replace

import torch

from bench.attention.baselines import BANK_SIZE, BASELINES, OURS, BenchShape, forward_backward, make_inputs
from bench.harness.peak_rss import apart, grown_mib, without_huge_pages


def peak_mib(impl: str, cases: list[tuple[BenchShape, torch.dtype]], threads: int) -> list[float]:
    """MiB for each case; all of one process."""
    asked = [{"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch.")} for shape, dtype in cases]
    mib: list[float] = apart(__name__, impl, threads=threads, asked=json.dumps(asked))
    return mib


def necessary_mib(shape: BenchShape, dtype: torch.dtype) -> float:
    """out, its logsumexp and the five gradients: what no implementation can do without."""
    own = shape.B * shape.D * (2 * shape.H * shape.L + 2 * shape.kv_heads * shape.keys)
    prefix = 2 * shape.kv_heads * shape.P * shape.D * (BANK_SIZE if shape.form == "bank" else 1)
    return ((own + prefix) * dtype.itemsize + 4 * shape.B * shape.H * shape.L) / 2**20


def measure(impl: str, shape: BenchShape, dtype: torch.dtype) -> float:
    attention = OURS[impl] if impl in OURS else BASELINES[impl].attention
    small = replace(shape, B=1, H=2, L=16, P=4)
    forward_backward(attention, *make_inputs(small, dtype), small)
    x, dout = make_inputs(shape, dtype)
    return grown_mib(lambda: forward_backward(attention, x, dout, shape))


if __name__ == "__main__":
    without_huge_pages()
    cases = json.load(sys.stdin)
    print(json.dumps([measure(sys.argv[1], BenchShape(**c["shape"]), getattr(torch, c["dtype"])) for c in cases]))
