"""A causal window beside what PyTorch offers for one: SDPA with a dense mask, and FlexAttention's blocks.

    python -m bench.attention.windows --out bench/results/windows.json     # S of 1k, 4k and 8k
    python -m bench.attention.windows --keys 1024 --rounds 3               # a try, which writes nothing

Each way must give the output and the gradients of float64 before it is timed. Masks are made outside the timed call,
concatenations inside. Times are of the process's processors, in alternation in one process. A row of a peer that
cannot run has the reason. On the same commit the command goes on with the lengths that its JSON lacks.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention.baselines import flex, joined
from bench.harness.command import Refusal, command
from bench.harness.record import header, kept, write_rows
from bench.harness.ways import NO_BACKWARD, Row, cell, rows_of
from prefixattn import prefix_attention

LENGTHS = (1024, 4096, 8192)
WINDOW = 512  # keys that a query sees, with its own
B, H, P, D = 1, 4, 10, 64
PASSES = ("fwd", "fwd+bwd")

Way = Callable[..., Tensor]  # of q, k, v [B, H, S, D] and prefix_k, prefix_v [H, P, D]


def ours(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prefix_k, prefix_v, is_causal=True, window_size=(WINDOW - 1, -1))


@cache
def visible(S: int) -> Tensor:  # [S, P+S]; True attends
    own = torch.ones(S, S, dtype=torch.bool).tril().triu(1 - WINDOW)
    return torch.cat([torch.ones(S, P, dtype=torch.bool), own], 1)


def dense_mask(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, joined(prefix_k, k), joined(prefix_v, v), attn_mask=visible(q.shape[2]))


@cache
def _blocks(S: int) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < P) | ((j - P <= i) & (j - P > i - WINDOW))

    return create_block_mask(seen, None, None, S, P + S, device="cpu")


def blocks(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return flex(q, joined(prefix_k, k), joined(prefix_v, v), _blocks(q.shape[2]))


WAYS: dict[str, dict[str, Way]] = {
    "fwd": {"ours": ours, "dense mask": dense_mask, "flex": blocks},
    "fwd+bwd": {"ours": ours, "dense mask": dense_mask},
}
ABSENT: dict[str, dict[str, str]] = {"fwd": {}, "fwd+bwd": {"flex": NO_BACKWARD}}


def made(S: int, grad: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, S, H, D)] * 3 + [(H, P, D)] * 2
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    own = [t.transpose(1, 2) for t in tensors[:3]]  # as models make them
    return [t.detach().requires_grad_(grad) for t in (*own, *tensors[3:])]


def results(way: Way, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = way(*inputs)
    return out.detach(), *(torch.autograd.grad(out, inputs, torch.ones_like(out)) if out.requires_grad else ())


def check(S: int, passes: str, way: str) -> float:
    """The largest error of a way against float64, of the largest number; Refusal if it is no rounding."""
    right = results(dense_mask, made(S, passes != "fwd", torch.float64))
    found = results(WAYS[passes][way], made(S, passes != "fwd"))
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True))
    if not worst < 1e-4:
        raise Refusal(f"S {S}, {passes}: {way} is {worst:.1e} away from float64; nothing is timed")
    return worst


def measured(S: int, rounds: int) -> list[Row]:
    rows = []
    for passes in PASSES:
        print(f"S {S}, {passes}", flush=True)
        inputs, case = made(S, passes != "fwd"), {"S": S, "pass": passes}
        calls = {name: partial(results, way, inputs) for name, way in WAYS[passes].items()}
        rows += rows_of(case, calls, partial(check, S, passes), rounds, ABSENT[passes])
    return rows


def table(rows: list[Row]) -> list[str]:
    """Markdown: processor milliseconds, and how many times longer than ours the others take."""
    lines = ["| S | pass | ours | dense mask | FlexAttention |", "|---|---|---|---|---|"]
    found = {(row["S"], row["pass"], row["way"]): row for row in rows}
    for S in sorted({row["S"] for row in rows}):
        for passes in PASSES:
            mine = found[S, passes, "ours"]["cpu_ms"][1]
            cells = [f"{mine:.1f} ms", *(cell(found.get((S, passes, way)), mine) for way in ("dense mask", "flex"))]
            lines.append(f"| {S:,} | {passes} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Windows beside dense masks; see the file's head.")
    parser.add_argument("--keys", type=int, nargs="+", default=LENGTHS, help="S, keys and queries")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each way that are timed")
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    args = parser.parse_args(arguments)
    if min(args.keys) < 1 or args.rounds < 1:
        raise Refusal("--keys and --rounds: expected numbers from 1 up")
    head = header() | {"shape": {"B": B, "H": H, "P": P, "D": D}, "window": WINDOW}
    rows = (
        []
        if args.out is None
        else kept(args.out, head, ("device", "threads", "torch", "commit", "tree", "shape", "window"))
    )
    for S in args.keys:
        if any(row["S"] == S for row in rows):
            continue
        rows += measured(S, args.rounds)
        if args.out is not None:
            write_rows(args.out, head | {"rows": rows})
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(command("windows.py", main, "the same command goes on with the lengths that are missing"))
