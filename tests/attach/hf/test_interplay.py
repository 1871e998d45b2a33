"""Attached models in the rest of the stack: checkpoints, compilers, export, types, copies, Trainer, quantisation."""

import copy
import io
from dataclasses import fields
from importlib.util import find_spec

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from prefixattn.attach import attached  # noqa: E402
from prefixattn.testing.models import DECODERS, FAMILIES, model_inputs, tiny, token_ids  # noqa: E402

CLOSE = dict(rtol=1e-5, atol=1e-5)
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
ALL = ["gpt2", *FAMILIES]
# dropouts of the model off in training mode
CALM = {
    "bart": dict(dropout=0.0),
    "t5": dict(dropout_rate=0.0),
    "gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "vit": dict(hidden_dropout_prob=0.0),
    "bert": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "roberta": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}
_ARGUMENTS = {field.name for field in fields(transformers.TrainingArguments)}
# the newer name is missing from older transformers, the older deprecated by newer ones
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _ARGUMENTS)
CACHELESS = {"vit", "bert", "roberta"}  # no argument use_cache


def run(model, family):
    options = {} if family in CACHELESS else {"use_cache": False}
    return model(**model_inputs(family), **options).logits


def gradients(prefix, out):
    out.float().square().mean().backward()
    grads = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    return grads


def checkpoint_layers(model, reentrant):
    # The newer name is missing from older transformers, the older deprecated by newer ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ALL)
def test_gradient_checkpointing_gives_identical_gradients(family, when, reentrant):
    model = tiny(family, **CALM.get(family, {})).train()
    if when == "before":
        checkpoint_layers(model, reentrant)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    if when == "after":
        model.eval()
        wanted = gradients(prefix, run(model, family))
        checkpoint_layers(model.train(), reentrant)
    else:
        wanted = gradients(prefix, run(model.eval(), family))
        model.train()
    found = gradients(prefix, run(model, family))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert all(g.abs().sum() > 0 for g in found.values())


# of T5 the base model is the model itself, whose hook runs before the graph and hands it the bank, which is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@COMPILES
@pytest.mark.parametrize("family", ALL)
def test_compiles_as_one_graph_with_its_backward(family):
    torch._dynamo.reset()
    model = tiny(family)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    eager = run(model, family)
    wanted = gradients(prefix, eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = run(compiled, family)
    torch.testing.assert_close(out, eager, **CLOSE)
    torch.testing.assert_close(gradients(prefix, out), wanted, **CLOSE)


@pytest.mark.parametrize("family", ALL)
def test_exports(family):
    model, inputs = tiny(family), model_inputs(family)
    prefixattn.attach(model, PrefixConfig(length=4, share="none"))
    options = {} if family in CACHELESS else {"use_cache": False}
    with torch.no_grad():
        expected = model(**inputs, **options).logits
        program = torch.export.export(model, (), {**inputs, **options})
        torch.testing.assert_close(program.module()(**inputs, **options).logits, expected, **CLOSE)


@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("family", ALL)
def test_a_float32_prefix_trains_in_a_half_precision_model(family, way):
    model = tiny(family)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    with torch.no_grad():
        exact = run(model, family)
    if way != "autocast":
        model.to(getattr(torch, way))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        inputs = {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in model_inputs(family).items()}
        out = model(**inputs).logits
    gradients(prefix, out)
    error = (out.float() - exact).norm() / exact.norm()
    assert error < 0.06, f"relative error {error:.1e}; bfloat16 resolves 4e-3"


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "vit"])
def test_copies_are_whole_and_apart(family, way):
    model = tiny(family)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    with torch.no_grad():
        expected = run(model, family)
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        torch.testing.assert_close(run(twin, family), expected, rtol=0, atol=0)
        other = attached(twin)
        assert other is not prefix
        for p in other.parameters():
            p.add_(1.0)
        assert not torch.equal(run(twin, family), expected)
        torch.testing.assert_close(run(model, family), expected, rtol=0, atol=0)
        other.detach()
        torch.testing.assert_close(run(model, family), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ALL)
def test_attention_weights_are_refused(family):
    model, inputs = tiny(family), model_inputs(family)
    prefixattn.attach(model, PrefixConfig(length=4, share="none"))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(**inputs, output_attentions=True)


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "gpt2"])
def test_left_padding(family):
    model, ids = tiny(family), token_ids(3, 7)
    prefixattn.attach(model, PrefixConfig(length=4, share="none"))
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[:, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(padded, attention_mask=mask, position_ids=positions).logits[:, 2:]
        torch.testing.assert_close(out, model(ids).logits, rtol=2e-5, atol=2e-5)


class Rows(torch.utils.data.Dataset):
    """Eight texts, which are their own labels."""

    def __init__(self, family):
        self.ids = token_ids(8)
        self.family = family

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(folder, family="llama", resume=None, steps=6, model=None, **arguments):
    pytest.importorskip("accelerate", reason="accelerate is not installed: transformers' Trainer needs it")
    model = model or tiny(family)
    if attached(model) is None:
        torch.manual_seed(5)
        prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    options = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    trainer = prefixattn.PrefixTrainer(
        model, transformers.TrainingArguments(**(options | arguments)), train_dataset=Rows(family)
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_trainer_trains_saves_and_resumes(tmp_path):
    model, trainer = train(tmp_path / "a", max_grad_norm=0.5)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(row["grad_norm"] > 0 for row in trainer.state.log_history if "loss" in row)
    assert isinstance(trainer.optimizer.optimizer, prefixattn.FactoredAdamW)
    folder = tmp_path / "a" / "checkpoint-3"
    files = {path.name for path in folder.iterdir()}
    assert "prefix.json" in files and "optimizer.pt" in files and "model.safetensors" not in files
    again, _ = train(tmp_path / "b", resume=str(folder), max_grad_norm=0.5)
    torch.testing.assert_close(attached(again).state_dict(), attached(model).state_dict(), **CLOSE)
    loaded = tiny("llama")
    prefixattn.load(loaded, tmp_path / "a" / "checkpoint-6")
    with torch.no_grad():
        torch.testing.assert_close(run(loaded, "llama"), run(model, "llama"), **CLOSE)


def test_trainer_trains_a_head_with_the_prefix(tmp_path):
    model = tiny("llama")
    torch.manual_seed(5)
    prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    model.lm_head.requires_grad_(True)
    before = model.lm_head.weight.detach().clone()
    _, trainer = train(tmp_path, model=model, gradient_accumulation_steps=2, **{CHECKPOINTING: True})
    assert not torch.equal(model.lm_head.weight, before)
    assert (tmp_path / "checkpoint-6" / "trained_parameters.safetensors").is_file()
    with torch.no_grad():
        after = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-6"))
    torch.testing.assert_close(model.lm_head.weight, after, rtol=0, atol=0)


def test_trainer_refuses_in_words(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM without a prefix"):
        prefixattn.PrefixTrainer(tiny("llama"))
    with pytest.raises(NotImplementedError, match="optim is 'adafactor'; PrefixTrainer makes 'adamw_torch'"):
        train(tmp_path, optim="adafactor")


def test_restore_refuses_another_prefix(tmp_path):
    prefix = prefixattn.attach(tiny("llama"), PrefixConfig(length=4, hidden=8, gate=True))
    prefix.save_pretrained(tmp_path / "whole")
    prefix.save_pretrained(tmp_path / "folded", folded=True)
    wanted = {name: t.clone() for name, t in prefix.state_dict().items()}
    with torch.no_grad():
        for p in prefix.parameters():
            p.mul_(2)
    other = prefixattn.attach(tiny("llama"), PrefixConfig(length=4, hidden=9))
    for target, folder in ((other, "whole"), (prefix, "folded")):
        kept = {name: t.clone() for name, t in target.state_dict().items()}
        with pytest.raises(ValueError, match="expected one of PrefixConfig"):
            target.restore(tmp_path / folder)
        torch.testing.assert_close(target.state_dict(), kept, rtol=0, atol=0)
    prefix.restore(tmp_path / "whole")
    torch.testing.assert_close(prefix.state_dict(), wanted, rtol=0, atol=0)


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def bitsandbytes_nf4(model):
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and "lm_head" not in name:
            around, _, attribute = name.rpartition(".")
            sizes = linear.in_features, linear.out_features
            packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            setattr(model.get_submodule(around), attribute, packed.to("cpu"))


@pytest.mark.parametrize("share", ["deep", "simple"])
@pytest.mark.parametrize("way", [torchao_int8, bitsandbytes_nf4], ids=lambda way: way.__name__)
def test_quantised_frozen_weights(way, share):
    library = way.__name__.partition("_")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed: no weights to quantise with it")
    model = tiny("llama", hidden_size=64, intermediate_size=64)
    way(model)
    with torch.no_grad():  # bitsandbytes repacks its weights here
        plain = run(model, "llama")
    torch.manual_seed(0)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, hidden=8, share=share))
    with torch.no_grad():
        run(model, "llama")
    out = run(model, "llama")
    assert not torch.equal(out, plain)
    found = gradients(prefix, out)
    # the slope along the gradient, by differences
    parameters, step = dict(prefix.named_parameters()), 1e-3
    with torch.no_grad():
        losses = []
        for sign in (1, -2):
            for name, p in parameters.items():
                p.add_(found[name], alpha=sign * step)
            losses.append(run(model, "llama").double().square().mean())
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(slope.float(), sum(g.square().sum() for g in found.values()), rtol=2e-2, atol=0)
    prefix.detach()
    with torch.no_grad():
        torch.testing.assert_close(run(model, "llama"), plain, rtol=0, atol=0)
