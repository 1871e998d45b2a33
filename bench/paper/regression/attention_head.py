"""The bridge to practice: a planted prefix of a frozen attention head, recovered through `prefix_attention`.

A random head attends from one query over three own keys and the prefix. Its outputs are seen with noise, and gradient
descent (Adam) on the squared error looks for the prefix: as separate keys and values, or as one vector p for each row
with key W_K p and value W_V p, the head's own projections (Simple-share). Replicates are the heads of one call.

Rows of a prefix have no weight of their own. So a row to spare is planted: "twice" has three rows of which two are the
same, which is one atom of weight 2 that three rows of weight 1 must split; "distinct" has two rows that differ.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.paper.regression import losses
from bench.paper.regression.families import Truth
from prefixattn import prefix_attention

WIDTH, KEYS, INPUTS = 4, 3, 128
NOISE = 0.1
SIZES = tuple(10**i for i in range(2, 8))
SHARES = ("separate", "simple")
ROWS = {"distinct": (0, 1), "twice": (0, 1, 0)}  # which true atom each planted row is
STEPS, RATE = 2000, 0.05  # the rate falls to zero as a cosine
STARTS = (0.2, 0.2, 1.0)  # distances from the truth, per coordinate


@dataclass(frozen=True)
class Setting:
    share: str
    planted: str
    sizes: Sequence[int] = SIZES
    steps: int = STEPS

    @property
    def label(self) -> str:
        return f"{self.share}-{self.planted}"

    def config(self, n: int, replicates: int, seed: int) -> dict[str, Any]:
        found = {**asdict(self), "n": n, "replicates": replicates, "seed": seed}
        del found["sizes"]
        return found


@dataclass(frozen=True)
class Head:
    """A frozen head at its inputs, one query each."""

    q: Tensor  # [K, 1, 1, D]
    k: Tensor  # [K, 1, S, D]
    v: Tensor  # [K, 1, S, D]
    W_K: Tensor  # [D, D]
    W_V: Tensor  # [D, D]

    def out(self, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        """[H, K, D] of prefixes [H, P, D], each a head of its own."""
        H = len(prefix_k)
        q, k, v = (one.expand(-1, H, -1, -1) for one in (self.q, self.k, self.v))
        return prefix_attention(q, k, v, prefix_k, prefix_v).squeeze(2).transpose(0, 1)


def settings() -> list[Setting]:
    return [Setting(share, planted) for planted in ROWS for share in SHARES]


def head() -> Head:
    draw = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    W_Q, W_K, W_V = (torch.linalg.qr(normal(WIDTH, WIDTH))[0] for _ in range(3))
    x = normal(INPUTS, 1 + KEYS, WIDTH)  # the query's token, then the keys'
    q, own = 1.5 * x[:, None, :1] @ W_Q, x[:, None, 1:]
    return Head(q, own @ W_K, own @ W_V, W_K, W_V)


def planted(frozen: Head, rows: Sequence[int]) -> tuple[Tensor, Truth]:
    """The vectors p of the rows [P, D], and their atoms, with how many rows each is as its weight."""
    p = (
        2.0
        * torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(12), dtype=torch.float64))[0].T
    )
    weights = torch.tensor([float(list(rows).count(atom)) for atom in range(2)], dtype=torch.float64)
    key, value = p @ frozen.W_K, p @ frozen.W_V
    return p[list(rows)], Truth(weights, key, value, torch.cat([weights[:, None], key, value], -1))


def cell(config: dict[str, Any]) -> dict[str, Any]:
    """One sample size of one setting: errors of each replicate, from its best start."""
    frozen, rows, n, R = head(), ROWS[config["planted"]], config["n"], config["replicates"]
    p, true = planted(frozen, rows)
    target = frozen.out((p @ frozen.W_K)[None], (p @ frozen.W_V)[None])  # [1, K, D]
    own = [config["seed"], SHARES.index(config["share"]), len(rows), n]
    random = np.random.default_rng(own)
    count = torch.from_numpy(random.multinomial(n, np.full(INPUTS, 1 / INPUTS), size=R).astype(np.float64))
    noise = torch.from_numpy(random.standard_normal((R, INPUTS, WIDTH)))
    mean = target + NOISE * noise / count.clamp(min=1).sqrt().unsqueeze(-1)
    scale = (count / NOISE**2).repeat_interleave(len(STARTS), 0)  # [H, K]; the starts of a replicate are neighbours
    mean = mean.repeat_interleave(len(STARTS), 0)

    def prefix(free: Tensor) -> tuple[Tensor, Tensor]:
        if config["share"] == "simple":
            return free @ frozen.W_K, free @ frozen.W_V
        return free[..., :WIDTH], free[..., WIDTH:]

    def objective(free: Tensor) -> Tensor:
        residual = frozen.out(*prefix(free)) - mean
        return (scale * residual.square().sum(-1)).sum(-1) / 2  # [H]

    at_truth = p if config["share"] == "simple" else torch.cat([p @ frozen.W_K, p @ frozen.W_V], -1)
    away = torch.tensor(STARTS, dtype=torch.float64).repeat(R)[:, None, None]
    begin = at_truth + away * torch.from_numpy(random.standard_normal((R * len(STARTS), *at_truth.shape)))
    noise = slope_of(lambda free: objective(free) / n, at_truth.expand(R * len(STARTS), -1, -1))
    found, gradient = descend(lambda free: objective(free) / n, begin, config["steps"])
    with torch.no_grad():
        value = objective(found).view(R, -1)
        best = value.argmin(1)
        chosen = found.view(R, len(STARTS), *found.shape[1:])[torch.arange(R), best]
        key, values = prefix(chosen)
        at = losses.cells(torch.ones(R, len(rows), dtype=torch.float64), key, values, true)
        l2 = (frozen.out(key, values) - target).square().sum(-1).mean(-1).sqrt()
        reached = objective(at_truth.expand(R * len(STARTS), -1, -1)).view(R, -1)[:, 0]
    measures = {"l2": l2, "imbalance": at.imbalance}
    for side in ("key", "value"):
        for alone in (True, False):
            measures[f"{side}_{'alone' if alone else 'crowd'}"] = losses.mean_in(at, getattr(at, side), alone)
    lowest = value.min(1).values
    fits = {
        "starts": len(STARTS),
        "worse_than_truth": int((lowest > reached).sum()),
        "gain": float((reached - lowest).mean()),
        "largest_gradient": float((gradient * n**0.5).view(R, -1)[torch.arange(R), best].max()),
        "noise_gradient": float(noise.mean() * n**0.5),
    }
    return {"measures": {name: losses.rounded(one) for name, one in measures.items()}, "fits": fits}


def descend(objective: Any, begin: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Adam for every head at once, and the norms of the last gradients [H]."""
    free = begin.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=RATE, betas=(0.9, 0.99), eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(free).sum().backward()
        optimizer.step()
        schedule.step()
    found = free.detach()
    return found, slope_of(objective, found)


def slope_of(objective: Any, at: Tensor) -> Tensor:
    """The norm of each head's gradient, [H]."""
    free = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(free).sum(), free)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=-1)
