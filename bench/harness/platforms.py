"""The two sides of the benchmarks, CPU and GPU: what is measured there, against whom, and with which clock."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import memory
import peers
import peers_gpu
import timing
import timing_gpu
from peers import OURS, PEERS, Attention, Peer, Shape

Cases = tuple[tuple[Shape, torch.dtype], ...]


@dataclass(frozen=True)
class Platform:
    device: str  # torch's name
    ours: dict[str, Attention]  # the first is measured, unless another is asked for
    peers: dict[str, Peer]
    compiled: tuple[str, ...]  # peers that compile, for which there is a budget
    needs_a_prefix: tuple[str, ...]
    shapes: list[Shape]
    quick: list[Shape]
    dtypes: tuple[torch.dtype, ...]
    passes: tuple[str, ...]
    interleave: Callable[..., Any]
    gemm_gflops: Callable[[torch.dtype, float], float]
    memory: Callable[[str, Attention, Shape, torch.dtype, Cases], dict[str, float]]
    dry: bool = False  # a GPU's code, tried on a CPU

    @staticmethod
    def chosen(config: pytest.Config) -> "Platform":
        return platform(config.getoption("--device"))


@cache
def platform(name: str) -> Platform:
    if name == "cpu":
        return Platform(
            device="cpu",
            ours={name: OURS[name] for name in ("cpu", "reference")},
            peers=PEERS,
            compiled=("flex_concat",),
            needs_a_prefix=(),
            shapes=peers.all_shapes(),
            quick=peers.QUICK,
            dtypes=(torch.float32, torch.bfloat16),
            passes=("fwd", "fwd+bwd"),
            interleave=_interleave_on_cpu,
            gemm_gflops=timing.gemm_gflops,
            memory=_memory_on_cpu,
        )
    here = torch.cuda.is_available()
    return Platform(
        device="cuda" if here else "cpu",
        ours={name: OURS[name] for name in ("triton", "reference")},
        peers=peers_gpu.PEERS if here else peers_gpu.DRY_PEERS,
        compiled=peers_gpu.FLEX,
        needs_a_prefix=peers_gpu.NEED_A_PREFIX,
        shapes=peers_gpu.all_shapes(),
        quick=peers_gpu.QUICK,
        dtypes=(torch.bfloat16,) if here else (torch.float32,),  # the interpreter's bfloat16 is no GPU's
        passes=("fwd", "fwd+bwd", "prefix grads"),
        interleave=timing_gpu.interleave,
        gemm_gflops=timing_gpu.gemm_gflops,
        memory=_memory_on_gpu,
        dry=not here,
    )


def _interleave_on_cpu(calls: dict[str, timing.Call], seconds: float, rounds: tuple[int, int]) -> Any:
    return timing.interleave(calls, seconds, rounds), {name: {} for name in calls}


@cache
def _peak_mib(impl: str, cases: Cases) -> dict[tuple[Shape, torch.dtype], float]:
    mine = [(s, d) for s, d in cases if impl in OURS or s.causal in PEERS[impl].causal]
    return dict(zip(mine, memory.peak_mib(impl, mine, torch.get_num_threads()), strict=True))


def _memory_on_cpu(impl: str, attention: Attention, shape: Shape, dtype: torch.dtype, cases: Cases) -> dict[str, float]:
    peak = _peak_mib(impl, cases)[shape, dtype]
    return {"peak_mib": round(peak, 2), "necessary_mib": round(memory.necessary_mib(shape, dtype), 2)}


def _memory_on_gpu(impl: str, attention: Attention, shape: Shape, dtype: torch.dtype, cases: Cases) -> dict[str, float]:
    x, dout = peers.make_inputs(shape, dtype, device=platform("gpu").device)
    measured = timing_gpu.peak_and_saved_mib(
        lambda: attention(x, shape), lambda: peers.forward_backward(attention, x, dout, shape)
    )
    if measured is None:
        return {}
    peak, saved = measured
    needed = memory.necessary_mib(shape, dtype)
    return {"peak_mib": round(peak, 2), "saved_mib": round(saved, 2), "necessary_mib": round(needed, 2)}
