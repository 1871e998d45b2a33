"""A prefix of 16,384 rows that 8 samples share, beside its concatenation and beside the same arithmetic without one.

    python -m bench.attention.long_prefix --out bench/results/long-prefix.json
    python -m bench.attention.long_prefix --rounds 2           # a try, which writes nothing

"SDPA" expands and concatenates in the timed call. "own keys" is the op without a prefix, on as many keys of each
sample's own, which are copied outside: it says at which rate the same arithmetic runs. Nothing is masked, as a mask
would cost SDPA its fastest path. Each way must give the output and the gradients of float64 before it is timed. Times
are of the process's processors, in alternation in one process.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention.baselines import joined
from bench.harness.command import Refusal, command
from bench.harness.ways import Row, cell, compared, rows_of
from prefixattn import prefix_attention

B, H, L, P, D = 8, 4, 128, 16384, 64
GOAL = 1.1  # of the time of own keys
PASSES = ("fwd", "fwd+bwd")

Way = Callable[..., Tensor]  # of q, k, v [B, H, L, D] and prefix_k, prefix_v [H, P, D]


def ours(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prefix_k, prefix_v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, joined(prefix_k, k), joined(prefix_v, v))


WAYS: dict[str, Way] = {"ours": ours, "SDPA": sdpa, "own keys": ours}


def made(way: str, grad: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same numbers for each way; of own keys k and v are [B, H, P+L, D], and the prefix has no row."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, H, L, D)] * 3 + [(H, P, D)] * 2
    q, k, v, *prefix = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    if way == "own keys":
        k, v = (joined(rows, own) for rows, own in zip(prefix, (k, v), strict=True))
        prefix = [rows[:, :0] for rows in prefix]
    return [t.detach().requires_grad_(grad) for t in (q, k, v, *prefix)]


def results(way: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = WAYS[way](*inputs)
    return out.detach(), *(torch.autograd.grad(out, inputs, torch.ones_like(out)) if out.requires_grad else ())


def as_of_a_prefix(way: str, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of own keys as those of keys and of the prefix that all samples share."""
    if way != "own keys" or len(found) == 1:
        return found
    out, dq, *both = found[:4]
    return out, dq, *(t[:, :, P:] for t in both), *(t[:, :, :P].sum(0) for t in both)


def check(passes: str, way: str) -> float:
    """The largest error of a way against float64, of the largest number; Refusal if it is no rounding."""
    right = results("SDPA", made("SDPA", passes != "fwd", torch.float64))
    found = as_of_a_prefix(way, results(way, made(way, passes != "fwd")))
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True))
    if not worst < 1e-4:
        raise Refusal(f"{passes}: {way} is {worst:.1e} away from float64; nothing is timed")
    return worst


def measured(rounds: int) -> list[Row]:
    rows = []
    for passes in PASSES:
        print(passes, flush=True)
        calls = {way: partial(results, way, made(way, passes != "fwd")) for way in WAYS}
        rows += rows_of({"pass": passes}, calls, partial(check, passes), rounds, {})
    return rows


def table(rows: list[Row]) -> list[str]:
    """Markdown: processor milliseconds, and what ours take of own keys' time."""
    lines = [f"| pass | ours | SDPA | own keys | ours of own keys (goal {GOAL}) |", "|---|---|---|---|---|"]
    found = {(row["pass"], row["way"]): row for row in rows}
    for passes in PASSES:
        mine, own = (found[passes, way]["cpu_ms"][1] for way in ("ours", "own keys"))
        cells = [f"{mine:.1f} ms", cell(found[passes, "SDPA"], mine), f"{own:.1f} ms", f"{mine / own:.2f}"]
        lines.append(f"| {passes} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    shape = {"B": B, "H": H, "L": L, "P": P, "D": D}
    return compared(
        "A long prefix beside its concatenation; see the file's head.", 7, shape, measured, table, arguments
    )


if __name__ == "__main__":
    sys.exit(command("long_prefix.py", main, "nothing is written"))
