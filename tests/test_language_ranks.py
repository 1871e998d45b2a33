"""Two processes under torchrun train each run as one does, whoever averages the gradients; and write the same texts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the runs need transformers")
pytest.importorskip("peft", reason="LoRA is PEFT's")
from language.testing import made_model

ROOT = Path(__file__).resolve().parents[1]
GRID = """
name = "together"
tasks = ["e2e"]
seeds = [1]
[common]
epochs = 3
subset = 9  # the last batch of an epoch is of one row: one process has none
batch = 4
accumulation = 1
objective = "sum"
length = 2
hidden = 8
dev = 9
prompts = 5
beams = 2
most_new = 6
rows = 2
bf16 = false
"""
METHOD = """
[[methods]]
name = "{name}"
layers = "all"
label = "{label}"
lr = [{lr}]
weight_decay = [0.0]
accumulation = {accumulation}
objective = "{objective}"
"""
METHODS = (  # of prefixes backward averages, of others the loop
    ("deep", "deep", 1e-2, 1, "sum"), ("none", "accumulated", 0.1, 2, "mean"), ("lora", "lora", 1e-2, 1, "sum"),
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    made_model("gpt2", folder / "model")
    blocks = [
        METHOD.format(name=name, label=label, lr=lr, accumulation=accumulation, objective=objective)
        for name, label, lr, accumulation, objective in METHODS
    ]
    (folder / "grid.toml").write_text(GRID + "".join(blocks))
    return folder


def results(made: Path, out: str, *before: str) -> dict[str, dict[str, Any]]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFIXATTN_")}
    words = ("--grid", str(made / "grid.toml"), "--data", str(made / "data"), "--model", str(made / "model"))
    command = (sys.executable, "-W", "ignore", *before, str(ROOT / "bench" / "paper" / "nlg.py"), *words)
    (made / "data" / "e2e").mkdir(parents=True, exist_ok=True)
    for part in ("trainset", "devset", "testset_w_refs"):
        rows = [
            f'"name[{part} {n}], food[Thai], area[riverside]",{part} {n} serves Thai food by the river .'
            for n in range(12)
        ]
        (made / "data" / "e2e" / f"{part}.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    ran = subprocess.run(
        (*command, "--out", str(made / out)), capture_output=True, text=True, timeout=600,
        env={**variables, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [json.loads(path.read_text()) for path in (made / out).rglob("final*.json")]
    return {run["name"].split("/")[2]: run["result"] for run in found}


def test_two_processes_train_as_one(made: Path) -> None:
    one = results(made, "one")
    two = results(made, "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert set(one) == set(two) == {label for _, label, *_ in METHODS}
    for label, result in one.items():
        other = two[label]
        assert result["steps"] == other["steps"] == (6 if label == "accumulated" else 9)
        assert [loss for _, loss in other["losses"]] == pytest.approx([loss for _, loss in result["losses"]], rel=1e-4)
        # Adam forgives a factor, the norm before clipping does not
        assert [norm for _, norm in other["norms"]] == pytest.approx([norm for _, norm in result["norms"]], rel=1e-3)
        assert other["dev_loss"] == pytest.approx(result["dev_loss"], rel=1e-4), label
        assert other["texts"] == result["texts"] and len(other["texts"]) == 5


def test_processes_together_are_one_worker(made: Path) -> None:
    ran = subprocess.run(
        (sys.executable, str(ROOT / "bench" / "paper" / "nlg.py"), "--grid", str(made / "grid.toml"), "--workers", "2",
         "--model", str(made / "model")),
        capture_output=True, text=True, env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
    )  # fmt: skip
    assert ran.returncode == 1 and "2 processes train each run together" in ran.stderr
