"""`prefix_attention` beside concatenation, SDPA without a prefix and FlexAttention; `make bench` runs it on this CPU.

    python -m pytest bench/attention/bench_prefix_attn.py                 # 7 minutes, then bench/results/<device>.json
    python -m pytest bench/attention/bench_prefix_attn.py --device gpu    # on a GPU, with its own baselines and shapes
    python -m pytest bench/attention/bench_prefix_attn.py --quick         # a few small shapes, no file

Each case checks our numbers and every baseline's against float64 before it times them, side by side in one process.
pytest-benchmark's own table times ours once more, for its --benchmark-compare.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from bench.attention import suites
from bench.attention.baselines import Attention, BenchShape, eager_concat, forward, forward_backward, make_inputs
from bench.attention.record import Record
from bench.attention.suites import Suite
from bench.harness.command import NOTHING, interrupted
from bench.harness.record import RESULTS, device_slug
from bench.harness.timing import quantiles
from bench.harness.ways import NO_BACKWARD, in_words
from prefixattn.testing.attention import assert_as_accurate

FWD, BOTH, PREFIX = "fwd", "fwd+bwd", "prefix grads"  # the last: below a frozen trunk, nothing else wants a gradient


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suites.chosen(metafunc.config)
    shapes = suite.quick if metafunc.config.getoption("--quick") else suite.shapes
    cases = [(s, d, p) for s in shapes for d in suite.dtypes for p in suite.passes if s.P or p != PREFIX]
    ids = [f"{s}-{str(d).removeprefix('torch.')}-{p.replace(' ', '-')}" for s, d, p in cases]
    metafunc.parametrize(("shape", "dtype", "passes"), cases, ids=ids)


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    quick, out = request.config.getoption("--quick"), request.config.getoption("--out")
    cases = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function)]
    suite = suites.chosen(request.config)
    record = Record(suite, cases, quick, 0.05 if quick else request.config.getoption("--minutes"))
    yield record
    if interrupted:
        print(f"\n{interrupted[0]}; {NOTHING}")
        return
    if out is None and not quick:
        if request.config.getoption("keyword") or any("::" in argument for argument in request.config.args):
            print("\nonly some of the cases were asked for: nothing is written without --out")
            return
        out = RESULTS / f"{device_slug(suite.device)}.json"
    if out is None:
        return
    if request.session.testsfailed:
        print(f"\n{request.session.testsfailed} cases failed: {out} is left as it was")
        return
    record.write(out)
    print(f"\nwrote {out}")


def run(
    attention: Attention, shape: BenchShape, dtype: torch.dtype, passes: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    x, dout = make_inputs(shape, dtype, device=device)
    if passes == FWD:
        frozen = x.with_leaves(*(t.detach() for t in x.leaves()))
        return lambda: (forward(attention, frozen, shape),)
    if passes == PREFIX:
        *own, prefix_k, prefix_v = x.leaves()
        x = x.with_leaves(*(t.detach() for t in own), prefix_k, prefix_v)
    return partial(forward_backward, attention, x, dout, shape)


@cache
def expected(
    shape: BenchShape, dtype: torch.dtype, passes: str, device: str = "cpu"
) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """Plain PyTorch in `dtype`, and in float64, on the same numbers: the output and, if asked, each gradient, named."""
    x, dout = make_inputs(shape, dtype, device=device)
    *own, prefix_k, prefix_v = x.leaves()
    names = ["out", *(("dq", "dk", "dv") if len(own) == 3 else ("dqkv",)), "dprefix_k", "dprefix_v"]
    if passes == PREFIX:
        x = x.with_leaves(*(t.detach() for t in own), prefix_k, prefix_v)
        names = [names[0], *names[-2:]]
    wide = x.with_leaves(*(t.detach().double().requires_grad_(t.requires_grad) for t in x.leaves()))
    if passes == FWD:
        return [("out", (forward(eager_concat, x, shape), forward(eager_concat, wide, shape)))]
    same = forward_backward(eager_concat, x, dout, shape)
    right = forward_backward(eager_concat, wide, dout.double(), shape)
    return list(zip(names, zip(same, right, strict=True), strict=True))


def check(
    impl: str,
    attention: Attention,
    shape: BenchShape,
    dtype: torch.dtype,
    passes: str,
    factor: float,
    device: str = "cpu",
) -> None:
    small = replace(shape, B=min(shape.B, 2))  # more samples are more of the same
    actual = run(attention, small, dtype, passes, device)()
    right = expected(small, dtype, passes, device)
    for (name, (same, exact)), got in zip(right, actual, strict=True):
        assert_as_accurate(f"{impl} {name}", got, same, exact, factor)


def checked(
    suite: Suite, ours: str, shape: BenchShape, dtype: torch.dtype, passes: str, record: Record
) -> tuple[dict[str, Attention], dict[str, str]]:
    """Ours and the baselines that this case is timed with; and the baselines that it is not, with the reason."""
    calls, absent = {ours: suite.ours[ours]}, {}
    check(ours, suite.ours[ours], shape, dtype, passes, 2.0, suite.device)
    for name, baseline in suite.baselines.items():
        if shape.causal not in baseline.causal or (baseline.role == "floor" and passes == PREFIX):
            continue
        if not shape.P and (baseline.role == "floor" or name in suite.needs_a_prefix):
            continue
        if name in record.missing:
            absent[name] = record.missing[name]
            continue
        compiles = name in suite.compiled
        if compiles and suite.device == "cpu" and passes != FWD and not suite.platform.dry:
            absent[name] = NO_BACKWARD
            continue
        if compiles and record.compile_seconds >= record.compile_budget and not suite.platform.dry:
            absent[name] = f"not compiled: this run's {record.compile_budget:.0f} s for compiling are used up"
            continue
        start = time.perf_counter()
        try:
            run(baseline.attention, shape, dtype, passes, suite.device)()
            if baseline.role != "floor":
                # the same function, not our standard of accuracy: a baseline may round its weights to its inputs' type
                check(name, baseline.attention, shape, dtype, passes, 8.0, suite.device)
        except AssertionError:
            raise  # it ran, and is wrong
        except Exception as error:  # a baseline that cannot run is a line in the record, not the end of it
            absent[name] = in_words(error)
            if isinstance(error, ImportError):
                record.missing[name] = absent[name]
            continue
        if compiles:
            record.compile_seconds += time.perf_counter() - start
        calls[name] = baseline.attention
    return calls, absent


def test_prefix_attn(shape, dtype, passes, benchmark, record: Record, request: pytest.FixtureRequest) -> None:
    suite, quick = suites.chosen(request.config), request.config.getoption("--quick")
    ours = request.config.getoption("--ours") or next(iter(suite.ours))
    seconds, start = record.seconds_for_case(), time.perf_counter()
    attentions, absent = checked(suite, ours, shape, dtype, passes, record)
    calls = {name: run(attention, shape, dtype, passes, suite.device) for name, attention in attentions.items()}
    seconds = max(0.1, seconds - (time.perf_counter() - start))
    at_least = 5 if seconds > 0.1 else 3  # the run is late
    samples, clocks = suite.platform.interleave(calls, min(seconds, 4.0), rounds=(2, 2) if quick else (at_least, 40))

    case = {"op": "prefix_attn", "pass": passes, "dtype": str(dtype), "shape": asdict(shape)}
    gflop = shape.gflop(backward=passes == BOTH)
    for impl, ms in samples.items():
        row = case | {"impl": impl, "role": "ours" if impl == ours else suite.baselines[impl].role}
        row |= {"ms": [round(t, 5) for t in quantiles(ms)], "min_ms": round(min(ms), 5), "rounds": len(ms)}
        row |= clocks[impl]
        if row["role"] != "floor" and passes != PREFIX:  # a floor does other arithmetic
            row["gflops"] = round(gflop / quantiles(ms)[1] * 1e3, 1)
        if passes == BOTH and (row["role"] == "ours" or (row["role"] == "peer" and not quick)):
            row |= suite.peak(impl, attentions[impl], shape, dtype, record.cases)
        record.rows.append(row)
    record.rows += [case | {"impl": i, "role": suite.baselines[i].role, "absent": why} for i, why in absent.items()]

    benchmark.extra_info.update(case)
    benchmark.pedantic(calls[ours], rounds=2 if quick else 3)
