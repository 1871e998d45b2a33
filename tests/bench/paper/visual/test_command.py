"""vision.py as a user calls it: from training to report, again, status, check; and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.paper import vision as vision_command
from tests.support import ROOT

GRID = """
name = "shortest"
tasks = ["digits"]
seeds = [1, 2]
[common]
backbone = "small"
size = 16
epochs = 1
warmup = 0
batch = 200
length = 2
most_test = 50
[[methods]]
name = "none"
layers = "first"
lr = [0.5, 0.1]
weight_decay = [0.0]
[[methods]]
name = "linear"
layers = "all"
label = "linear"
lr = [0.5]
weight_decay = [0.0]
"""


def vision(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFIXATTN_")}
    command = (sys.executable, "-W", "ignore", str(ROOT / "bench" / "paper" / "vision.py"), *words)
    return subprocess.run(command, capture_output=True, text=True, env=environment | variables)


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """The same within this process, for what trains nothing: status, output, errors."""
    for name in [name for name in os.environ if name.startswith("PREFIXATTN_")]:
        monkeypatch.delenv(name)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return vision_command.main(list(words)), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    folder = tmp_path_factory.mktemp("vision")
    (folder / "grid.toml").write_text(GRID)
    return folder, vision("--grid", str(folder / "grid.toml"), "--out", str(folder / "runs"), "--workers", "2")


def test_from_training_to_report(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, ran = done
    assert ran.returncode == 0, ran.stderr
    names = sorted(str(path.relative_to(folder / "runs")) for path in (folder / "runs").rglob("*.json"))
    assert len(names) == 2 + 2 + 2 and all("shortest/digits/" in name for name in names)
    results = json.loads((folder / "runs.json").read_text())
    cells = {cell["label"]: cell for cell in results["cells"]}
    assert [len(cell["test"]) for cell in cells.values()] == [2, 2]
    assert cells["linear"]["cached"] and not cells["none-first-P2"]["cached"]
    assert "| No-share, SHALLOW |" in ran.stdout and "4 of 4 final runs are measured" in ran.stdout
    assert {path.name for path in folder.iterdir()} >= {"runs.md", "runs.html", "runs.png"}


def test_again_nothing_is_repeated(done: tuple[Path, subprocess.CompletedProcess[str]], here: Here) -> None:
    folder, ran = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.json")}
    words = ("--grid", str(folder / "grid.toml"), "--out", str(folder / "runs"))
    status, out, _ = here(*words)
    assert status == 0 and out == ran.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.json")} == before
    _, shown, _ = here("status", *words)
    assert shown.split("\n")[1].split() == ["shortest/digits", "6", "0", "0", "0"]
    assert here("report", *words)[1] in ran.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (("--suite", "tiny", "--tasks", "cars"), "task 'cars': not in grid tiny"),
        (("--suite", "tiny", "--methods", "deeep"), "method 'deeep': not in grid tiny"),
        (("--suite", "tiny", "--workers", "0"), "--workers is 0, expected 1 or more"),
        (("--suite", "vtab1k", "--preset", "published"), "--preset published: only of --suite fgvc"),
        (("--grid", "nowhere.toml"), "nowhere.toml: not readable as TOML"),
        (("--suite", "tiny", "--data", "/nowhere"), "--data /nowhere: no such folder"),
        (("status", "--suite", "tiny", "--out", "/nowhere"), "/nowhere: no such folder; nothing of grid tiny was run"),
        (("check", "--suite", "vtab1k"), "no data folder; give --data or set PREFIXATTN_DATA"),
    ],
)
def test_refuses_in_one_line(words: tuple[str, ...], said: str, here: Here) -> None:
    status, _, err = here(*words)
    assert status == 1
    assert err.startswith(f"vision.py: {said}") and err.count("\n") == 1, err


def test_a_task_without_its_data_is_refused_before_anything_runs(tmp_path: Path, here: Here) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace('"digits"', '"cifar10"'))
    status, _, err = here("--grid", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "runs"))
    assert status == 1 and err.startswith("vision.py: ") and err.count("\n") == 1
    assert "CIFAR-10" in err and not list(tmp_path.rglob("*.json"))
    status, out, _ = here("check", "--grid", str(tmp_path / "grid.toml"))
    assert status == 1 and out.startswith("cifar10: ")


def test_check_counts_what_is_there(tmp_path: Path, here: Here) -> None:
    status, out, _ = here("check", "--suite", "fgvc", "--data", str(tmp_path))
    assert status == 1 and "0 of 5 sets are whole" in out


@pytest.mark.slow  # test_from_training_to_report has one task and two methods of it
def test_the_tiny_suite_from_training_to_report(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    ran = vision("--suite", "tiny", "--out", str(tmp_path / "tiny"), "--workers", "2")
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert {cell["task"] for cell in results["cells"]} == {"digits", "dsprites_loc"}
    for cell in results["cells"]:
        assert len(cell["test"]) == cell["seeds"] == 2 and cell["diverged"] == 0, cell["label"]
        assert cell["mean"] > 1.5 / cell["classes"], f"{cell['task']}, {cell['label']}: no better than chance"
    assert (tmp_path / "tiny.html").exists()
