"""PEFT's adapters, read and written."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")
from prefixattn.attach import attached  # noqa: E402
from prefixattn.testing.models import model_inputs, tiny, tiny_gpt2, token_ids  # noqa: E402

P = 5
CLOSE = dict(rtol=1e-5, atol=1e-5)
# the sequence and the prefix are within the window, or PEFT's prefix slides out of it
FAMILIES = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 16}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 16}),
    "gemma3": ("gemma3", {"sliding_window": 16}),
    "bart": ("bart", {"encoder_layers": 2}),
    "bart_odd": ("bart", {"encoder_layers": 2, "decoder_layers": 3}),
}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks


def make(name):
    family, sizes = FAMILIES[name]
    return tiny(family, **sizes), model_inputs(family)


def seq2seq(name):
    return name.startswith("bart")


def peft():
    return pytest.importorskip("peft", reason="peft is not installed: its adapters are not read with it")


def adapted(name, kind="PrefixTuningConfig", **choices):
    """A model with a random adapter of PEFT's, and its logits."""
    torch.manual_seed(5)
    model, inputs = make(name)
    if name == "bart_odd":
        choices["num_layers"] = 3  # PEFT would count the encoder's
    task = "SEQ_2_SEQ_LM" if seq2seq(name) else "CAUSAL_LM"
    config = getattr(peft(), kind)(task_type=task, num_virtual_tokens=P, **choices)
    theirs = peft().get_peft_model(model, config).eval()
    with torch.no_grad():
        return theirs, theirs(**inputs).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_peft_gives_its_logits_and_goes_back(tmp_path, name):
    theirs, expected = adapted(name)
    theirs.save_pretrained(tmp_path / "theirs")
    model, inputs = make(name)
    prefix = prefixattn.load(model, tmp_path / "theirs")
    assert prefix.config.length == P and prefix.config.positions == "shifted"
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
    prefix.export_peft(tmp_path / "ours")
    again = peft().PeftModel.from_pretrained(make(name)[0], tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=0)
    model(**inputs).logits.square().mean().backward()
    assert (prefix.encoder.bank.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bart"])
def test_a_prefix_trained_here_gives_its_logits_in_peft(tmp_path, name):
    model, inputs = make(name)
    choices = {"attentions": ["decoder"], "positions": "shifted"} if seq2seq(name) else {}
    prefix = prefixattn.attach(model, PrefixConfig(length=P, hidden=8, gate=True, **choices))
    with torch.no_grad():
        prefix.gate.copy_(torch.linspace(0.5, 1.5, len(prefix.gate)))
    prefix.export_peft(tmp_path)
    theirs = peft().PeftModel.from_pretrained(make(name)[0], tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bart_odd"])
def test_a_cartridge_is_read_and_all_of_its_rows_are_trained(tmp_path, name):
    theirs, expected = adapted(name, "CartridgeConfig", num_frozen_tokens=2)
    theirs.save_pretrained(tmp_path)
    model, inputs = make(name)
    prefix = prefixattn.load(model, tmp_path)
    out = model(**inputs).logits
    torch.testing.assert_close(out, expected, **CLOSE)
    out.square().mean().backward()
    assert (prefix.encoder.bank.grad.abs().sum((0, 1, 2, 4)) > 0).all()  # [P]


def test_rows_are_the_same_numbers_and_the_network_of_peft_is_left_behind(tmp_path):
    theirs, expected = adapted("gpt2", prefix_projection=True, encoder_hidden_size=16)
    theirs.save_pretrained(tmp_path / "theirs")
    model, inputs = make("gpt2")
    prefix = prefixattn.load(model, tmp_path / "theirs")
    assert prefix.num_parameters() == 2 * 2 * P * 32
    torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
    prefix.export_peft(tmp_path / "ours")
    saved = [safetensors_torch.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")]
    assert torch.equal(saved[0]["prompt_embeddings"], saved[1]["prompt_embeddings"])
    rows, kv = saved[0]["prompt_embeddings"], prefix().detach()  # [P, layers * 2 * Hkv * D], [layers, 2, Hkv, P, D]
    assert torch.equal(rows[:, 3 * 32 :], kv[1, 1].transpose(0, 1).reshape(P, 32))


SLIDING = {
    "mistral": {},
    "gemma2": {"tie_word_embeddings": False},
    "gemma3": {"tie_word_embeddings": False},
    "gpt_oss": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("window", [7, 3])  # wider and narrower than the prefix
@pytest.mark.parametrize("name", SLIDING)
def test_past_the_window_a_prefix_slides_out_as_pefts_does(tmp_path, name, window):
    def make():
        return tiny(name, sliding_window=window, **SLIDING[name])

    torch.manual_seed(5)
    theirs = (
        peft().get_peft_model(make(), peft().PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    )
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.mul_(3)
    theirs.save_pretrained(tmp_path / "theirs")
    prefix = prefixattn.load(model := make(), tmp_path / "theirs")
    prefix.save_pretrained(tmp_path / "ours")
    prefixattn.load(again := make(), tmp_path / "ours")
    ids, short = token_ids(3, 12), token_ids(2, 3)
    mask = torch.tensor([[1] * 12, [0] * 3 + [1] * 9, [1] * 8 + [0] * 4])
    places = {"position_ids": torch.arange(12).repeat(3, 1)}  # PEFT's count padding
    options = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    options["attention_mask"] = torch.ones_like(short)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits[mask == 1]
        for ours in (model, again):
            torch.testing.assert_close(ours(ids, attention_mask=mask, **places).logits[mask == 1], expected, **CLOSE)
        generated = theirs.generate(input_ids=short, **options)
        assert torch.equal(model.generate(short, **options), generated)
        # PEFT's own generate raises with this cache
        assert torch.equal(model.generate(short, cache_implementation="static", **options), generated)
        prefix.config = replace(prefix.config, prefix_in_window=False)
        found = model(ids[:1]).logits[0]
    inside = window - P  # tokens that see all of PEFT's prefix
    if inside > 0:
        torch.testing.assert_close(found[:inside], expected[:inside], **CLOSE)
    assert (found[max(inside, 0) :] - expected[max(inside, 0) : 12]).abs().amax(1).min() > 1e-3


def test_an_adapter_is_trained_on_as_peft_trains_it(tmp_path):
    theirs, _ = adapted("gemma2")
    theirs.save_pretrained(tmp_path)
    model, _ = make("gemma2")
    prefix = prefixattn.load(model, tmp_path)
    ids = token_ids(2, 20)
    theirs(input_ids=ids).logits.square().mean().backward()
    model(ids).logits.square().mean().backward()
    wanted = theirs.prompt_encoder.default.embedding.weight.grad.view(P, 2, 2, 2, 16).permute(1, 2, 3, 0, 4)
    torch.testing.assert_close(prefix.encoder.bank.grad, wanted, **CLOSE)


@pytest.mark.filterwarnings("error")
def test_windows_that_no_mask_tells_of_are_warned_of(tmp_path, monkeypatch):
    from prefixattn.attach.hf import sliding

    adapted("mistral")[0].save_pretrained(tmp_path)
    monkeypatch.setattr(sliding, "windows", lambda sites: {})
    with pytest.warns(UserWarning, match="mistral has sliding windows, out of which PEFT's prefix slides"):
        prefix = prefixattn.load(make("mistral")[0], tmp_path)
    assert not prefix.config.prefix_in_window


# what a model is used for is no part of its prefix


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None, "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"])
def test_an_adapter_that_is_a_prefix_alone_is_read_whatever_its_task(tmp_path, rows, task):
    edited(rows, tmp_path, task_type=task)
    assert torch.equal(prefixattn.load(tiny_gpt2(), tmp_path)(), prefixattn.load(tiny_gpt2(), rows)())


def test_an_adapter_for_features_gives_those_of_peft(tmp_path):
    torch.manual_seed(5)
    config = peft().PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    theirs = peft().get_peft_model(tiny("llama").model, config).eval()
    theirs.save_pretrained(tmp_path)
    model, inputs = tiny("llama").model, model_inputs("llama")
    prefixattn.load(model, tmp_path)
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, **CLOSE)


HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs"}


@pytest.mark.parametrize("task", HEADS)
def test_an_adapter_with_a_trained_head_is_refused_for_its_head(tmp_path, task):
    import transformers

    kind = {"SEQ_CLS": "Sequence", "TOKEN_CLS": "Token"}.get(task)
    name = f"LlamaFor{kind}Classification" if kind else "LlamaForQuestionAnswering"
    config = transformers.LlamaConfig(**{**tiny("llama").config.to_dict(), "pad_token_id": 0})
    make = lambda: getattr(transformers, name)(config)  # noqa: E731
    theirs = peft().get_peft_model(make(), peft().PrefixTuningConfig(task_type=task, num_virtual_tokens=P))
    theirs.save_pretrained(tmp_path)
    model = make()
    with pytest.raises(ValueError, match=rf"modules_to_save \[.*'{HEADS[task]}'.*\] \(task_type '{task}'\): beside"):
        prefixattn.load(model, tmp_path)
    assert attached(model) is None


# the decoder of an encoder-decoder makes its positions itself


def test_a_shifted_decoder_generates_what_it_says_without_a_cache():
    model, ids = tiny("bart", forced_eos_token_id=None), token_ids()
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share="none", attentions=["decoder"], positions="shifted"))
    tokens = torch.ones(3, 1, dtype=torch.long)
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, decoder_start_token_id=1)
        for _ in range(5):
            logits = model(input_ids=ids, decoder_input_ids=tokens).logits[:, -1]
            logits[:, model.config.eos_token_id] = float("-inf")
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(made, tokens)
        with prefix.disabled():
            torch.testing.assert_close(
                model(**model_inputs("bart")).logits, tiny("bart")(**model_inputs("bart")).logits
            )
        with pytest.raises(ValueError, match="position 64 is past the model's 64 positions, 5 of which"):
            model(input_ids=ids, decoder_input_ids=torch.ones(3, 60, dtype=torch.long))
    prefix.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_shifted_and_unshifted_prefixes_take_turns_on_one_model():
    model, inputs = tiny("bart"), model_inputs("bart")
    choices = dict(length=P, share="none", attentions=["decoder"])
    shifted = prefixattn.attach(model, PrefixConfig(**choices, positions="shifted"))
    other = prefixattn.attach(model, PrefixConfig(**choices))
    assert other.config.positions == "unshifted"
    with torch.no_grad():
        other.encoder.bank.copy_(shifted.encoder.bank)
        unmoved = model(**inputs).logits
        shifted.activate()
        moved = model(**inputs).logits
        other.activate()
        assert torch.equal(model(**inputs).logits, unmoved)
    assert (moved - unmoved).abs().amax() > 1e-2


# refusals

REFUSED_EXPORTS = {
    "some_layers": ("gpt2", dict(layers="first"), "layers is 'first'; a PEFT adapter has a prefix in every layer"),
    "lengths": ("gpt2", dict(length=[2, 3]), r"length is \(2, 3\); a PEFT adapter has one length for all layers"),
    "unshifted": ("gpt2", dict(positions="unshifted"), "positions is 'unshifted'; PEFT always shifts positions"),
    "bert": ("bert", {}, "positions is 'unshifted'; PEFT always shifts positions"),
    "vit": ("vit", {}, "positions is 'unshifted'; PEFT always shifts positions"),
    "t5": ("t5", dict(attentions=["decoder"]), "positions is 'unshifted'; PEFT always shifts positions"),
    "bart_all": ("bart", dict(positions="shifted"), "attentions is 'all'; a PEFT adapter of an encoder-decoder has"),
    "bart_cross": ("bart", dict(positions="shifted", attentions=["cross"]), r"attentions is \('cross',\); a PEFT"),
    "bart_even": (
        "bart",
        dict(positions="shifted", attentions=["decoder"]),
        r"the decoder has 2 layers; with an even number PEFT gives layers l and l \+ 1 the same prefix",
    ),
}


@pytest.mark.parametrize("case", REFUSED_EXPORTS)
def test_what_peft_cannot_hold_is_refused(tmp_path, case):
    family, choices, words = REFUSED_EXPORTS[case]
    prefix = prefixattn.attach(tiny(family), PrefixConfig(**{"length": P, "share": "none", **choices}))
    with pytest.raises(ValueError, match=words):
        prefix.export_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_model_whose_positions_cannot_move_takes_no_adapter_of_peft(tmp_path, family):
    prefixattn.attach(tiny("llama"), PrefixConfig(length=P, share="none")).export_peft(tmp_path)
    with pytest.raises(NotImplementedError, match=f"PEFT counts a prefix among the positions, and {family} has none"):
        prefixattn.load(tiny(family), tmp_path)
    with pytest.raises(ValueError, match="positions is 'shifted', but the model has no positions"):
        prefixattn.attach(tiny(family), PrefixConfig(positions="shifted"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The tensor of a good adapter for tiny_gpt2."""
    folder = tmp_path_factory.mktemp("adapter")
    prefixattn.attach(tiny_gpt2(), PrefixConfig(length=P, share="none")).export_peft(folder)
    return folder


def edited(source, target, **changes):
    values = json.loads((source / "adapter_config.json").read_text())
    target.joinpath("adapter_config.json").write_text(json.dumps({**values, **changes}))
    target.joinpath("adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())


WRONG_CONFIGS = {
    "lora": (dict(peft_type="LORA"), "has peft_type 'LORA', expected 'PREFIX_TUNING' or 'CARTRIDGE'"),
    "prompt_tuning": (dict(peft_type="PROMPT_TUNING"), "has peft_type 'PROMPT_TUNING', expected"),
    "no_type": (dict(peft_type=None), "has peft_type None, expected"),
    "type_list": (dict(peft_type=["PREFIX_TUNING"]), r"has peft_type \['PREFIX_TUNING'\], expected"),
    "depth": (dict(num_layers=12), "prefix for another model: num_layers=12, here 2"),
    "heads": (dict(num_attention_heads=4), "num_attention_heads=4, here 2"),
    "width": (dict(token_dim=64), "token_dim=64, here 32"),
    "stacks": (dict(num_transformer_submodules=2), "num_transformer_submodules=2, here 1"),
    "task": (dict(task_type="IMAGE_CLS"), "has task_type 'IMAGE_CLS', expected one of 'CAUSAL_LM', 'SEQ_2_SEQ_LM',"),
    "task_list": (dict(task_type=["SEQ_CLS"]), r"has task_type \['SEQ_CLS'\], expected one of"),
    "modules": (
        dict(modules_to_save=["lm_head"]),
        r"has modules_to_save \['lm_head'\] \(task_type 'CAUSAL_LM'\): beside a prefix the adapter holds weights",
    ),
    "length": (dict(num_virtual_tokens=7), r"expected \{'prompt_embeddings': \[7, 128\]\}"),
    "no_length": (dict(num_virtual_tokens=None), "num_virtual_tokens None, expected an integer from 1 to"),
    "length_list": (dict(num_virtual_tokens=[P, P]), r"num_virtual_tokens \[5, 5\], expected an integer"),
    "length_float": (dict(num_virtual_tokens=5.0), r"num_virtual_tokens 5\.0, expected an integer"),
    "frozen": (
        dict(peft_type="CARTRIDGE", num_frozen_tokens=6),
        "num_frozen_tokens 6, expected an integer from 0",
    ),
    "frozen_word": (dict(peft_type="CARTRIDGE", num_frozen_tokens="1"), "num_frozen_tokens '1', expected"),
}


def refused(folder, words):
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=words) as caught:
        prefixattn.load(model, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert attached(model) is None and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, rows, case):
    changes, words = WRONG_CONFIGS[case]
    edited(rows, tmp_path, **changes)
    refused(tmp_path, words)


class Bomb:
    """Goes off where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def tensors(change):
    def damage(path: Path) -> None:
        safetensors_torch.save_file(change(safetensors_torch.load_file(path)), path)

    return damage


def pickled(path: Path) -> None:
    path.unlink()
    path.with_name("adapter_model.bin").write_bytes(pickle.dumps({"prompt_embeddings": Bomb()}))


WRONG_TENSORS = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "not a whole safetensors file"),
    "pickle_in_its_place": (lambda p: p.write_bytes(pickle.dumps(Bomb())), "not a whole safetensors file"),
    "pickle_alone": (pickled, r"holds adapter_model\.bin, a pickle, and is not read"),
    "missing": (lambda p: p.unlink(), r"adapter_model\.safetensors is missing"),
    "renamed": (tensors(lambda t: {"a": t["prompt_embeddings"]}), r"holds tensors \{'a': \[5, 128\]\}, expected"),
    "more": (tensors(lambda t: t | {"score.weight": torch.ones(2)}), r"holds tensors .*'score\.weight': \[2\]"),
    "narrow": (tensors(lambda t: {n: x[:, :-1].contiguous() for n, x in t.items()}), r"\[5, 127\]\}, expected"),
    "int32": (tensors(lambda t: {n: x.int() for n, x in t.items()}), r"of torch\.int32, expected one floating-point"),
    "nan": (tensors(lambda t: {n: x.log() for n, x in t.items()}), "not a number, in prompt_embeddings"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_cannot_be_a_prefix_are_refused(tmp_path, rows, case):
    damage, words = WRONG_TENSORS[case]
    edited(rows, tmp_path)
    damage(tmp_path / "adapter_model.safetensors")
    refused(tmp_path, words)
