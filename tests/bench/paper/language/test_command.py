"""nlg.py as a user calls it: from training to texts, again, status, check; and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the runs need transformers")
from bench.paper import nlg as nlg_command
from bench.paper.language.testing import made_model
from tests.support import ROOT, path_without_java

GRID = """
name = "shortest"
tasks = ["e2e"]
seeds = [1, 2]
[common]
backbone = "{folder}"
epochs = 1
subset = 8
batch = 4
length = 2
hidden = 8
dev = 4
prompts = 2
beams = 1
most_new = 4
[[methods]]
name = "none"
layers = "all"
lr = [0.5, 0.1]
weight_decay = [0.0]
"""
FILES = {"train": "trainset", "dev": "devset", "test": "testset_w_refs"}


def nlg(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFIXATTN_")}
    command = (sys.executable, "-W", "ignore", str(ROOT / "bench" / "paper" / "nlg.py"), *words)
    environment |= {"PATH": path_without_java(), **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """The same within this process, which has its imports: status, output, errors."""
    for name in [name for name in os.environ if name.startswith("PREFIXATTN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", path_without_java())

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return nlg_command.main(list(words)), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data of a few rows and a grid."""
    folder = tmp_path_factory.mktemp("nlg")
    made_model("gpt2", folder / "model")
    (folder / "e2e").mkdir()
    for part, file in FILES.items():
        rows = [f'"name[{part} {n}], food[Thai]",{part} {n} serves Thai food .' for n in range(12)]
        (folder / "e2e" / f"{file}.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    (folder / "grid.toml").write_text(GRID.format(folder=folder / "model"))
    return folder


def test_from_training_to_texts_and_not_again(made: Path, here: Here) -> None:
    words = ("--grid", str(made / "grid.toml"), "--data", str(made), "--out", str(made / "runs"))
    ran = nlg(*words)
    assert ran.returncode == 0, ran.stderr
    files = {path.name: json.loads(path.read_text()) for path in (made / "runs").rglob("*.json")}
    searched = {name: run["result"]["dev_loss"] for name, run in files.items() if name.startswith("search")}
    finals = [run for name, run in files.items() if name.startswith("final")]
    assert len(searched) == 2 and len(finals) == 2
    best = min(searched, key=lambda name: searched[name])
    assert all(f"lr{run['config']['lr']:g}-" in best for run in finals)
    assert all(len(run["result"]["texts"]) == 2 and run["result"]["scores"]["ROUGE_L"] >= 0 for run in finals)
    before = {path: path.stat().st_mtime_ns for path in (made / "runs").rglob("*.json")}
    assert here(*words)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (made / "runs").rglob("*.json")} == before
    status, shown, _ = here("report", *words)
    assert status == 0 and shown.startswith((made / "runs.md").read_text())
    assert ran.stdout.endswith(shown) and "a reference" in shown
    assert "<h2>What was written of e2e</h2>" in (made / "runs.html").read_text()
    status, shown, _ = here("status", *words)
    assert status == 0 and "4" in shown


@pytest.mark.filterwarnings("ignore")  # as the command does
def test_a_run_does_not_know_where_its_model_lies(made: Path, here: Here) -> None:
    (made / "one.toml").write_text((made / "grid.toml").read_text().replace("[1, 2]", "[1]").replace(", 0.1]", "]"))
    words = ("--grid", str(made / "one.toml"), "--data", str(made), "--out", str(made / "moved"))
    status, _, errors = here(*words, "--model", str(made / "model"))
    assert status == 0, errors
    written = [path.read_text() for path in (made / "moved").rglob("*.json")]
    assert len(written) == 1 and not any(str(made) in text for text in written)
    assert all(json.loads(text)["config"]["backbone"] == "model" for text in written)


def test_several_processes_are_for_runs(made: Path) -> None:
    words = ("--grid", str(made / "grid.toml"), "--out", str(made / "runs"))
    for verb, processes, said in (
        ("report", "2", "report: for one process; torchrun is for runs"),
        ("run", "many", "WORLD_SIZE is 'many', expected the number of processes"),
    ):
        ran = nlg(verb, *words, WORLD_SIZE=processes)
        assert ran.returncode == 1 and said in ran.stderr.strip().splitlines()[-1], ran.stderr


def test_check_tells_counts_from_the_published(made: Path) -> None:
    ran = nlg("check", "--data", str(made), "--tasks", "e2e")
    assert ran.returncode == 1
    assert "train has 12 rows, published are 42,061" in ran.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["--suite", "gpt3"], "no suite 'gpt3'; there are demo, smollm2"),
        (["--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["check"], "no data folder; give --data or set PREFIXATTN_DATA"),
        (["times", "--suite", "gpt2-medium", "--rounds", "0"], "--rounds is 0, expected 1 or more"),
        (["times", "--suite", "gpt2-medium", "--workers", "2"], "times: what is compared alternates in one process"),
        (["check", "--data", ".", "--tasks", "dart"], "no task 'dart'; there are e2e, webnlg, xsum"),
        (["--suite", "gpt2-medium", "--workers", "0"], "--workers is 0, expected 1 or more"),
        (
            ["--suite", "gpt2-medium", "--model", "/nowhere", "--data", ".", "--tasks", "e2e"],
            "/nowhere: no language model",
        ),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: list[str],
    said: str,
    made: Path,
    tmp_path: Path,
    here: Here,
) -> None:
    words = [str(made) if word == "." else word for word in words]
    status, _, errors = here(*words, *(["--out", str(tmp_path / "runs")] if "check" not in words else []))
    assert status == 1 and errors.startswith("nlg.py: ") and errors.count("\n") == 1, errors
    assert said in errors
    assert not (tmp_path / "runs").exists()
