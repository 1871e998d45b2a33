"""The benchmark of whole models: a tiny run leaves a record, tables and a figure; wrong answers are not timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.models import bench_models
from bench.models import plot as plot_models
from bench.models.cases import ATTACHED, CASES, LANGUAGE
from prefixattn.attach.hf import interface

pytest.importorskip("peft", reason="the benchmark measures PEFT's way too")
# what transformers and PEFT warn of while models are made
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"),
]
RUN = ("llama-gqa P20", "vit-b16 P200", "gpt2-small P0")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.json"
    names = [word for name in RUN for word in ("--case", name)]
    assert bench_models.main(["--tiny", "--out", str(path), *names]) == 0
    return path


@pytest.fixture
def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_baseline_is_a_row(result: dict[str, Any]) -> None:
    ways = {"llama-gqa P20": LANGUAGE, "vit-b16 P200": ("frozen", "ours", "original"), "gpt2-small P0": ATTACHED}
    assert [(r["case"], r["way"]) for r in result["rows"]] == [(case, way) for case in RUN for way in ways[case]]
    assert result["tiny"] is True and {"commit", "tree", "threads", "torch", "transformers", "peft"} <= result.keys()
    for r in result["rows"]:
        assert 0 < r["min_ms"] <= r["ms"][0] <= r["ms"][1] <= r["ms"][2] and r["rounds"] == 3
        assert r["extra_ms"] == sorted(r["extra_ms"])
        assert r["peak_mib"] == pytest.approx(r["trained_mib"] + r["moments_mib"] + r["step_mib"], abs=0.02)
        if r["way"] == "frozen":
            assert r["extra_ms"] == [0, 0, 0] and r["extra_mib"] == r["extra_step_mib"] == 0
    apart = {r["case"]: r["apart"] for r in result["rows"] if "apart" in r and r["way"] != "ours, labelled positions"}
    assert {case: set(errors) for case, errors in apart.items()} == {
        "llama-gqa P20": {"peft"},
        "vit-b16 P200": {"original"},
        "gpt2-small P0": {"frozen"},
    }


def test_memory_sees_what_the_published_way_keeps(result: dict[str, Any]) -> None:
    rows = {r["way"]: r for r in result["rows"] if r["case"] == "vit-b16 P200"}
    sizes = CASES["vit-b16 P200"].make(True).sizes
    concatenated = 2 * 2 * sizes["layers"] * sizes["width"] * 200 * 4 / 2**20  # key and value of two samples
    assert rows["original"]["extra_step_mib"] > concatenated
    assert rows["ours"]["extra_step_mib"] < 0.5 * rows["original"]["extra_step_mib"]


def test_tables_and_figure_are_there(out: Path, result: dict[str, Any]) -> None:
    text = out.with_suffix(".md").read_text()
    for line in plot_models.steps(result) + plot_models.attached(result):
        assert line in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_text(out.read_text())
    asked: list[str] = []

    def note(name: str, *args: object) -> list[dict[str, Any]]:
        asked.append(name)
        raise RuntimeError("not measured in this test")

    monkeypatch.setattr(bench_models, "measure", note)
    head = json.loads(path.read_text())
    monkeypatch.setattr(bench_models, "header", lambda: {key: head[key] for key in head if key not in ("op", "rows")})
    assert bench_models.main(["--tiny", "--out", str(path)]) == 1
    assert asked == [name for name in CASES if name not in RUN]
    for apart in ("commit", "capability"):  # a CPU of the same name may have other vectors
        asked.clear()
        monkeypatch.setattr(bench_models, "header", lambda apart=apart: head | {apart: "another"})
        assert bench_models.main(["--tiny", "--out", str(path)]) == 1
        assert asked == list(CASES)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "models.json"
    monkeypatch.setattr(interface, "prefix_attention", louder)
    assert bench_models.main(["--tiny", "--out", str(path), "--case", "vit-b16 P10"]) == 1
    assert "vit-b16 P10: FAILED: ViTModel computes something else" in capsys.readouterr().out
    assert not path.exists()


whole_attention = interface.prefix_attention


def louder(*args: Any, **options: Any) -> Tensor:
    out: Tensor = whole_attention(*args, **options)
    return 1.5 * out


def row(way: str, case: str = "gpt2-small P20", **numbers: Any) -> dict[str, Any]:
    plain = {"case": case, "model": "gpt2-small", "way": way, "P": 20, "ms": [90.0, 100.0, 110.0]}
    sizes = {"trained_mib": 1.0, "moments_mib": 2.0, "extra_mib": 3.0, "extra_step_mib": 1.0, "extra_ms": [0.0] * 3}
    return plain | sizes | numbers


def test_missed_goals_and_negative_extras_are_said() -> None:
    rows = [
        row("frozen"),
        row("ours", extra_ms=[2.0, 4.0, 5.0], extra_step_mib=-1.0),
        row("peft", extra_ms=[9, 10, 11]),
    ]
    [*_, ours, peft] = plot_models.steps({"rows": rows})
    assert "| 4.0 (2.0 to 5.0) | PEFT: 0.40 **missed** |" in ours and "| -1.0 | PEFT: -1.00 |" in ours
    assert ours.count("missed") == 1 and "missed" not in peft
    rows[1]["extra_ms"] = [-9.0, -8.0, -7.0]
    assert "| -8.0 (-9.0 to -7.0) | PEFT: -0.80 |" in plot_models.steps({"rows": rows})[2]
    attached = [row("frozen", P=0), row("no prefix", extra_ms=[1, 2, 3]), row("P 1, first layer", extra_ms=[3, 4, 5])]
    [*_, line] = plot_models.attached({"rows": attached})
    assert "2.0 (1.0 to 3.0), +2.0% |" in line and "4.0 (3.0 to 5.0), +4.0% **missed** |" in line


def test_the_models_are_of_one_size() -> None:
    with torch.device("meta"):
        gpt2, llama = (CASES[f"{name} P20"].make(False).build() for name in ("gpt2-small", "llama-gqa"))
    counts = [sum(p.numel() for p in set(model.parameters())) for model in (gpt2, llama)]
    assert counts[0] == 124439808 and abs(counts[1] / counts[0] - 1) < 0.1
