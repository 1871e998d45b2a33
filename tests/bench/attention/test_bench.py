"""The benchmark: what it times is right, what it counts is there, and a small run leaves a record to draw from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.attention import baselines, bench_prefix_attn, peak_rss, plot, suites
from bench.attention.baselines import BenchInputs, BenchShape
from bench.harness import timing
from prefixattn import backends
from tests.support import ROOT

TIMED = "bench/attention/bench_prefix_attn.py"
SMALL = {
    "bidirectional": BenchShape("vit", 2, 2, 37, 5, 16),
    "causal": BenchShape("gpt", 2, 2, 37, 5, 16),
    "causal_prefix_longer_than_the_keys": BenchShape("gpt", 1, 2, 9, 40, 16),
}
ATTENTIONS = {name: b for name, b in baselines.BASELINES.items() if b.role != "floor" and name != "flex_concat"}


CASES = [(name, s) for name, baseline in ATTENTIONS.items() for s in SMALL if SMALL[s].causal in baseline.causal]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_baselines_compute_the_same_function(name: str, shape: str) -> None:
    bench_prefix_attn.check(name, ATTENTIONS[name].attention, SMALL[shape], torch.float32, "fwd+bwd", factor=4.0)


def test_a_wrong_answer_is_not_timed() -> None:
    def forgets_the_prefix(x: BenchInputs, shape: BenchShape) -> torch.Tensor:
        return baselines.sdpa_no_prefix(x, shape)

    with pytest.raises(AssertionError, match="forgetful out: rms error"):
        bench_prefix_attn.check("forgetful", forgets_the_prefix, SMALL["causal"], torch.float32, "fwd", factor=8.0)


def test_our_op_passes_the_check_of_the_benchmark() -> None:
    for shape in SMALL.values():
        for dtype in suites.suite("cpu").dtypes:
            bench_prefix_attn.check("reference", baselines.OURS["reference"], shape, dtype, "fwd+bwd", factor=2.0)


@pytest.mark.parametrize("shape", SMALL)
def test_arithmetic_counts_the_pairs_that_are_visible(shape: str) -> None:
    s = SMALL[shape]
    mask = baselines.visible(s.L, s.P) if s.causal else torch.ones(s.L, s.L + s.P)
    forward = 4e-9 * s.B * s.H * s.D * int(mask.sum())
    assert s.gflop(backward=False) == pytest.approx(forward)
    assert s.gflop(backward=True) == pytest.approx(3.5 * forward)


def test_rounds_alternate_their_order() -> None:
    order: list[str] = []
    samples = timing.interleave({n: lambda n=n: order.append(n) for n in "ab"}, 0.0, rounds=(3, 9))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # once to warm up, then three rounds
    assert [len(ms) for ms in samples.values()] == [3, 3]


def test_quantiles() -> None:
    assert timing.quantiles([float(i) for i in range(1, 12)]) == (3.0, 6.0, 9.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_the_concatenation() -> None:
    shape = BenchShape("vit", 8, 12, 197, 10, 64)
    necessary = peak_rss.necessary_mib(shape, torch.float32)
    [peak] = peak_rss.peak_mib("sdpa_concat", [(shape, torch.float32)], threads=1)
    copies = 2 * shape.B * shape.H * (shape.L + shape.P) * shape.D * 4 / 2**20
    assert necessary + 0.9 * copies < peak < necessary + 4 * copies


def row(impl: str, role: str, p50: float, **more: object) -> dict[str, object]:
    shape = {"model": "gpt", "B": 1, "H": 2, "L": 8, "P": 5, "D": 16}
    case = {"op": "prefix_attn", "pass": "fwd", "dtype": "torch.float32", "shape": shape, "impl": impl, "role": role}
    return case | {"ms": [p50, p50, p50], "min_ms": p50 / 2} | more


def test_the_ratio_is_over_the_fastest_peer_and_no_other() -> None:
    rows = [row("cpu", "ours", 2.0), row("slow", "peer", 9.0), row("fast", "peer", 6.0)]
    rows += [row("sdpa_padded_q", "trick", 1.0), row("sdpa_no_prefix", "floor", 0.5)]
    [pair] = plot.pair(rows)
    assert (pair["peer"]["impl"], pair["ratio"], pair["ratio_min"]) == ("fast", 3.0, 3.0)


def test_a_missed_goal_is_said() -> None:
    good = plot.pair([row("cpu", "ours", 1.0), row("a", "peer", plot.GOALS[True][0] + 0.1)])
    slow = plot.pair([row("cpu", "ours", 1.0), row("a", "peer", plot.GOALS[True][0] - 0.1)])
    assert "missed" not in plot.summary(good, "ratio")[-1]
    assert "missed" in plot.summary(slow, "ratio")[-1]


def test_a_cpu_has_the_goals_of_its_class() -> None:
    assert plot.goals({"instructions": "amx_bf16"}) == plot.GOALS_OF_AMX
    assert plot.goals({"instructions": "avx512_bf16"}) == plot.goals({}) == plot.GOALS


def test_without_results_plot_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make bench writes them"):
        plot.main([str(tmp_path / "none.json")])


def test_a_quick_run_leaves_a_record_that_can_be_drawn(tmp_path: Path) -> None:
    ours = "reference" if backends.here()["cpu"] else "cpu"
    out = tmp_path / "device.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TIMED, "--quick"]
    # a worker of the suite would pass on that it is one, and benchmarks do not run in parallel
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "--out", str(out), "--ours", ours],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    result = json.loads(out.read_text())
    header = {"device", "threads", "capability", "python", "torch", "prefixattn", "commit", "tree", "date"}
    assert result.keys() == header | {"gemm_gflops", "rows"} | ({"instructions"} if ours == "cpu" else set())
    timed = [r for r in result["rows"] if "ms" in r]
    assert len([r for r in timed if r["role"] == "ours"]) == len(baselines.QUICK) * 2 * 2  # two types, two passes
    for r in timed:
        assert 0 < r["min_ms"] <= r["ms"][0] <= r["ms"][1] <= r["ms"][2]
    absent = {(r["impl"], r["pass"]): r["absent"] for r in result["rows"] if "absent" in r}
    assert absent["flex_concat", "fwd+bwd"] == "FlexAttention has no backward on a CPU"

    plot.main([str(out)])
    table = out.with_suffix(".md").read_text()
    assert "bidirectional" in table and str(baselines.QUICK[0].P) in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_shapes_cover_what_the_goals_are_stated_for() -> None:
    shapes = baselines.all_shapes()
    assert {(s.L, s.P, s.D) for s in shapes if not s.causal} == {
        (N, P, D) for N in (197, 577) for P in (5, 10, 50, 200) for D in (64, 128)
    }
    assert {(s.L, s.P, s.D) for s in shapes if s.causal} == {
        (N, P, D) for N in (64, 256, 1024) for P in (5, 20, 200) for D in (64, 128)
    }
