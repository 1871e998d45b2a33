"""Clocks for comparing implementations side by side in one process, and the ceiling to hold them against."""

import time
from collections.abc import Callable

import numpy as np
import torch

Call = Callable[[], object]


def interleave(
    calls: dict[str, Call],
    seconds: float,
    rounds: tuple[int, int] = (5, 60),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each call, one sample a round for `seconds` or for `rounds` (at least, at most).

    Every round runs every call once and every other round backwards, so that a drift of the machine, and what a call
    leaves behind in the caches, falls on all of them alike.
    """
    names = list(calls)
    for name in names:  # first calls allocate, load and compile
        calls[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    at_least, at_most = rounds
    end = time.perf_counter() + seconds
    for done in range(at_most):
        if done >= at_least and time.perf_counter() > end:
            break
        for name in names if done % 2 == 0 else reversed(names):
            start = clock()
            calls[name]()
            samples[name].append((clock() - start) * 1e3)
    return samples


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    p20, p50, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return p20, p50, p80


def gemm_gflops(dtype: torch.dtype, seconds: float = 1.5) -> float:
    """The best rate of `torch.mm` over sizes that are bound by arithmetic, with the threads set now."""
    best = 0.0
    for n in (512, 1024, 1536):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        out = torch.empty(n, n, dtype=dtype)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> torch.Tensor:
            return torch.mm(a, b, out=out)

        samples = interleave({"mm": multiply}, seconds / 3, rounds=(3, 1000))["mm"]
        best = max(best, 2 * n**3 / min(samples) * 1e-6)
    return best
