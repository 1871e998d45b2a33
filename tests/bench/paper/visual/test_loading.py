"""The measurement of loaders: it reads what it made as FGVC's own, and keeps a row for each setting."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.paper import loading
from bench.paper.runs import Refusal
from bench.paper.visual import fgvc, train


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    small = dataclasses.replace(fgvc.SETS["flowers"], classes=3, counts=dict(train=7, val=3, test=3))
    monkeypatch.setitem(fgvc.SETS, "flowers", small)
    for name in ("PREFIXATTN_DATA", "PREFIXATTN_SPLITS"):  # put back as they were at the end
        monkeypatch.setenv(name, "nowhere")
    yield
    train.task_of.cache_clear()


@pytest.mark.usefixtures("few")
def test_a_row_for_each_setting(tmp_path: Path) -> None:
    out = tmp_path / "loading.json"
    small = ["--model", "vit_tiny_patch16_224", "--batch", "3", "--epochs", "1", "--out", str(out)]
    assert loading.main([*small, "--loaders", "0"]) == 0
    assert loading.main([*small, "--loaders", "1"]) == 0
    assert loading.main([*small, "--loaders", "0", "--epochs", "2"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["loaders"], row["epochs"], row["steps"]) for row in rows] == [(1, 1, 3), (0, 2, 6)]
    assert all(0 <= row["busy_steps"] <= 1 and row["images_per_second"] > 0 for row in rows)
    assert all(20 < row["kilobytes_per_image"] < 200 for row in rows)
    assert rows[1]["longest_wait"] > 0  # without a process of its own every image is waited for
    record = json.loads(out.read_text())
    out.write_text(json.dumps({**record, "capability": "another"}))  # rows of two CPUs never stand under one header
    assert loading.main([*small, "--loaders", "1"]) == 0
    assert [row["loaders"] for row in json.loads(out.read_text())["rows"]] == [1]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="--batch is 0, expected 1 or more"):
        loading.main(["--batch", "0", "--out", str(tmp_path / "loading.json")])
