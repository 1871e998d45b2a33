"""A simple share's keys and values by torch's library calls, forward and backward, beside the floor: GPT-2 medium, CPU.

    python -m bench.reparam.simple_share                  # some minutes: prints a table
    python -m bench.reparam.simple_share --out bench/results/simple-share-cpu.json

Answers whether simple share deserves kernels of its own. The floor is the longer of two: the frozen weights of keys and
values read once in each pass, at the rate of a copy; and the products' arithmetic, at the best rate of torch.mm. Both
ceilings are measured in the same rounds as what is held against them, and ratios are of the least of many samples. With
one thread it is the thread's processor time that counts, which other load on the machine disturbs least.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import timing
from bench.harness.command import NOTHING, Refusal, command
from bench.harness.record import header, write_rows

LAYERS, WIDTH, HEADS = 24, 1024, 16
LENGTHS = 10, 200
SQUARE = 1536  # of the torch.mm that stands for the machine's rate


def layer(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer's own projection, queries too, of which keys and values are kept."""
    return torch.addmm(bias, F.layer_norm(vectors, (WIDTH,)), weight)[:, WIDTH:]


def columns(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The columns of keys and values alone."""
    return torch.addmm(bias[WIDTH:], F.layer_norm(vectors, (WIDTH,)), weight[:, WIDTH:])


def both_passes(
    project: Callable[[Tensor, Tensor, Tensor], Tensor],
    vectors: Tensor,  # [N, P, E]
    weights: list[Tensor],  # [E, 3 E], as GPT-2 keeps them
    biases: list[Tensor],
    dkv: Tensor,  # [N, 2, Hkv, P, D]
) -> Tensor:
    vectors = vectors.detach().requires_grad_()
    made = [project(*operands) for operands in zip(vectors, weights, biases, strict=True)]
    kv = torch.stack([one.view(-1, 2, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3) for one in made])
    [grad] = torch.autograd.grad(kv, vectors, dkv)
    return grad


def measure(length: int, seconds: float) -> dict[str, object]:
    torch.manual_seed(0)
    vectors = torch.randn(LAYERS, length, WIDTH)
    weights = [torch.randn(WIDTH, 3 * WIDTH) / 32 for _ in range(LAYERS)]
    biases = [torch.randn(3 * WIDTH) for _ in range(LAYERS)]
    dkv = torch.randn(LAYERS, 2, HEADS, length, WIDTH // HEADS)
    calls: dict[str, Callable[[], object]] = {
        way.__name__: partial(both_passes, way, vectors, weights, biases, dkv) for way in (layer, columns)
    }
    torch.testing.assert_close(*(call() for call in calls.values()))
    source = torch.randn(LAYERS * 2 * WIDTH * WIDTH)  # a copy reads and writes as much as two passes read
    target, square = torch.empty_like(source), torch.randn(SQUARE, SQUARE)
    calls |= {"copy": partial(target.copy_, source), "mm": partial(torch.mm, square, square)}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = timing.interleave(calls, seconds, rounds=(8, 200), clock=clock)
    least = {name: min(ms) for name, ms in samples.items()}
    flops = 2 * LAYERS * 2 * length * WIDTH * 2 * WIDTH
    floor = max(least["copy"], least["mm"] * flops / (2 * SQUARE**3))
    return {
        "op": "simple_share",
        "case": f"gpt2-medium P{length}",
        "rounds": len(samples["copy"]),
        "min_ms": {name: round(ms, 2) for name, ms in least.items()},
        "floor_ms": round(floor, 2),
        "over_floor": {way: round(least[way] / floor, 2) for way in ("layer", "columns")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each length")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.threads < 1:
        raise Refusal(f"--threads is {options.threads}, expected 1 or more")
    torch.set_num_threads(options.threads)
    rows = [measure(length, options.seconds) for length in LENGTHS]
    for row in rows:
        print(*row.values())
    if options.out:
        write_rows(options.out, header() | {"rows": rows})


if __name__ == "__main__":
    sys.exit(command("simple_share.py", main, NOTHING))
