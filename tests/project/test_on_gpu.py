"""The one command for a GPU, tried without one, and what it measures there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.attention import baselines, baselines_gpu, bench_prefix_attn, plot_gpu
from bench.attention.baselines import BenchShape
from bench.harness import timing_gpu
from tests.support import ROOT

SECTIONS = ["build", "verdicts", "tests", "shapes", "cuda", "micro", "whole", "reparam", "sanitize", "tune"]

if shutil.which("bash") is None:
    pytest.skip("bash is not installed", allow_module_level=True)


def on_gpu(out: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    # a worker of the suite would pass on that it is one, and benchmarks do not run in parallel
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"OUT": str(out), "PYTHON": python, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "bench/on_gpu.sh", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def statuses(text: str) -> list[tuple[str, str]]:
    lines = [line.split() for line in text.splitlines() if line.startswith("== ") and ": status " in line]
    return [(words[1].rstrip(":"), words[3]) for words in lines]


def test_sections_are_tried_by_name_without_a_gpu(tmp_path: Path) -> None:
    done = on_gpu(tmp_path, "--dry-run", "build", "verdicts", "shapes")
    assert statuses(done.stdout) == [(name, "0") for name in ("build", "verdicts", "shapes")], done.stdout[-6000:]
    assert done.returncode == 0 and (tmp_path / "on_gpu.log").read_text() in done.stdout


@pytest.mark.slow
def test_every_section_can_be_tried_without_a_gpu(tmp_path: Path) -> None:
    done = on_gpu(tmp_path, "--dry-run")
    assert statuses(done.stdout) == [(name, "0") for name in SECTIONS], done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0
    assert (tmp_path / "on_gpu.log").read_text() in done.stdout
    rows = json.loads((tmp_path / "micro.json").read_text())["rows"]
    assert {r["pass"] for r in rows if r["role"] == "ours"} == {"fwd", "fwd+bwd", "prefix grads"}
    assert "| vit-B1-N20-P3-D16-packed | fp32 | forward |" in done.stdout
    assert json.loads((tmp_path / "whole_step.json").read_text())["rows"]
    assert "| tiny interleaved |" in done.stdout
    # few enough for whoever brings them back from another machine
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"on_gpu.log", "micro.json", "micro.png", "whole_step.json", "reparam.json", "reparam.png"}


def test_a_section_that_fails_stops_no_other_and_shows_in_the_status(tmp_path: Path) -> None:
    failing = shutil.which("false")
    assert failing
    done = on_gpu(tmp_path, "--dry-run", "shapes", "build", python=failing)
    assert statuses(done.stdout) == [("shapes", "1"), ("build", "1")]
    assert done.returncode == 1
    assert "failed: shapes: status 1;build: status 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dry-run", "benchmark"), "unknown section benchmark; known: build verdicts"),
        (("--fast",), "unknown option --fast; known: --dry-run, --minutes N"),
        (("--minutes", "soon"), "--minutes is soon, expected a whole number"),
    ],
)
def test_refused_in_words(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = on_gpu(tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    done = on_gpu(tmp_path, "build")
    assert done.returncode == 2 and "--dry-run tries every section on the CPU" in done.stderr


@pytest.mark.parametrize("shape", baselines_gpu.QUICK, ids=str)
@pytest.mark.parametrize("name", ["flex_merge", "flex_concat", "peft"])
def test_baselines_compute_the_same_function(name: str, shape: BenchShape) -> None:
    if name in baselines_gpu.NEED_A_PREFIX and not shape.P:
        pytest.skip(f"{name} needs a prefix")
    attention = baselines_gpu.BASELINES[name].attention
    passes = "fwd+bwd" if name == "peft" else "fwd"  # FlexAttention has no backward on a CPU
    bench_prefix_attn.check(name, attention, shape, torch.float32, passes, factor=4.0)


def test_packed_baselines_pay_for_the_gradient_of_one_projection() -> None:
    shape = BenchShape("vit", 2, 2, 9, 3, 16, form="packed")
    x, dout = baselines.make_inputs(shape, torch.float32)
    grads = baselines.forward_backward(baselines_gpu.peft, x, dout, shape)
    assert [tuple(g.shape) for g in grads] == [(2, 2, 9, 16), (2, 9, 3, 2, 16), (2, 3, 16), (2, 3, 16)]


@pytest.mark.parametrize("shape", [*baselines_gpu.QUICK, BenchShape("gpt", 1, 2, 3, 4, 16, S=9)], ids=str)
def test_arithmetic_and_bytes_are_counted(shape: BenchShape) -> None:
    seen = torch.ones(shape.L, shape.P + shape.keys)
    if shape.causal:
        seen = baselines.visible(shape.L, shape.P, shape.keys)
    assert shape.gflop(False) == pytest.approx(4e-9 * shape.B * shape.H * shape.D * int(seen.sum()))
    x, dout = baselines.make_inputs(shape, torch.float32)
    size = sum(t.numel() for t in x.leaves()) * 4
    lse = shape.B * shape.H * shape.L * 4
    assert shape.mbytes("fwd", 4) == pytest.approx((size + dout.numel() * 4 + lse) / 1e6)
    # backward: every input and its gradient, out and dout
    backward = 2 * size + 2 * dout.numel() * 4 + lse
    assert shape.mbytes("fwd+bwd", 4) - shape.mbytes("fwd", 4) == pytest.approx(backward / 1e6)


def test_the_shapes_begin_with_those_that_have_targets() -> None:
    shapes = baselines_gpu.all_shapes()
    assert shapes[: len(baselines_gpu.TARGETS)] == list(baselines_gpu.TARGETS)
    assert {s.P for s in shapes} >= {0, 1, 5, 10, 50, 200, 1024, 8192}
    assert any(s.form == "bank" for s in shapes) and any(s.form == "packed" for s in shapes)
    assert any(s.L == 1 and s.P == 2048 for s in shapes)
    for shape in baselines_gpu.TARGETS:  # what a prefix costs is seen beside the same kernel without one
        assert shape.P == 200 or any(s.P == 0 and (s.B, s.L, s.D) == (shape.B, shape.L, shape.D) for s in shapes)


def result_of(*rows: tuple[str, str, float, str]) -> dict[str, object]:
    shape = next(iter(baselines_gpu.TARGETS))
    made = []
    for impl, role, ms, passes in rows:
        plain = impl.endswith(" without")
        fields = dict(vars(shape), P=0) if plain else dict(vars(shape))
        case = {"op": "prefix_attn", "pass": passes, "dtype": "torch.bfloat16", "shape": fields}
        made.append(case | {"impl": impl.removesuffix(" without"), "role": role, "ms": [ms] * 3, "min_ms": ms})
    versions = {"device": "a GPU", "torch": "2", "commit": "0" * 40, "tree": "clean", "date": "today"}
    return versions | {"gemm_gflops": {"torch.bfloat16": 7.9e5}, "copy_gbytes": 4300.0, "rows": made}


def test_the_table_holds_ours_against_the_best_peer_and_says_what_was_missed() -> None:
    rows = [("triton", "ours", 0.040, "fwd"), ("slow", "peer", 0.9, "fwd"), ("fast", "peer", 0.060, "fwd")]
    rows += [("triton without", "ours", 0.038, "fwd"), ("sdpa_no_prefix_flash", "floor", 0.001, "fwd")]
    [line] = [text for text in plot_gpu.targets(result_of(*rows)) if "vit-B64-N197-P10" in text]
    assert "40.0 (30) **missed**" in line and "60.0 fast" in line and "1.50 (2.0) **missed**" in line
    assert line.endswith("| 38.0 |")
    good = [("triton", "ours", 0.025, "fwd"), ("fast", "peer", 0.060, "fwd")]
    [line] = [text for text in plot_gpu.targets(result_of(*good)) if "vit-B64-N197-P10" in text]
    assert "missed" not in line and "2.40 (2.0)" in line


def test_without_a_gpu_the_clock_is_the_hosts() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    samples, clocks = timing_gpu.interleave({"a": lambda: None}, 0.0, rounds=(2, 2))
    assert len(samples["a"]) == 2 and clocks == {"a": {"clock": "host"}}
