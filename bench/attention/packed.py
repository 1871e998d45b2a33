"""Sequences packed one behind the other, beside the same sequences padded to one length, as E2E's batches are.

    python -m bench.attention.packed --out bench/results/packed.json     # 64 sequences of 20 to 90 tokens
    python -m bench.attention.packed --rounds 3                          # a try, which writes nothing

Padded are: prefix_attention with key padding, SDPA over concatenated keys with a mask, and, packed, FlexAttention with
a document mask. Each must give the output and the gradients of float64 at the tokens before it is timed. Masks are made
outside the timed call, concatenations inside. Times are of the process's processors, in alternation in one process. A
row of a peer that cannot run has the reason.
"""

import sys
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention.baselines import flex, joined
from bench.harness.command import Refusal, command
from bench.harness.ways import NO_BACKWARD, Row, cell, compared, rows_of
from prefixattn import prefix_attention, prefix_attention_varlen

COUNT, SHORTEST, LONGEST = 64, 20, 90
H, P, D = 12, 5, 64
LENGTHS = torch.randint(SHORTEST, LONGEST + 1, (COUNT,), generator=torch.Generator().manual_seed(0)).tolist()
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)
TOTAL, MOST = int(OFFSETS[-1]), max(LENGTHS)
SEEN = torch.arange(MOST) < torch.tensor(LENGTHS)[:, None]  # [COUNT, MOST], where there is a token
PASSES = ("fwd", "fwd+bwd")

Way = Callable[..., Tensor]  # of q, k, v and prefix_k, prefix_v [H, P, D]


def ours(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:  # q [TOTAL, H, D]
    return prefix_attention_varlen(q, k, v, prefix_k, prefix_v, OFFSETS, OFFSETS, MOST, MOST, is_causal=True)


def padded(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:  # q [COUNT, H, MOST, D]
    return prefix_attention(q, k, v, prefix_k, prefix_v, SEEN[:, None, None], is_causal=True)


@cache
def _visible() -> Tensor:  # [COUNT, 1, MOST, P+MOST]; True attends
    own = torch.ones(MOST, MOST, dtype=torch.bool).tril() & SEEN[:, None, None]
    return F.pad(own, (P, 0), value=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, joined(prefix_k, k), joined(prefix_v, v), attn_mask=_visible())


@cache
def _documents() -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    document = torch.repeat_interleave(torch.arange(COUNT), torch.tensor(LENGTHS))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (j - P).clamp(min=0)
        return (j < P) | ((document[own] == document[i]) & (own <= i))

    return create_block_mask(seen, None, None, TOTAL, P + TOTAL, device="cpu")


def documents(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:  # q [TOTAL, H, D]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return flex(q, joined(prefix_k, k), joined(prefix_v, v), _documents())[0].transpose(0, 1)


PACKED: dict[str, Way] = {"packed": ours, "document mask": documents}
PADDED: dict[str, Way] = {"padded": padded, "SDPA": sdpa}
WAYS = {
    "fwd": {**PACKED, **PADDED},
    "fwd+bwd": {"packed": ours, **PADDED},
}
ABSENT: dict[str, dict[str, str]] = {"fwd": {}, "fwd+bwd": {"document mask": NO_BACKWARD}}


def made(way: str, grad: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same numbers for each way, in its form; padding holds zeros."""
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(TOTAL, H, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    prefix = [torch.randn(H, P, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    if way in PADDED:
        own = [_padded(t).transpose(1, 2) for t in own]
    return [t.detach().requires_grad_(grad) for t in (*own, *prefix)]


def _padded(t: Tensor) -> Tensor:  # [TOTAL, ...] -> [COUNT, MOST, ...]
    whole = t.new_zeros(COUNT, MOST, *t.shape[1:])
    whole[SEEN] = t
    return whole


def results(way: str, passes: str, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    out = WAYS[passes][way](*inputs)
    return out.detach(), *(torch.autograd.grad(out, inputs, dout) if out.requires_grad else ())


def dout_of(way: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones at the tokens, and nothing for padding."""
    return _padded(torch.ones(TOTAL, H, D, dtype=dtype)).transpose(1, 2) if way in PADDED else torch.ones(TOTAL, H, D)


def at_tokens(way: str, found: tuple[Tensor, ...]) -> list[Tensor]:
    """Results whose rows are the packed tokens."""
    return [t.transpose(1, 2)[SEEN] if way in PADDED and t.dim() == 4 else t for t in found]


def check(passes: str, way: str) -> float:
    """The largest error of a way against float64, of the largest number; Refusal if it is no rounding."""
    grad, wide = passes != "fwd", torch.float64
    right = at_tokens("SDPA", results("SDPA", passes, made("SDPA", grad, wide), dout_of("SDPA", wide)))
    found = at_tokens(way, results(way, passes, made(way, grad), dout_of(way)))
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True))
    if not worst < 1e-4:
        raise Refusal(f"{passes}: {way} is {worst:.1e} away from float64; nothing is timed")
    return worst


def measured(rounds: int) -> list[Row]:
    rows = []
    for passes in PASSES:
        print(passes, flush=True)
        calls = {way: partial(results, way, passes, made(way, passes != "fwd"), dout_of(way)) for way in WAYS[passes]}
        rows += rows_of({"pass": passes}, calls, partial(check, passes), rounds, ABSENT[passes])
    return rows


def table(rows: list[Row]) -> list[str]:
    """Markdown: processor milliseconds, and how many times longer than packed the others take."""
    lines = ["| pass | packed | padded | SDPA, padded | FlexAttention, packed |", "|---|---|---|---|---|"]
    found = {(row["pass"], row["way"]): row for row in rows}
    for passes in PASSES:
        mine = found[passes, "packed"]["cpu_ms"][1]
        cells = [cell(found.get((passes, way)), mine) for way in ("padded", "SDPA", "document mask")]
        lines.append(f"| {passes} | {mine:.1f} ms | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    shape = {"sequences": COUNT, "shortest": SHORTEST, "longest": LONGEST, "H": H, "P": P, "D": D}
    return compared("Packed sequences beside padded ones; see the file's head.", 15, shape, measured, table, arguments)


if __name__ == "__main__":
    sys.exit(command("packed.py", main, "nothing is written"))
