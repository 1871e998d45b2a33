"""The clock of a GPU: graphs where they can be captured, a cold L2 before every sample, and the measured ceilings."""

import time
from typing import Any, NamedTuple

import torch

from bench.harness.timing import Call
from bench.harness.timing import interleave as interleave_on_cpu

L2_BYTES = 256 * 2**20  # several times the L2 of any GPU: writing as much leaves nothing of the last call in it


class Prepared(NamedTuple):
    run: Call
    clock: str  # "graph": replays of a capture; "events": eager calls
    issue_us: float  # of the host, for one eager call


def prepare(call: Call) -> Prepared:
    """Compiles, warms up and, where it can be, captures a call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # where a capture's warm-up belongs
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    repeats = 10
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    issue_us = (time.perf_counter() - start) / repeats * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:  # whatever a capture objects to: the call is then timed as it is
        torch.cuda.synchronize()
        return Prepared(call, "events", issue_us)
    return Prepared(graph.replay, "graph", issue_us)


def interleave(
    calls: dict[str, Call], seconds: float, rounds: tuple[int, int] = (5, 60)
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Milliseconds of each call on the GPU, and how they were clocked.

    As `timing.interleave`: every round runs every call once, every other one backwards.
    """
    if not torch.cuda.is_available():
        return interleave_on_cpu(calls, seconds, rounds), {name: {"clock": "host"} for name in calls}
    prepared = {name: prepare(call) for name, call in calls.items()}
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    slowest = max(p.issue_us for p in prepared.values() if p.clock == "events") if _any_events(prepared) else 0.0
    # the GPU waits until the host has issued an eager call, or the host's time would be in the sample
    cycles = int(slowest * 2e3 * 2)  # at about 2 GHz, twice over
    samples: dict[str, list[float]] = {name: [] for name in calls}
    at_least, at_most = rounds
    end = time.perf_counter() + seconds
    for done in range(at_most):
        if done >= at_least and time.perf_counter() > end:
            break
        marks = {}
        for name in list(calls) if done % 2 == 0 else list(reversed(calls)):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            if prepared[name].clock == "events":
                torch.cuda._sleep(cycles)
            start.record()
            prepared[name].run()
            stop.record()
            marks[name] = start, stop
        torch.cuda.synchronize()
        for name, (start, stop) in marks.items():
            samples[name].append(start.elapsed_time(stop))
    return samples, {n: {"clock": p.clock, "issue_us": round(p.issue_us, 1)} for n, p in prepared.items()}


def _any_events(prepared: dict[str, Prepared]) -> bool:
    return any(p.clock == "events" for p in prepared.values())


def copy_gbytes(seconds: float = 1.0) -> float:
    """Bytes read and written a second, in 1e9, by copying within the device's memory."""
    n = 2**30 if torch.cuda.is_available() else 2**22
    source = torch.randn(n // 4, device=_device())
    target = torch.empty_like(source)
    samples, _ = interleave({"copy": lambda: target.copy_(source)}, seconds, rounds=(3, 50))
    return 2 * n / min(samples["copy"]) * 1e-6


def gemm_gflops(dtype: torch.dtype, seconds: float = 1.0) -> float:
    n = 8192 if torch.cuda.is_available() else 128
    if dtype == torch.float32:
        n //= 2
    a, b = (torch.randn(n, n, device=_device()).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    samples, _ = interleave({"mm": lambda: torch.mm(a, b, out=out)}, seconds, rounds=(3, 50))
    return 2 * n**3 / min(samples["mm"]) * 1e-6


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_and_saved_mib(forward: Call, forward_backward: Call) -> tuple[float, float] | None:
    """Memory beyond the inputs: at the highest, and what is held between forward and backward besides the output."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out: Any = forward()
    saved = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
    del out
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = forward_backward()
    peak = torch.cuda.max_memory_allocated() - before
    del held
    return peak / 2**20, saved / 2**20
