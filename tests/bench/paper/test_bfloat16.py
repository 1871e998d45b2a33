"""Runs in bfloat16 on a machine that emulates it."""

import pytest

from bench.paper import bfloat16


@pytest.mark.parametrize(("wanted", "fast", "lines"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_a_machine_that_emulates_bfloat16_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: bool, fast: bool, lines: int
) -> None:
    monkeypatch.setattr(bfloat16, "is_fast", lambda: fast)
    bfloat16.warn_if_slow(wanted)
    said = capsys.readouterr().err
    assert said.count("\n") == lines
    assert lines == 0 or (said.startswith("bfloat16: this machine has no arithmetic") and "bf16 = false" in said)


def test_the_runner_asks_before_it_reads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.paper import nlg
    from bench.paper.language import presets, tasks

    asked = []
    monkeypatch.setattr(bfloat16, "warn_if_slow", asked.append)
    monkeypatch.setattr(tasks, "load", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        nlg.readable(presets.grid_for("smollm2"))
    assert asked == [True]
