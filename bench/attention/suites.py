"""What is measured on each platform, and beside what."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from bench.attention import baselines, baselines_gpu, peak_rss
from bench.attention.baselines import BASELINES, OURS, Attention, Baseline, BenchShape
from bench.harness import timing_gpu
from bench.harness.platforms import Platform, platform

Cases = tuple[tuple[BenchShape, torch.dtype], ...]


@dataclass(frozen=True)
class Suite:
    platform: Platform
    ours: dict[str, Attention]  # the first is measured, unless another is asked for
    baselines: dict[str, Baseline]
    compiled: tuple[str, ...]  # baselines that compile, for which there is a budget
    needs_a_prefix: tuple[str, ...]
    shapes: list[BenchShape]
    quick: list[BenchShape]
    dtypes: tuple[torch.dtype, ...]
    passes: tuple[str, ...]
    peak: Callable[[str, Attention, BenchShape, torch.dtype, Cases], dict[str, float]]

    @property
    def device(self) -> str:
        return self.platform.device


def chosen(config: pytest.Config) -> Suite:
    """Of `--device`."""
    return suite(config.getoption("--device"))


@cache
def suite(name: str) -> Suite:
    here = platform(name)
    if name == "cpu":
        return Suite(
            platform=here,
            ours={name: OURS[name] for name in ("cpu", "reference")},
            baselines=BASELINES,
            compiled=("flex_concat",),
            needs_a_prefix=(),
            shapes=baselines.all_shapes(),
            quick=baselines.QUICK,
            dtypes=(torch.float32, torch.bfloat16),
            passes=("fwd", "fwd+bwd"),
            peak=_peak_on_cpu,
        )
    return Suite(
        platform=here,
        ours={name: OURS[name] for name in ("triton", "reference")},
        baselines=baselines_gpu.DRY_BASELINES if here.dry else baselines_gpu.BASELINES,
        compiled=baselines_gpu.FLEX,
        needs_a_prefix=baselines_gpu.NEED_A_PREFIX,
        shapes=baselines_gpu.all_shapes(),
        quick=baselines_gpu.QUICK,
        dtypes=(torch.float32,) if here.dry else (torch.bfloat16,),  # the interpreter's bfloat16 is no GPU's
        passes=("fwd", "fwd+bwd", "prefix grads"),
        peak=_peak_on_gpu,
    )


@cache
def _peak_mib(impl: str, cases: Cases) -> dict[tuple[BenchShape, torch.dtype], float]:
    mine = [(s, d) for s, d in cases if impl in OURS or s.causal in BASELINES[impl].causal]
    return dict(zip(mine, peak_rss.peak_mib(impl, mine, torch.get_num_threads()), strict=True))


def _peak_on_cpu(
    impl: str, attention: Attention, shape: BenchShape, dtype: torch.dtype, cases: Cases
) -> dict[str, float]:
    peak = _peak_mib(impl, cases)[shape, dtype]
    return {"peak_mib": round(peak, 2), "necessary_mib": round(peak_rss.necessary_mib(shape, dtype), 2)}


def _peak_on_gpu(
    impl: str, attention: Attention, shape: BenchShape, dtype: torch.dtype, cases: Cases
) -> dict[str, float]:
    x, dout = baselines.make_inputs(shape, dtype, device=platform("gpu").device)
    measured = timing_gpu.peak_and_saved_mib(
        lambda: attention(x, shape), lambda: baselines.forward_backward(attention, x, dout, shape)
    )
    if measured is None:
        return {}
    peak, saved = measured
    needed = peak_rss.necessary_mib(shape, dtype)
    return {"peak_mib": round(peak, 2), "saved_mib": round(saved, 2), "necessary_mib": round(needed, 2)}
