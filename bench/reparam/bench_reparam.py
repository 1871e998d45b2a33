"""A training step of the network that makes the prefixes: forward, backward and AdamW, ours beside PyTorch's.

    python -m pytest bench/reparam/bench_reparam.py             # minutes, then bench/results/reparam-<device>.json
    python -m pytest bench/reparam/bench_reparam.py --device gpu
    python -m pytest bench/reparam/bench_reparam.py --quick     # tiny networks, no file

The gradient of kv is given. Before anything is timed, our step and every baseline's are compared with the plain
one's.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import platforms, timing, timing_gpu
from bench.harness.command import NOTHING, interrupted
from bench.harness.record import RESULTS, device_slug, header, write_rows
from bench.reparam import peak_rss
from bench.reparam.cases import BASELINES, CASES, TINY, Network, Step

Rows = list[dict[str, Any]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("name", TINY if metafunc.config.getoption("--quick") else CASES)


def copy_gbytes(device: str, seconds: float) -> float:
    """Bytes read and written a second, in 1e9: the rate that the floor is computed with."""
    if device == "cuda":
        return timing_gpu.copy_gbytes(seconds)
    source = torch.randn(2**26 if seconds > 0.1 else 2**20)
    target = torch.empty_like(source)
    samples = timing.interleave({"copy": lambda: target.copy_(source)}, seconds, rounds=(3, 100))["copy"]
    return 2 * 4 * source.numel() / min(samples) * 1e-6


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[Rows]:
    quick, out = request.config.getoption("--quick"), request.config.getoption("--out")
    device = _device(request.config)
    rates = [copy_gbytes(device, 0.1 if quick else 3.0)]
    found: Rows = []
    yield found
    if interrupted:
        print(f"\n{interrupted[0]}; {NOTHING}")
        return
    rates.append(copy_gbytes(device, 0.1 if quick else 3.0))
    if out is None and quick:
        return
    if request.session.testsfailed:
        print("\nsome cases failed: nothing is written")
        return
    path: Path = out or RESULTS / f"reparam-{device_slug(device)}.json"
    for row in found:
        if "ms" in row:
            row["floor_ms"] = round(Network(**row["network"]).floor_bytes / max(rates) * 1e-6, 4)
    result = header(device) | {"op": "reparam", "copy_gbytes_per_s": round(max(rates), 1), "rows": found}
    write_rows(path, result)
    print(f"\nwrote {path}")


def _device(config: pytest.Config) -> str:
    return platforms.chosen(config).device


def check(size: Network, device: str) -> None:
    """After two steps ours and every baseline have the same parameters, but for rounding."""
    trained = {}
    for baseline in BASELINES:
        step = BASELINES[baseline](size, device)
        before = step.network.up.weight.detach().clone()
        for _ in range(2):
            step()
        trained[baseline] = [p.detach() for p in step.network.parameters()]
        moved = (trained[baseline][3] - before).abs().max()
        assert moved > 1e-4, f"{baseline} trains nothing: the large matrix moved by {moved:.1e}"
    for baseline in BASELINES:
        for ours, plain in zip(trained[baseline], trained["eager"], strict=True):
            # AdamW divides by the gradient's own size: where that is all rounding, so is the step
            wrong = ((ours - plain).abs() > 1e-5 + 1e-3 * plain.abs()).double().mean()
            assert wrong < 1e-3, f"{baseline}: {wrong:.1%} of the numbers differ from the plain way's"


def test_reparam(name: str, rows: Rows, benchmark: Any, request: pytest.FixtureRequest) -> None:
    quick, device = request.config.getoption("--quick"), _device(request.config)
    size = (TINY if quick else CASES)[name]
    check(size, device)
    case = {"op": "reparam", "case": name, "network": asdict(size), "parameter_mib": size.parameter_bytes / 2**20}
    steps: dict[str, Step] = {}
    for baseline, start in BASELINES.items():
        began = time.perf_counter()
        if device == "cpu" and not quick:
            peak = peak_rss.of(baseline, name)
            rows.append(case | {"way": baseline} | peak)
            print(f"{name}, {baseline}: {peak} ({time.perf_counter() - began:.0f} s)", flush=True)
        steps[baseline] = start(size, device)
        if device == "cuda":
            rows.append(case | {"way": baseline} | peak_rss.on_gpu(steps[baseline]))
    seconds = 0.1 if quick else 45.0
    if device == "cuda":
        samples, _ = timing_gpu.interleave(dict(steps), seconds / 10, rounds=(5, 60))
    else:
        samples = timing.interleave(dict(steps), seconds, rounds=(2, 2) if quick else (5, 60))
    for baseline, ms in samples.items():
        found = {"ms": [round(t, 4) for t in timing.quantiles(ms)], "min_ms": round(min(ms), 4), "rounds": len(ms)}
        mine = [row for row in rows if row["case"] == name and row["way"] == baseline]
        if mine:
            mine[0].update(found)
        else:
            rows.append(case | {"way": baseline} | found)
    benchmark.extra_info.update(case)
    benchmark.pedantic(steps["ours"], rounds=2 if quick else 3)
