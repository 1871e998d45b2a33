"""Two processes under torchrun train each run as one does, whoever averages the gradients; write the same texts; go on
from a checkpoint when one of them was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the runs need transformers")
pytest.importorskip("peft", reason="LoRA is PEFT's")
from bench.paper.language.testing import made_model
from tests.support import ROOT, path_without_java

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


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
NLG = ROOT / "bench" / "paper" / "nlg.py"
KILLED = f"""
import os, runpy, signal, sys
from pathlib import Path
runpy.run_path({str(NLG.with_name("as_file.py"))!r})
from bench.paper import nlg
from bench.paper.language import ranks, train

train.SAVED_EVERY, step, here = 0.0, train.Loop.step, Path(__file__).parent

def noted(self, number, rows):
    if self.run.settings.method == "deep":
        with open(here / f"steps-{{ranks.rank()}}", "a") as file:
            file.write(f"{{number}} ")
        if number == 5 and ranks.rank() == 1 and not (here / "killed").exists():
            (here / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, rows)

train.Loop.step = noted
sys.exit(nlg.main())
"""


def results(made: Path, out: str, *before: str) -> dict[str, dict[str, Any]]:
    """Of a command that succeeds, by label."""
    ran = launched(made, out, *before, str(NLG))
    assert ran.returncode == 0, ran.stderr[-2000:]
    return finished(made / out)


def finished(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in out.rglob("final*.json")]
    return {run["name"].split("/")[2]: run["result"] for run in found}


def launched(made: Path, out: str, *python: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFIXATTN_")}
    words = ("--grid", str(made / "grid.toml"), "--data", str(made / "data"), "--model", str(made / "model"))
    command = (sys.executable, "-W", "ignore", *python, *words)
    (made / "data" / "e2e").mkdir(parents=True, exist_ok=True)
    for part in ("trainset", "devset", "testset_w_refs"):
        rows = [
            f'"name[{part} {n}], food[Thai], area[riverside]",{part} {n} serves Thai food by the river .'
            for n in range(12)
        ]
        (made / "data" / "e2e" / f"{part}.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    return subprocess.run(
        (*command, "--out", str(made / out)), capture_output=True, text=True, timeout=600,
        env={**variables, "OMP_NUM_THREADS": "1", "PATH": path_without_java()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(made: Path) -> dict[str, dict[str, Any]]:
    return results(made, "two", *TORCHRUN)


def test_two_processes_train_as_one(made: Path, two: dict[str, dict[str, Any]]) -> None:
    one = results(made, "one")
    assert set(one) == set(two) == {label for _, label, *_ in METHODS}
    for label, result in one.items():
        other = two[label]
        assert result["steps"] == other["steps"] == (6 if label == "accumulated" else 9)
        assert [loss for _, loss in other["losses"]] == pytest.approx([loss for _, loss in result["losses"]], rel=1e-4)
        # Adam forgives a factor, the norm before clipping does not
        assert [norm for _, norm in other["norms"]] == pytest.approx([norm for _, norm in result["norms"]], rel=1e-3)
        assert other["dev_loss"] == pytest.approx(result["dev_loss"], rel=1e-4), label
        assert other["texts"] == result["texts"] and len(other["texts"]) == 5


@pytest.mark.slow
def test_a_process_that_is_killed_costs_no_step_and_no_number(made: Path, two: dict[str, dict[str, Any]]) -> None:
    script = made / "killed.py"
    script.write_text(KILLED)
    ran = launched(made, "killed-runs", *TORCHRUN, str(script))
    assert ran.returncode != 0 and (made / "killed").exists()
    assert "deep" not in finished(made / "killed-runs")
    ran = launched(made, "killed-runs", *TORCHRUN, str(script))
    assert ran.returncode == 0, ran.stderr[-2000:]
    for rank in range(2):
        steps = [int(number) for number in (made / f"steps-{rank}").read_text().split()]
        assert steps == [*range(6), *range(5, 9)], rank
    again = finished(made / "killed-runs")
    for label, result in two.items():
        for key in ("losses", "norms", "dev_loss", "texts"):
            assert again[label][key] == result[key], (label, key)


def test_processes_together_are_one_worker(made: Path) -> None:
    ran = subprocess.run(
        (sys.executable, str(NLG), "--grid", str(made / "grid.toml"), "--workers", "2",
         "--model", str(made / "model")),
        capture_output=True, text=True, env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
    )  # fmt: skip
    assert ran.returncode == 1 and "2 processes train each run together" in ran.stderr
