"""The E2E run's command line and files: what is refused, what a record names, what the table says. Without torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import e2e
import e2e_data
import plot_runs
from runs import Refusal, digest, finished, locked, write_json

BAD_ARGUMENTS = {
    "--model ./nowhere": "--model ./nowhere: no such folder",
    "--model ~nobody-of-this-name/x": "--model ~nobody-of-this-name/x: no such folder",
    "--data ~nobody-of-this-name/x": "no such folder; expected one with trainset.csv",
    "--lr deep": "--lr deep: expected METHOD=NUMBER, as in deep=1e-3",
    "--lr lora=1": "no method 'lora'; there are frozen, deep, simple, none, none-word, deep-all, original",
    "--lr deep=nan": "--lr deep=nan: expected a finite number above 0",
    "--lr deep=-1": "--lr deep=-1: expected a finite number above 0",
    "--lr deep=inf": "--lr deep=inf: expected a finite number above 0",
    "--methods deep --lr none=1": "--lr none=1: none is not trained in this run of deep",
    "--methods frozen --lr frozen=1": "--lr frozen=1: frozen is not trained in this run of frozen",
    "--epochs 0": "--epochs is 0, expected 1 to 2147483647",
    "--prompts -1": "--prompts is -1, expected 0 to",
    "--dev 0": "--dev is 0, expected 1 to",
    "--dev -3": "--dev is -3, expected 1 to",
    "--seed 99999999999999999999": "--seed is 99999999999999999999, expected 0 to 4294967295",
    "--threads 0": "--threads is 0, expected 1 to",
    "--length 600": "a prefix of length 600 and --max-new 100 leave no room for a prompt in the 512 positions",
    "--max-new 600": "a prefix of length 5 and --max-new 600 leave no room for a prompt in the 512 positions",
    "--out x.png": "--out x.png: expected the name of a file that ends in .json",
    "--out FILE/x.json": "Not a directory",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_one_line(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    given = arguments.replace("FILE", str(tmp_path / "file")).split()
    assert e2e.main(["--data", "generated", "--out", str(tmp_path / "r.json"), *given]) == 1
    stderr = capsys.readouterr().err
    assert BAD_ARGUMENTS[arguments] in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_process_refuses_too_and_knows_no_abbreviation(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(e2e.__file__)), "--data", "generated"]
    done = subprocess.run([*command, "--epochs", "0"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    done = subprocess.run([*command, "--ou", str(tmp_path / "r.json")], capture_output=True, text=True)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])


def test_the_record_names_no_place(tmp_path: Path) -> None:
    command = e2e.shown_command([f"--out={tmp_path}/r.json", f"--model={tmp_path}", "--data", "/x", "--lr", "deep=1"])
    assert command == f"python bench/paper/e2e.py --out OUT --model {tmp_path.name} --data DATA --lr deep=1"
    assert e2e.model_name("openai-community/gpt2-medium") == "openai-community/gpt2-medium"


def test_a_hub_name_passes_and_the_workers_get_the_parents_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[e2e.Config] = []
    monkeypatch.setattr(e2e, "run_all", lambda config, *_: asked.append(config))
    monkeypatch.setattr(e2e, "table", lambda _: "")
    monkeypatch.delenv("PREFIXATTN_DATA", raising=False)
    generated = e2e_data.load(e2e_data.GENERATED)
    for data in (generated, e2e.replace(generated, source="e2e", root=tmp_path)):
        monkeypatch.setattr(e2e_data, "load", lambda _, data=data: data)
        assert e2e.main(["--model", "openai-community/gpt2-medium", "--out", str(tmp_path / "r.json")]) == 0
    assert [config.data for config in asked] == ["generated", str(tmp_path)]
    assert {config.model for config in asked} == {"openai-community/gpt2-medium"}


# --- results of a run that was cut short ---


@pytest.mark.parametrize("damage, words", [
    ("list", "not a result of this program (lacks lr, trained,"), ("empty", "not a result of this program"),
    ("texts", "lacks texts"), ("fingerprint", "result of another run"), ("method", "result of another run"),
])  # fmt: skip
def test_a_result_of_something_else_is_refused(damage: str, words: str, tmp_path: Path) -> None:
    whole = {"lr": 1.0, "trained": 1, "kept": 1, "dev_loss": 2.0, "losses": [], "texts": ["a"], "peak_mib": None,
             "seconds_per_step": 0.1, "memory": "", "weights_sha256": "w", "method": "deep",
             "fingerprint": digest("key", "deep", "w")}  # fmt: skip
    write_json(path := tmp_path / "deep.json", whole)
    assert finished(path, "key", "deep", 1) == whole
    write_json(path, {"list": [], "empty": {}}.get(damage, {**whole, damage: 3}))
    with pytest.raises(Refusal) as refusal:
        finished(path, "key", "deep", 1)
    assert str(refusal.value).startswith(f"{path}: ")
    assert words in str(refusal.value)


def test_the_key_of_a_run_tells_weights_apart(tmp_path: Path) -> None:
    data, keys = e2e_data.load(e2e_data.GENERATED), set()
    for name in ("model.safetensors", "pytorch_model.bin"):
        for content in (b"1", b"2"):
            (tmp_path / name).write_bytes(content)
            keys.add(e2e.run_key(e2e.Config("demo", str(tmp_path)), data))
    assert len(keys) == 4


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(Refusal, match="another run is at work here"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):  # free again
        assert (tmp_path / "run").is_dir()


# --- the table ---

RUN = {"method": "none", "lr": 0.3, "trained": 10, "kept": 10, "dev_loss": 2.5, "seconds_per_step": 0.1,
       "peak_mib": 9.0, "memory": "resident set", "losses": [[1, 3.0], [2, 2.0]]}  # fmt: skip


def record(path: Path, methods: tuple[str, ...], **config: Any) -> str:
    write_json(path, {
        "name": "r",
        "config": {"model": "m", "epochs": 1, "batch": 10, "length": 5, "beams": 5, "threads": 1, **config},
        "data": {"where": "E2E", "trained_on": 5, "decoded": 0}, "provenance": {"device": "cpu"},
        "methods": [{**RUN, "method": method} for method in methods],
    })  # fmt: skip
    return str(path)


def test_the_table_says_what_is_not_like_for_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    assert plot_runs.main([record(path, ("deep", "none", "original"), logits="labelled", parallel=2)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "logits (they weigh on peak MiB): at every position for original, at labelled",
        "no ms/step: methods ran side by side",
        "none: random, P = 5; the published",
    ):
        assert words in shown
    assert "| ms/step |" not in shown and "100.0" not in shown and "| peak MiB |" in shown
    assert plot_runs.main([record(path, ("deep", "original"), logits="labelled", parallel=1)]) == 0
    shown = capsys.readouterr().out
    for words in ("| ms/step |", "100.0", "they weigh on ms/step and peak MiB", "ms/step: one method after another"):
        assert words in shown
    for methods, config in ((("deep", "original"), {}), (("deep",), {"logits": "labelled", "parallel": 2})):
        assert plot_runs.main([record(path, methods, **config)]) == 0  # {}: a record older than both keys
        shown = capsys.readouterr().out
        assert "| deep " in shown
        assert not any(words in shown for words in ("at every position", "side by side", "No-share"))


def test_a_run_by_twos_is_no_run_one_by_one() -> None:
    """Resumed, its methods would have been timed in both ways."""
    data = e2e_data.load(e2e_data.GENERATED)
    keys = {e2e.run_key(e2e.Config("demo", parallel=n, threads=1), data) for n in (1, 2)}
    assert len(keys) == 2


def test_json_nested_too_deeply_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "r.json").write_text("[" * 100_000)
    assert plot_runs.main([str(path)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"{path}: not readable as JSON") and stderr.count("\n") == 1
    assert stderr.endswith("; expected a results file of e2e.py\n")  # it may be anything: nobody is told to delete it


@pytest.mark.parametrize("content", [[], 3, {}, {"methods": 3}, {"methods": [1]}])
def test_what_is_no_record_is_refused_in_one_line(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(path := tmp_path / "r.json", content)
    assert plot_runs.main([str(path)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"{path}: not a results file (")
    assert stderr.count("\n") == 1
