"""`prefix_attention` on this CPU beside concatenation, SDPA without a prefix and FlexAttention; `make bench` runs it.

    python -m pytest bench/bench_prefix_attn.py            # 7 minutes or so, then bench/results/<device>.json
    python -m pytest bench/bench_prefix_attn.py --quick    # two small shapes, no file

Each case checks our numbers and every peer's against float64 before it times them, side by side in one process.
pytest-benchmark's own table times ours once more, for its --benchmark-compare.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import memory
from peers import (
    OURS,
    PEERS,
    QUICK,
    Attention,
    Inputs,
    Shape,
    all_shapes,
    eager_concat,
    forward,
    forward_backward,
    make_inputs,
)
from prefixattn.testing import assert_as_accurate
from record import Record
from timing import interleave, quantiles

NAMES = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
DTYPES = (torch.float32, torch.bfloat16)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = QUICK if metafunc.config.getoption("--quick") else all_shapes()
    cases = [(s, d, p) for s in shapes for d in DTYPES for p in ("fwd", "fwd+bwd")]
    ids = [f"{s}-{str(d).removeprefix('torch.')}-{p}" for s, d, p in cases]
    metafunc.parametrize(("shape", "dtype", "passes"), cases, ids=ids)


def run(attention: Attention, shape: Shape, dtype: torch.dtype, passes: str) -> Callable[[], tuple[Tensor, ...]]:
    x, dout = make_inputs(shape, dtype)
    if passes == "fwd":
        frozen = Inputs(*(t.detach() for t in x))
        return lambda: (forward(attention, frozen, shape),)
    return partial(forward_backward, attention, x, dout, shape)


@cache
def expected(shape: Shape, dtype: torch.dtype, passes: str) -> list[tuple[Tensor, Tensor]]:
    """Plain PyTorch in `dtype`, and in float64, on the same numbers: the output and, if asked, each gradient."""
    x, dout = make_inputs(shape, dtype)
    wide = type(x)(*(t.detach().double().requires_grad_() for t in x))
    if passes == "fwd":
        return [(forward(eager_concat, x, shape), forward(eager_concat, wide, shape))]
    same = forward_backward(eager_concat, x, dout, shape)
    return list(zip(same, forward_backward(eager_concat, wide, dout.double(), shape), strict=True))


def check(impl: str, attention: Attention, shape: Shape, dtype: torch.dtype, passes: str, factor: float) -> None:
    small = replace(shape, B=min(shape.B, 2))  # more samples are more of the same
    actual = run(attention, small, dtype, passes)()
    for name, got, (same, exact) in zip(NAMES, actual, expected(small, dtype, passes), strict=False):
        assert_as_accurate(f"{impl} {name}", got, same, exact, factor)


def participants(
    ours: str, shape: Shape, dtype: torch.dtype, passes: str, record: Record
) -> tuple[dict[str, Attention], dict[str, str]]:
    """Who takes part in this case, checked; and who does not, with the reason."""
    calls, absent = {ours: OURS[ours]}, {}
    check(ours, OURS[ours], shape, dtype, passes, factor=2.0)
    for name, peer in PEERS.items():
        if shape.causal not in peer.causal:
            continue
        if name == "flex_concat" and passes == "fwd+bwd":
            absent[name] = "FlexAttention has no backward on a CPU"
            continue
        if name == "flex_concat" and record.compile_seconds >= record.compile_budget:
            absent[name] = f"not compiled: this run's {record.compile_budget:.0f} s for compiling are used up"
            continue
        start = time.perf_counter()
        try:
            run(peer.attention, shape, dtype, passes)()
        except Exception as error:  # a peer that cannot run is a line in the record, not the end of it
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        if name == "flex_concat":
            record.compile_seconds += time.perf_counter() - start
        if peer.role != "floor":
            # the same function, not our standard of accuracy: a peer may round its weights to its inputs' type
            check(name, peer.attention, shape, dtype, passes, factor=8.0)
        calls[name] = peer.attention
    return calls, absent


@cache
def peak_mib(impl: str, cases: tuple[tuple[Shape, torch.dtype], ...]) -> dict[tuple[Shape, torch.dtype], float]:
    mine = [(s, d) for s, d in cases if impl in OURS or s.causal in PEERS[impl].causal]
    return dict(zip(mine, memory.peak_mib(impl, mine, torch.get_num_threads()), strict=True))


def test_prefix_attn(shape, dtype, passes, benchmark, record: Record, request: pytest.FixtureRequest) -> None:
    ours, quick = request.config.getoption("--ours"), request.config.getoption("--quick")
    seconds, start = record.seconds_for_case(), time.perf_counter()
    attentions, absent = participants(ours, shape, dtype, passes, record)
    calls = {name: run(attention, shape, dtype, passes) for name, attention in attentions.items()}
    seconds = max(0.1, seconds - (time.perf_counter() - start))
    at_least = 5 if seconds > 0.1 else 3  # the run is late
    samples = interleave(calls, min(seconds, 4.0), rounds=(2, 2) if quick else (at_least, 40))

    case = {"op": "prefix_attn", "pass": passes, "dtype": str(dtype), "shape": asdict(shape)}
    gflop = shape.gflop(backward=passes == "fwd+bwd")
    for impl, ms in samples.items():
        row = case | {"impl": impl, "role": "ours" if impl == ours else PEERS[impl].role}
        row |= {"ms": [round(t, 4) for t in quantiles(ms)], "min_ms": round(min(ms), 4), "rounds": len(ms)}
        if row["role"] != "floor":  # a floor does other arithmetic
            row["gflops"] = round(gflop / quantiles(ms)[1] * 1e3, 1)
        if passes == "fwd+bwd" and (row["role"] == "ours" or (row["role"] == "peer" and not quick)):
            row["peak_mib"] = round(peak_mib(impl, record.cases)[shape, dtype], 2)
            row["necessary_mib"] = round(memory.necessary_mib(shape, dtype), 2)
        record.rows.append(row)
    record.rows += [case | {"impl": impl, "role": PEERS[impl].role, "absent": why} for impl, why in absent.items()]

    benchmark.extra_info.update(case)
    benchmark.pedantic(calls[ours], rounds=2 if quick else 3)
