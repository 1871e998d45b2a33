"""XSUM's way from documents to ROUGE: a small BART, a few hundred texts, their first sentences as summaries."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the runs need transformers")
pytest.importorskip("rouge_score", reason="summaries are scored by rouge-score")
from bench.paper.language import xsum
from bench.paper.language.testing import made_model
from tests.data_folder import data_path
from tests.support import ROOT

PARTS = {"train": 240, "dev": 24, "test": 12}
GRID = """
name = "firsts"
tasks = ["xsum"]
seeds = [101]
[common]
length = 6
hidden = 16
epochs = 1
batch = 16
objective = "mean"
dev = 24
beams = 6
least_new = 11
most_new = 62
length_penalty = 0.8
rows = 4
source_limit = 128
target_limit = 60
[[methods]]
name = "deep"
layers = "all"
label = "deep"
lr = [0.01]
weight_decay = [0.0]
[[methods]]
name = "none"
layers = "all"
label = "none"
lr = [0.1]
weight_decay = [0.0]
"""


def documents(file: Path, count: int) -> list[tuple[str, str]]:
    """(text, its first sentence) of Brown; a line each."""
    found = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            first, _, text = record["text"].partition("\n")
            text, first = " ".join(text.split()), " ".join(first.split())
            if record["source"] == "brown" and len(text) > 200 and 10 < len(first) < 200:
                found.append((text, first))
            if len(found) == count:
                return found
    raise AssertionError(f"{len(found)} documents, expected {count}")


def test_from_documents_to_rouge(tmp_path: Path) -> None:
    rows = documents(data_path("text", "english.jsonl.gz"), sum(PARTS.values()))
    (tmp_path / "xsum").mkdir()
    for part, count in PARTS.items():
        own, rows = rows[:count], rows[count:]
        for column, texts in zip(("source", "target"), zip(*own, strict=True), strict=True):
            (tmp_path / "xsum" / f"{xsum.STEMS[part]}.{column}").write_text("".join(f"{text}\n" for text in texts))
    (tmp_path / "grid.toml").write_text(GRID)
    model = made_model("bart", tmp_path / "model")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFIXATTN_")}
    ran = subprocess.run(
        (sys.executable, "-W", "ignore", str(ROOT / "bench" / "paper" / "nlg.py"), "--grid",
         str(tmp_path / "grid.toml"), "--data", str(tmp_path), "--model", str(model), "--out", str(tmp_path / "out")),
        capture_output=True, text=True, env=variables,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    cells = {cell["label"]: cell for cell in results["cells"]}
    assert set(cells) == {"deep", "none"}
    for cell in cells.values():
        assert cell["pairs"] == 240 and cell["steps"] == 15 and cell["decoded"] == 12
        assert all(0 <= rows[0][1] <= 100 for rows in cell["scores"].values()) and len(cell["scores"]) == 3
        assert cell["curve"][-1][1] < cell["curve"][0][1]  # it learns
        assert [record["references"] for record in cell["records"]] and all(r["text"] for r in cell["records"])
    # the networks of encoder, decoder and cross attention; what is kept is P rows of each, of two layers
    assert cells["deep"]["kept"] == cells["none"]["trained"] == 3 * 2 * 2 * 6 * 32 < cells["deep"]["trained"]
    assert "Table 2, XSUM: the paper's BART-large / ours" in ran.stdout and "42.62 / " in ran.stdout
