"""The benchmarks of windows and of packed sequences: nothing is timed that disagrees; tables have every way."""

import json

import pytest
import torch

from bench.attention import packed, windows
from bench.harness.command import Refusal


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """FlexAttention compiles for a minute: here it is the dense mask."""
    monkeypatch.setitem(windows.WAYS["fwd"], "flex", windows.dense_mask)
    monkeypatch.setitem(packed.WAYS["fwd"], "document mask", packed.ours)


def test_windows_leave_their_rows_and_go_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(windows, "WINDOW", 24)
    windows.visible.cache_clear()
    assert windows.main(["--keys", "70", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    ways = [("fwd", "ours"), ("fwd", "dense mask"), ("fwd", "flex"), ("fwd+bwd", "ours"), ("fwd+bwd", "dense mask")]
    assert [(row["pass"], row["way"]) for row in found["rows"]] == ways
    assert all(row["error"] < 1e-5 and len(row["cpu_ms"]) == 3 for row in found["rows"])
    monkeypatch.setattr(windows, "measured", lambda S, rounds: pytest.fail("measured again"))
    assert windows.main(["--keys", "70", "--rounds", "1", "--out", str(out)]) == 0
    assert "| 70 | fwd |" in capsys.readouterr().out
    windows.visible.cache_clear()


def test_packing_leaves_its_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert packed.main(["--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows if row["pass"] == "fwd+bwd"] == ["packed", "padded", "SDPA"]
    assert all(row["error"] < 1e-5 for row in rows)
    shown = capsys.readouterr().out
    assert "| fwd+bwd | " in shown and "no backward |" in shown
    assert min(packed.LENGTHS) >= packed.SHORTEST and len(set(packed.LENGTHS)) > 20


@pytest.mark.parametrize("passes", windows.PASSES)
def test_what_computes_something_else_is_not_timed(monkeypatch, passes):
    def other(*tensors):
        return windows.dense_mask(*tensors[:3], *(t.roll(1, 1) * 2 for t in tensors[3:]))

    monkeypatch.setitem(windows.WAYS[passes], "ours", other)
    with pytest.raises(Refusal, match=r"S 40, .*: ours is .* away from float64; nothing is timed"):
        windows.check(40, passes, "ours")
    monkeypatch.setitem(packed.WAYS[passes], "packed", lambda q, k, v, pk, pv: packed.ours(q, k, v.flip(0), pk, pv))
    with pytest.raises(Refusal, match=r"packed is .* away from float64; nothing is timed"):
        packed.check(passes, "packed")


def test_tables_have_ratios():
    rows = [
        {"S": 4096, "pass": passes, "way": way, "cpu_ms": [1.0, ms, 3.0]}
        for passes in windows.PASSES
        for way, ms in (("ours", 2.0), ("dense mask", 9.0), ("flex", 5.0))
        if (passes, way) != ("fwd+bwd", "flex")
    ]
    assert windows.table(rows)[2:] == [
        "| 4,096 | fwd | 2.0 ms | 9.0 ms (4.5 times) | 5.0 ms (2.5 times) |",
        "| 4,096 | fwd+bwd | 2.0 ms | 9.0 ms (4.5 times) | no backward |",
    ]


@pytest.mark.parametrize(("main", "words"), [(windows.main, ["--keys", "0"]), (packed.main, ["--rounds", "0"])])
def test_senseless_numbers_are_refused(main, words):
    with pytest.raises(Refusal, match="from 1 up"):
        main(words)


def test_the_window_is_the_windows():
    """Of 1,024 keys the last query sees 512 and the prefix."""
    inputs = windows.made(1024, False)
    out = windows.ours(*inputs)[:, :, -1]
    q, k, v, *prefix = inputs
    alone = windows.prefix_attention(q[:, :, -1:], k[:, :, -512:], v[:, :, -512:], *prefix)
    torch.testing.assert_close(out, alone[:, :, 0])
