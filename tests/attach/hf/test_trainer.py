"""Who trains an attached model trains its prefix, or is told why not before the first step."""

import gc
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as serialized
from torch import Tensor

import prefixattn
from prefixattn import FactoredAdamW, PrefixConfig
from prefixattn.testing.optim import two_processes

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed: transformers' Trainer needs it")
from prefixattn.attach.hf.trainer import OTHERS  # noqa: E402
from prefixattn.testing.models import tiny, token_ids  # noqa: E402

NOT_TRAINED = "without its prefix, whose gradients it neither clips nor zeroes"
IN_NONE = "without the prefix on LlamaForCausalLM, which got a gradient and is in no optimizer"


def attached_model(**choices: Any) -> tuple[Any, Any]:
    model = tiny("llama")
    torch.manual_seed(5)
    return model, prefixattn.attach(model, PrefixConfig(length=3, **{"share": "none", **choices}))


def rows(count: int = 8, banks: int = 0) -> list[dict[str, Tensor]]:
    found = [{"input_ids": ids, "labels": ids} for ids in token_ids(count)]
    return [{**row, "prefix_ids": torch.tensor(i % banks)} for i, row in enumerate(found)] if banks else found


def arguments(folder: Path | str, cls: Any = transformers.Trainer, **options: Any) -> Any:
    common = dict(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    made = transformers.TrainingArguments
    if issubclass(cls, transformers.Seq2SeqTrainer):
        made = transformers.Seq2SeqTrainingArguments
    return made(**{**common, **options})


def values(prefix: Any) -> list[Tensor]:
    return [p.detach().clone() for p in prefix.parameters()]


def moved(prefix: Any, before: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(values(prefix), before, strict=True))


class Theirs(transformers.Trainer):
    """A trainer of somebody else's, whose loss reads what a model returns, as TRL's does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, out = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        assert out.logits.shape[:2] == inputs["input_ids"].shape
        return (loss, out) if return_outputs else loss


class Mixed(prefixattn.PrefixTrainer, Theirs):
    pass


class Sequences(prefixattn.PrefixTrainer, transformers.Seq2SeqTrainer):
    pass


@pytest.mark.parametrize("cls", [transformers.Trainer, transformers.Seq2SeqTrainer, Theirs])
@pytest.mark.parametrize("given", ["made by it", "given", "a head too"])
def test_a_trainer_that_knows_no_prefix_is_stopped_before_its_first_step(cls: Any, given: str, tmp_path: Path) -> None:
    model, prefix = attached_model()
    model.lm_head.requires_grad_(given == "a head too")
    optimizers = (torch.optim.SGD(prefix.parameters(), lr=0.1), None) if given == "given" else (None, None)
    before, head = values(prefix), model.lm_head.weight.detach().clone()
    trainer = cls(model, arguments(tmp_path, cls), train_dataset=rows(), optimizers=optimizers)
    with pytest.raises(RuntimeError, match=NOT_TRAINED) as refused:
        trainer.train()
    assert ("class Mine" in str(refused.value)) == (cls is not transformers.Trainer)
    assert not moved(prefix, before) and torch.equal(model.lm_head.weight, head)


def test_a_trainer_may_train_a_head_below_which_the_prefix_is_frozen(tmp_path: Path) -> None:
    model, prefix = attached_model()
    prefix.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    before = model.lm_head.weight.detach().clone()
    transformers.Trainer(model, arguments(tmp_path), train_dataset=rows()).train()
    assert not torch.equal(model.lm_head.weight, before)


def test_a_trainer_of_another_model_is_none_of_the_prefixs_business(tmp_path: Path) -> None:
    model, prefix = attached_model()
    model(**{name: t[None] for name, t in rows(1)[0].items()}).loss.backward()
    other = tiny("llama")
    before = other.lm_head.weight.detach().clone()
    transformers.Trainer(other, arguments(tmp_path), train_dataset=rows()).train()
    assert not torch.equal(other.lm_head.weight, before)
    assert all(p.grad is not None for p in prefix.parameters())


@pytest.mark.parametrize("cls", [Mixed, Sequences])
def test_made_of_ours_and_another_trainer_it_trains_and_saves_the_prefix(cls: Any, tmp_path: Path) -> None:
    model, prefix = attached_model()
    before = values(prefix)
    trainer = cls(model, arguments(tmp_path, cls, save_strategy="steps", save_steps=3), train_dataset=rows())
    assert trainer.labelled == (cls is Sequences)
    trainer.train()
    assert moved(prefix, before)
    assert (tmp_path / "checkpoint-3" / "prefix.json").is_file()


def test_a_checkpoint_has_what_is_trained_beside_the_prefix_or_is_refused(tmp_path: Path) -> None:
    model, prefix = attached_model()
    model.lm_head.requires_grad_(True)
    trainer = prefixattn.PrefixTrainer(model, arguments(tmp_path), train_dataset=rows(4))
    trainer.train()
    folder = tmp_path / "out"
    trainer.save_model(str(folder))
    file, trained, before = folder / OTHERS, model.lm_head.weight.detach().clone(), values(prefix)
    whole = file.read_bytes()
    with torch.no_grad():
        for t in (model.lm_head.weight, *prefix.parameters()):
            t.zero_()
    for bad in (whole[:-8], whole[:40], b"", serialized({"other": torch.zeros(2)}), None):
        file.unlink()
        if bad is not None:
            file.write_bytes(bad)
        with pytest.raises(ValueError, match=OTHERS) as refusal:
            trainer._load_from_checkpoint(str(folder))
        assert "\n" not in str(refusal.value)
        assert not model.lm_head.weight.any() and not any(t.any() for t in values(prefix))  # nothing half read
        file.touch()
    file.write_bytes(whole)
    trainer._load_from_checkpoint(str(folder))
    assert torch.equal(model.lm_head.weight, trained)
    assert all(torch.equal(a, b) for a, b in zip(values(prefix), before, strict=True))
    model.lm_head.requires_grad_(False)
    trainer.save_model(str(folder))
    assert not file.exists()  # it would be another run's


class Quantizer:
    """transformers' mark on a model whose weights came quantised."""

    is_trainable = False


def marked_as_quantised(model: Any) -> Any:
    model.is_quantized, model.hf_quantizer = True, Quantizer()
    return model


def test_a_prefix_is_trained_beside_weights_that_came_quantised(tmp_path: Path) -> None:
    """A GGUF that was unpacked keeps that mark, for which the Trainer alone refuses to train."""
    model, prefix = attached_model()
    given = dict(train_dataset=rows(), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=marked_as_quantised(model), **given)
    before = values(prefix)
    trainer = prefixattn.PrefixTrainer(model=model, **given)
    assert not model._hf_peft_config_loaded and "_hf_peft_config_loaded" not in vars(model)
    trainer.train()
    assert moved(prefix, before)


def test_weights_through_which_no_gradient_passes_are_refused(tmp_path: Path) -> None:
    model, _ = attached_model()
    model.packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"packed by Quantizer.*GgufConfig\(dequantize=True\)"):
        prefixattn.PrefixTrainer(model=marked_as_quantised(model), args=arguments(tmp_path), train_dataset=rows())


@pytest.mark.parametrize("drop", [True, False])
def test_the_trainer_keeps_the_column_of_a_bank(drop: bool, tmp_path: Path) -> None:
    model, bank = attached_model(count=4)
    before = bank.encoder.weight.detach().clone()
    args = arguments(tmp_path, remove_unused_columns=drop, weight_decay=0.0, eval_strategy="steps", eval_steps=3)
    data = rows(8, banks=3)
    trainer = prefixattn.PrefixTrainer(model, args, train_dataset=data, eval_dataset=data[:4])
    trainer.train()
    changed = (bank.encoder.weight != before).any(1)
    assert changed.tolist() == [True, True, True, False]
    assert any("eval_loss" in row for row in trainer.state.log_history)


def step_of(loss: Any, *optimizers: Any) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_a_loop_whose_optimizer_leaves_the_prefix_out_is_stopped_before_its_first_step() -> None:
    model, prefix = attached_model()
    ids = token_ids(2)

    def loss() -> Tensor:
        out: Tensor = model(input_ids=ids, labels=ids).loss
        return out

    with pytest.raises(RuntimeError, match=f"AdamW would step {IN_NONE}"):
        step_of(loss, torch.optim.AdamW(model.parameters(), lr=0.1))  # all of them frozen
    model.lm_head.requires_grad_(True)
    head = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    kept = model.lm_head.weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"SGD would step {IN_NONE}"):
        step_of(loss, head)
    assert torch.equal(model.lm_head.weight, kept)
    before = values(prefix)
    # of two, whichever comes first
    step_of(loss, head, FactoredAdamW(prefix, lr=0.1))
    assert moved(prefix, before) and not torch.equal(model.lm_head.weight, kept)


def test_optimizers_of_other_models_and_frozen_prefixes_step_as_ever() -> None:
    model, prefix = attached_model()
    ids = token_ids(2)
    model(input_ids=ids, labels=ids).loss.backward()
    other = torch.nn.Linear(3, 2)
    step_of(lambda: other(torch.ones(3)).sum(), torch.optim.SGD(other.parameters(), lr=0.1))
    model.lm_head.requires_grad_(True)
    head = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    with prefix.disabled():
        step_of(lambda: model(input_ids=ids, labels=ids).loss, head)
    prefix.requires_grad_(False)
    step_of(lambda: model(input_ids=ids, labels=ids).loss, torch.optim.SGD([model.lm_head.weight], lr=0.1))


def test_a_look_at_who_trains_keeps_nothing_alive() -> None:
    model, _ = attached_model()
    ids = token_ids(2)
    model(input_ids=ids, labels=ids).loss.backward()
    other = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    step_of(lambda layer=other: layer(torch.ones(3)).sum(), optimizer)
    dead = weakref.ref(other), weakref.ref(optimizer)
    del other, optimizer
    gc.collect()
    assert all(ref() is None for ref in dead)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("factored", [True, False])
def test_zero_grad_of_the_model_zeroes_the_prefix(to_none: bool, factored: bool) -> None:
    model, prefix = attached_model(share="deep", hidden=8)
    made = "zero_grad" in vars(model)
    ids = token_ids(2)
    keeper = FactoredAdamW(prefix) if factored else None
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=to_none)
    grads = [p.grad for p in prefix.parameters()]
    assert all(g is None if to_none else g.norm() == 0 for g in grads)
    prefix.detach()
    assert made and "zero_grad" not in vars(model) and (keeper is None or keeper.networks)


def train_with_processes(rank: int | None, folder: str = "", head: bool = False, **choices: Any) -> list[Tensor]:
    model, prefix = attached_model(**choices)
    model.lm_head.requires_grad_(head)
    processes = 1 if rank is None else 2
    options: dict[str, Any] = dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.01)
    options |= dict(per_device_train_batch_size=4 // processes, ddp_backend=None if processes == 1 else "gloo")
    settings = arguments(folder or tempfile.mkdtemp(), **options)
    trainer = prefixattn.PrefixTrainer(model, settings, train_dataset=rows(12))
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    return [*values(prefix), *([model.lm_head.weight.detach()] if head else [])]


SCENARIOS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (train_with_processes, {}),
    "gate": (train_with_processes, {"share": "deep", "hidden": 8, "gate": True}),
    "head": (train_with_processes, {"head": True}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes(Path(__file__), tmp_path_factory.mktemp("trainer"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_of_the_trainer_are_equal_to_one(
    results: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    first, second = (result[name][0] for result in results)
    expected = train_with_processes(None, str(tmp_path), **SCENARIOS[name][1])
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b), "the processes drifted apart"
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
