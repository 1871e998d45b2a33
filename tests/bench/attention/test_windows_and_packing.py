"""Windows, packed sequences, a long prefix: nothing is timed that disagrees; tables have every way; make bench."""

import importlib
import json
import re
import shlex

import pytest
import torch

from bench.attention import long_prefix, packed, windows
from bench.harness.command import Refusal
from bench.harness.ways import NO_BACKWARD, cell, rows_of
from tests.support import ROOT

LONG = long_prefix.P, long_prefix.B, long_prefix.L


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """FlexAttention compiles for a minute: here it is the dense mask."""
    monkeypatch.setitem(windows.WAYS["fwd"], "flex", windows.dense_mask)
    monkeypatch.setitem(packed.WAYS["fwd"], "document mask", packed.ours)
    monkeypatch.setattr(long_prefix, "P", 40)
    monkeypatch.setattr(long_prefix, "L", 9)


def test_windows_leave_their_rows_and_go_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(windows, "WINDOW", 24)
    windows.visible.cache_clear()
    assert windows.main(["--keys", "70", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    *timed, last = found["rows"]
    ways = [("fwd", "ours"), ("fwd", "dense mask"), ("fwd", "flex"), ("fwd+bwd", "ours"), ("fwd+bwd", "dense mask")]
    assert [(row["pass"], row["way"]) for row in timed] == ways
    assert all(row["error"] < 1e-5 and len(row["cpu_ms"]) == 3 for row in timed)
    assert last == {"S": 70, "pass": "fwd+bwd", "way": "flex", "absent": NO_BACKWARD}
    measured = windows.measured
    monkeypatch.setattr(windows, "measured", lambda S, rounds: pytest.fail("measured again"))
    assert windows.main(["--keys", "70", "--rounds", "1", "--out", str(out)]) == 0
    assert "| 70 | fwd |" in capsys.readouterr().out
    out.write_text(json.dumps(found | {"commit": "another"}))
    monkeypatch.setattr(windows, "measured", measured)
    assert windows.main(["--keys", "40", "--rounds", "1", "--out", str(out)]) == 0
    assert {row["S"] for row in json.loads(out.read_text())["rows"]} == {40}
    assert "is of another commit" in capsys.readouterr().out
    windows.visible.cache_clear()


def test_packing_leaves_its_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert packed.main(["--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    *timed, last = rows
    assert [row["way"] for row in timed if row["pass"] == "fwd+bwd"] == ["packed", "padded", "SDPA"]
    assert all(row["error"] < 1e-5 for row in timed)
    assert last == {"pass": "fwd+bwd", "way": "document mask", "absent": NO_BACKWARD}
    shown = capsys.readouterr().out
    assert "| fwd+bwd | " in shown and "no backward |" in shown
    assert min(packed.LENGTHS) >= packed.SHORTEST and len(set(packed.LENGTHS)) > 20


def test_a_long_prefix_leaves_its_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert long_prefix.main(["--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    ways = [(passes, way) for passes in long_prefix.PASSES for way in ("ours", "SDPA", "own keys")]
    assert [(row["pass"], row["way"]) for row in found["rows"]] == ways
    assert all(row["error"] < 1e-5 and len(row["cpu_ms"]) == 3 for row in found["rows"])
    assert LONG == (16384, 8, 128) and found["shape"]["P"] == 40  # here it is short
    assert "| fwd+bwd | " in capsys.readouterr().out


def test_the_table_of_a_long_prefix_has_what_ours_take():
    rows = [
        {"pass": passes, "way": way, "cpu_ms": [1.0, ms, 30.0]}
        for passes in long_prefix.PASSES
        for way, ms in (("ours", 11.0), ("SDPA", 33.0), ("own keys", 10.0))
    ]
    assert long_prefix.table(rows)[2] == "| fwd | 11.0 ms | 33.0 ms (3.0 times) | 10.0 ms | 1.10 |"


def test_a_peer_that_cannot_run_says_why_and_ours_must():
    calls = {"ours": lambda: 1, "peer": lambda: pytest.fail("timed")}

    def check(way, broken="peer"):
        if way == broken:
            raise RuntimeError("no compiler is here\nand more")
        return 0.0

    [mine, theirs] = rows_of({"S": 3}, calls, check, 2, {})
    assert mine["way"] == "ours" and mine["rounds"] == 2
    assert theirs == {"S": 3, "way": "peer", "absent": "RuntimeError: no compiler is here"}
    assert (cell(theirs, 2.0), cell(mine | {"cpu_ms": [0.0, 3.0, 9.0]}, 2.0)) == ("cannot run", "3.0 ms (1.5 times)")
    with pytest.raises(RuntimeError, match="no compiler"):
        rows_of({}, calls, lambda way: check(way, "ours"), 2, {})


def test_make_bench_runs_what_the_heads_of_its_modules_say():
    recipe = re.search(r"^bench: build\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [shlex.split(line)[1:] for line in recipe[1].splitlines()]
    written = {words[1]: words for words in lines if "--out" in words}
    modules = ["attention.packed", "attention.windows", "models.shared_prompts", "attention.long_prefix"]
    assert list(written) == [f"bench.{name}" for name in modules]
    for name, words in written.items():
        if name.startswith("bench.models"):
            pytest.importorskip("transformers", reason="transformers is not installed")
        assert f"    python {' '.join(words)}" in importlib.import_module(name).__doc__


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
    monkeypatch.setitem(long_prefix.WAYS, "own keys", lambda q, k, v, pk, pv: long_prefix.ours(q, k, v * 2, pk, pv))
    with pytest.raises(Refusal, match=r"own keys is .* away from float64; nothing is timed"):
        long_prefix.check(passes, "own keys")


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


MAINS = [(windows.main, ["--keys", "0"]), (packed.main, ["--rounds", "0"]), (long_prefix.main, ["--rounds", "0"])]


@pytest.mark.parametrize(("main", "words"), MAINS)
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
