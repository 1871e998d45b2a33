"""The benchmark of the reparameterization: what it times is right, what it counts is there, its tables tell it so."""

from pathlib import Path

import pytest
import torch

from bench.reparam import bench_reparam, peak_rss, simple_share
from bench.reparam import cases as reparam_cases
from bench.reparam import plot as plot_reparam
from bench.reparam.cases import BASELINES, CASES, TINY, Network


@pytest.mark.parametrize("name", TINY)
def test_every_baseline_takes_the_same_step(name: str) -> None:
    bench_reparam.check(TINY[name], "cpu")


def test_a_baseline_that_does_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(reparam_cases.OnRows):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            self.shares[1:] = 0  # one sample's gradient alone

        def __call__(self) -> None:
            super().__call__()
            with torch.no_grad():  # AdamW forgives a factor, so its first step is not enough
                self.network.up.bias.add_(0.01)

    monkeypatch.setitem(BASELINES, "original", lambda size, device: Forgetful(size, device, reparam_cases.adamw))
    with pytest.raises(AssertionError, match=r"original: .* of the numbers differ from the plain way's"):
        bench_reparam.check(TINY["tiny"], "cpu")


def test_a_baseline_that_trains_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(reparam_cases.Step):
        def __call__(self) -> None:
            self.network().sum().backward()

    monkeypatch.setitem(BASELINES, "eager", lambda size, device: Idle(size, device, False, reparam_cases.adamw))
    with pytest.raises(AssertionError, match="eager trains nothing"):
        bench_reparam.check(TINY["tiny"], "cpu")


@pytest.mark.parametrize("name", TINY)
def test_sizes_are_those_of_the_network(name: str) -> None:
    size = TINY[name]
    network = reparam_cases.make(size, True, "cpu")
    assert size.parameter_bytes == sum(p.nbytes for p in network.parameters())
    assert size.matrix_bytes == network.up.weight.nbytes
    assert size.kv_bytes == network().nbytes


def test_the_networks_are_the_papers() -> None:
    medium = CASES["gpt2-medium P10"]
    assert (medium.outputs, medium.hidden, medium.width) == (49152, 512, 1024)
    assert CASES["vit-b16 P10"].outputs == 1536 and CASES["vit-b16 P10"].networks == 12
    assert CASES["bart-large P200"].networks == 3 and CASES["bart-large P200"].outputs == 24576
    assert CASES["llama-7b P30"].matrix_bytes == 4 * 512 * 262144


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_sees_the_gradient_of_the_matrix() -> None:
    matrix = CASES["vit-b16 P10"].matrix_bytes / 2**20
    eager, ours = (peak_rss.of(way, "vit-b16 P10") for way in ("eager", "ours"))
    assert eager["step_mib"] > matrix
    assert (
        eager["moments_mib"]
        == ours["moments_mib"]
        == pytest.approx(2 * CASES["vit-b16 P10"].parameter_bytes / 2**20, abs=0.1)
    )


def result_of(**ms: float) -> dict[str, object]:
    case = {"op": "reparam", "case": "gpt2-medium P10", "network": vars(CASES["gpt2-medium P10"])}
    rows = [case | {"way": way, "ms": [t] * 3, "min_ms": t, "floor_ms": 1.0} for way, t in ms.items()]
    return {"rows": rows}


def test_a_missed_goal_is_said() -> None:
    ways = dict.fromkeys(BASELINES, 40.0)
    [*_, line] = plot_reparam.times(result_of(**(ways | {"ours": 10.0})))
    assert "40.0: 4.00x (goal 3.0)" in line and "missed" not in line
    [*_, line] = plot_reparam.times(result_of(**(ways | {"ours": 20.0})))
    assert "40.0: 2.00x (goal 3.0) **missed**" in line


def test_what_was_not_measured_says_so() -> None:
    lines = plot_reparam.peak_table(result_of(ours=1.0))
    [line] = [text for text in lines if "hidden 4096" in text]
    assert "not measured" in line and "| 4,1" in line  # the matrix alone is 4 GiB
    assert Network(**vars(CASES["vit-b16 P10"])) == CASES["vit-b16 P10"]


@pytest.fixture
def tiny_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LAYERS": 2, "WIDTH": 16, "HEADS": 2, "SQUARE": 16}.items():
        monkeypatch.setattr(simple_share, name, value)


def test_simple_share_is_held_against_its_floor(tiny_layers: None) -> None:
    row = simple_share.measure(3, seconds=0.0)
    assert row["case"] == "gpt2-medium P3" and row["rounds"] == 8
    assert set(row["over_floor"]) == {"layer", "columns"}  # type: ignore[call-overload]


def test_a_projection_that_makes_something_else_is_not_timed(
    tiny_layers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = simple_share.layer

    def columns(vectors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return layer(vectors, weight * 1.01, bias)

    monkeypatch.setattr(simple_share, "columns", columns)
    with pytest.raises(AssertionError, match="not close"):
        simple_share.measure(3, seconds=0.0)
