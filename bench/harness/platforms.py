"""The two sides of the benchmarks, CPU and GPU: torch's name of it, and its clock."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from bench.harness import timing, timing_gpu


@dataclass(frozen=True)
class Platform:
    device: str  # torch's name
    interleave: Callable[..., Any]  # milliseconds of each call, and how each was clocked
    gemm_gflops: Callable[[torch.dtype, float], float]
    dry: bool = False  # a GPU's code, tried on a CPU


@cache
def platform(name: str) -> Platform:
    if name == "cpu":
        return Platform("cpu", _interleave_on_cpu, timing.gemm_gflops)
    here = torch.cuda.is_available()
    return Platform("cuda" if here else "cpu", timing_gpu.interleave, timing_gpu.gemm_gflops, dry=not here)


def chosen(config: pytest.Config) -> Platform:
    """Of `--device`."""
    return platform(config.getoption("--device"))


def _interleave_on_cpu(calls: dict[str, timing.Call], seconds: float, rounds: tuple[int, int]) -> Any:
    return timing.interleave(calls, seconds, rounds), {name: {} for name in calls}
