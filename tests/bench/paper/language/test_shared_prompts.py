"""A prompt that is read once gives the losses and the texts of one that is read for each reference and each beam."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the runs need transformers")
pytest.importorskip("peft", reason="one of the methods is PEFT's")

from bench.paper import e2e_data
from bench.paper.language import encode, tasks, train
from bench.paper.language.data import Part, Record, Task
from bench.paper.language.decode import Search, decode, groups, padded
from bench.paper.language.encode import Sample
from bench.paper.language.shared_prompts import TOGETHER, Group, parted
from bench.paper.language.testing import made_model

# of PEFT 0.21.2, which reads what transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = train.Settings("e2e", "deep", 1e-2, 0.0, 101, length=3, hidden=8, batch=4, beams=3, most_new=8)
METHODS = ("frozen", "deep", "simple", "none", "plus", "lora", "adapter", "partial", "finetune")
PAIRS = e2e_data.generate(6, 5, seed=1)
SOURCES = list(dict.fromkeys(source for source, _ in PAIRS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: made_model(family, tmp_path_factory.mktemp(family)) for family in ("gpt2", "llama", "bart")}


@pytest.fixture(autouse=True)
def small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part([Record(source, (target,), (target,), "generated") for source, target in PAIRS])
    made = Task("e2e", "generated", "none", train=part, dev=part, test=part)
    monkeypatch.setattr(tasks, "load", lambda name, quirk=False: made)


def run_of(method: str, folder: Path) -> train.Run:
    """With what is trained drawn at random: much of it is 0 at first, and would hide a mistake."""
    run = train.Run(replace(SETTINGS, method=method, backbone=str(folder)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in run.tuned.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    run.tuned.train(False)
    return run


def tokens_read(run: train.Run) -> Iterator[int]:
    """Tokens that the model's first layer meets, padding too; a value for each time that one asks."""
    met = [0]

    def count(layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        met[0] += hidden.shape[0] * hidden.shape[1]

    layers = train.tune.__globals__["blocks"](run.backbone.model)
    layers[0].register_forward_pre_hook(count, with_kwargs=True)
    while True:
        met[0] = 0
        yield 0
        yield met[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_texts_are_those_of_prompts_read_again(method: str, family: str, folders: dict[str, Path],
                                                          tmp_path: Path) -> None:  # fmt: skip
    run, found, read = run_of(method, folders[family]), {}, {}
    assert run.tuned.cached
    samples, prompts = run.samples(PAIRS), encode.prompt_ids(run.backbone.tokenizer, SOURCES)
    assert len({len(ids) for ids in prompts}) > 2  # so that some are padded
    counted = tokens_read(run)
    for cached in (True, False):
        run.tuned.cached = cached
        next(counted)
        loss = run.dev_loss(samples)
        read[cached] = next(counted)
        search = Search(beams=3, most=8)
        found[cached] = loss, decode(run.tuned, prompts, search, tmp_path / f"{cached}.json", "", run.autocast)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert found[True][1] == found[False][1]
    again = sum(len(sample.ids) for sample in samples)
    shared = len(PAIRS) - len(SOURCES)  # prompts that are not read again
    assert read[False] >= again and read[True] <= read[False] - shared * (min(map(len, prompts)) - 1)


@pytest.mark.parametrize("method", ["original", "peft", "prompt"])
def test_ways_that_bring_a_cache_or_rows_of_their_own_read_each_prompt(method: str, folders: dict[str, Path]) -> None:
    run = train.Run(replace(SETTINGS, method=method, backbone=str(folders["gpt2"])))
    assert not run.tuned.cached


def test_an_encoder_reads_each_source(folders: dict[str, Path]) -> None:
    assert not run_of("deep", folders["bart"]).tuned.cached


def test_parted_keeps_each_sample_once_and_groups_prompts_of_one_length() -> None:
    long = [Sample([n, 7, 9, *range(20, 20 + count)], 3) for n in range(TOGETHER + 2) for count in (4, 2)]
    single, empty = Sample([8, 9, 30, 31], 2), [Sample([9, 40], 1), Sample([9, 41], 1)]
    cut = Sample([1, 2, 3], 3)  # of a prompt as long as what the model takes: no target is left
    alone, found = parted([*long, single, *empty, cut])
    assert sorted(map(str, alone)) == sorted(map(str, [single, *empty, cut]))
    assert [len(group.ids) for group in found] == [TOGETHER, 2]
    rebuilt = [
        Sample([*group.ids[place], *sample.ids], len(group.ids[place]) + 1)
        for group in found for place, sample in group.samples
    ]  # fmt: skip
    assert sorted(map(str, rebuilt)) == sorted(map(str, long))
    lengths = [len(sample.ids) for _, sample in found[0].samples]
    assert lengths == sorted(lengths) and {sample.target for _, sample in found[0].samples} == {1}


def test_batches_of_a_group_are_all_its_samples_in_order() -> None:
    samples = [(n, Sample([9, n], 1)) for n in range(5)]
    found = list(Group([[1]] * 5, samples).batches(2))
    assert [places for places, _ in found] == [[0, 1], [2, 3], [4]]
    assert list(itertools.chain.from_iterable(rows for _, rows in found)) == [sample for _, sample in samples]


def test_prompts_near_in_length_go_together_and_are_padded_on_the_left() -> None:
    prompts = [[1], [2, 3], [4], [5]]
    assert groups(prompts, 3) == [[0, 2, 3], [1]]
    assert groups(prompts, 2, alike=True) == [[0, 2], [3], [1]]
    ids, mask = padded([[1], [2, 3, 4]], pad=9)
    assert ids.tolist() == [[9, 9, 1], [2, 3, 4]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
