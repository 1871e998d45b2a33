"""The comparison of moments on a real run: every way runs, float32 is torch's, and a finished way is not run again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.paper import moments
from tests.support import ROOT


def test_a_small_run_and_its_table(tmp_path: Path) -> None:
    out = tmp_path / "moments.json"
    command = [sys.executable, "bench/paper/moments.py", "--steps", "3", "--dev", "4", "--data", "generated"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == list(moments.WAYS)
    assert {row["steps"] for row in rows.values()} == {3}
    assert rows["torch.optim.AdamW"]["distance"] == 0
    assert rows["float32"]["distance"] < 1e-2 < 0.5 > rows["8bit"]["distance"] > rows["float32"]["distance"]
    assert moments.table(result) in done.stdout
    assert not list(tmp_path.glob("*.part*"))


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def run(way: str, options: object) -> tuple[dict[str, object], torch.Tensor]:
        called.append(way)
        if len(called) == 3:
            raise KeyboardInterrupt
        kv = torch.zeros(2, 1, 2, 1, 1, 1)
        kv[1] = len(called)
        return {"way": way, "dev_loss": 1.0, "last_100_loss": 1.0}, kv

    out = tmp_path / "moments.json"
    monkeypatch.setattr(moments, "run", run)
    monkeypatch.setattr(sys, "argv", ["moments.py", "--data", "generated", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        moments.main()
    assert not out.exists()
    moments.main()
    ways = list(moments.WAYS)
    assert called == [*ways[:3], *ways[2:]]
    assert [row["way"] for row in json.loads(out.read_text())["rows"]] == ways
