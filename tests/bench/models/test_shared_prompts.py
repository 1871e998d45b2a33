"""The benchmark of shared prompts: nothing is timed that disagrees, and it goes on where it was stopped."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from bench.harness.command import Refusal
from bench.models import shared_prompts


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a resident set is Linux's to tell")
def test_a_short_run_leaves_its_rows_and_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.json"
    assert shared_prompts.main(["--prompt", "96", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row["P"], row["way"]) for row in found["rows"]] == [(96, "shared"), (96, "repeated")]
    assert all(row["step_mib"] > 0 and len(row["cpu_ms"]) == 3 for row in found["rows"])
    assert found["float64_apart"] < 1e-5
    first = out.read_bytes()
    monkeypatch.setattr(shared_prompts, "measured", lambda *_: pytest.fail("measured again"))
    assert shared_prompts.main(["--prompt", "96", "--rounds", "1", "--out", str(out)]) == 0
    assert out.read_bytes() == first and "| 96 |" in capsys.readouterr().out


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch):
    step = shared_prompts.step

    def other(way, model, prompt, completions):
        return step(way, model, prompt.roll(1) if way == "shared" else prompt, completions)

    monkeypatch.setattr(shared_prompts, "step", other)
    with pytest.raises(Refusal, match=r"P 40, torch.float32: losses .* apart; nothing is timed"):
        shared_prompts.check(40, torch.float32, 1e-3)


def test_another_group_is_another_step():
    _, prompt, completions = shared_prompts.made(40, shared_prompts.Case(3, 5))
    assert (prompt.shape, completions.shape) == ((1, 40), (3, 5))
    assert shared_prompts.check(40, torch.float64, 1e-5, shared_prompts.Case(3, 5)) < 1e-5
    losses = {
        float(shared_prompts.step("shared", *shared_prompts.made(40, shared_prompts.Case(*size)))())
        for size in ((3, 5), (2, 5), (3, 4))
    }
    assert len(losses) == 3  # means, of other tokens


@pytest.mark.parametrize(
    ("words", "said"), [(["--prompt", "1"], "a prompt needs two tokens"), (["--group", "0"], "from 1 up")]
)
def test_senseless_numbers_are_refused(words, said):
    with pytest.raises(Refusal, match=said):
        shared_prompts.main(words)


def test_the_table_has_both_ways_and_their_ratios():
    rows = [
        {"P": 1024, "way": "shared", "cpu_ms": [100.0, 500.0, 900.0], "step_mib": 30.0},
        {"P": 1024, "way": "repeated", "cpu_ms": [1.0, 2000.0, 2.0], "step_mib": 120.0},
    ]
    assert shared_prompts.table(rows)[2] == "| 1,024 | 2.00 s | 0.50 s | 0.25 | 120 MiB | 30 MiB | 0.25 |"
