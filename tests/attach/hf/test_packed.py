"""Packed sequences in models: each attends to itself and its prefix, and no mask of size L x S is made."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig, PrefixPlusConfig

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers import DataCollatorWithFlattening

from prefixattn.attach.hf import interface, masks
from prefixattn.attach.hf.packed import announced
from prefixattn.testing.models import concat_twin, tiny, token_ids

P, W = 4, 5
LENGTHS = [3, 9, 1, 6]
TOTAL = sum(LENGTHS)
CLOSE = dict(rtol=1e-4, atol=1e-4)
WINDOWS = {"mistral": {}, "gemma2": {}, "gpt_oss": {}}  # softcap, sinks, layers of both kinds
PACKINGS = ("positions", "flash")


def model_of(name):
    return tiny(name, **({"sliding_window": W} if name in WINDOWS else {}))


def attach(model, **choices):
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share="none", **choices))
    with torch.no_grad():
        next(prefix.parameters()).mul_(3.0)
    return prefix


def sequences():
    return [token_ids(1, n, seed=n)[0] for n in LENGTHS]


def packed(way="positions"):
    """The batch of transformers' own collator."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=way == "flash", return_tensors="pt")
    batch = dict(collate([{"input_ids": ids} for ids in sequences()]))
    del batch["labels"]
    return {"use_cache": False, **batch} if way == "positions" else batch


def padded():
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(t, (0, width - len(t))) for t in sequences()])
    return ids, torch.arange(width) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def calls(monkeypatch):
    """The arguments by name of each call of prefix_attention_varlen."""
    found, op = [], interface.prefix_attention_varlen

    def noted(*tensors, **options):
        found.append(options)
        return op(*tensors, **options)

    monkeypatch.setattr(interface, "prefix_attention_varlen", noted)
    return found


@pytest.fixture
def only_packed(monkeypatch):
    """Forbids explicit masks and the op that is not for packed sequences."""

    def forbid():
        monkeypatch.setattr(interface, "prefix_attention", None)
        monkeypatch.setattr(masks, "sdpa_mask", None)

    return forbid


CASES = [(name, way, False) for name in ("gpt2", "llama", *WINDOWS) for way in PACKINGS]
CASES += [(name, "positions", False) for name in ("qwen2", "qwen3", "gemma3", "deepseek_v2", "deepseek_v3")]
CASES += [(name, "positions", True) for name in ("mistral", "gemma2")]


@pytest.mark.parametrize("name, way, slides", CASES)
def test_logits_and_gradients_are_those_of_the_padded_sequences(name, way, slides, calls, only_packed):
    model = model_of(name)
    prefix = attach(model, **({"prefix_in_window": True} if slides else {}))
    assert prefix.config.positions == "shifted"
    ids, there = padded()
    expected = model(ids, attention_mask=there.long()).logits[there]
    wanted = torch.autograd.grad(expected.square().sum(), prefix.encoder.bank)[0]
    only_packed()
    out = model(**packed(way))
    found = out.logits[0]
    assert out.past_key_values is None
    torch.testing.assert_close(found, expected, **CLOSE)
    grad = torch.autograd.grad(found.square().sum(), prefix.encoder.bank)[0]
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    sizes = {(options["window_size"], options["prefix_in_window"]) for options in calls}
    window = ((W - 1, -1), slides)
    assert sizes == {"mistral": {window}}.get(name, {window, ((-1, -1), False)} if name in WINDOWS else sizes)


@pytest.mark.parametrize("way", PACKINGS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_bank_gives_each_sequence_its_prefix_and_shift(name, way, only_packed):
    model = model_of(name)
    parts = [attach(model), prefixattn.attach(model, PrefixConfig(length=2, share="none"))]
    bank = PrefixBank.of(model, parts).requires_grad_(True)  # of two lengths
    ids, there = padded()
    rows = torch.tensor([1, 0, 0, 1])
    expected = model(ids, attention_mask=there.long(), prefix_ids=rows).logits[there]
    wanted = torch.autograd.grad(expected.square().sum(), list(bank.parameters()))
    only_packed()
    found = model(**packed(way), prefix_ids=rows).logits[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    for grad, other in zip(torch.autograd.grad(found.square().sum(), list(bank.parameters())), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    for wrong in (rows[:3], rows[:1]):
        with pytest.raises(ValueError, match=rf"shape \[{len(wrong)}\], expected \[4\], one for each packed sequence"):
            model(**packed(way), prefix_ids=wrong)
    with pytest.raises(ValueError, match="prefix_ids is missing"):
        model(**packed(way))


@pytest.mark.parametrize("choices", [dict(phi="elu"), dict(phi="mlp"), dict(phi="elu", per="width")], ids=str)
def test_prefix_tuning_plus(choices, only_packed):
    model = model_of("llama")
    prefixattn.attach(model, PrefixPlusConfig(init="normal", **choices))
    ids, there = padded()
    expected = model(ids, attention_mask=there.long()).logits[there]
    only_packed()
    torch.testing.assert_close(model(**packed()).logits[0], expected, **CLOSE)


def test_several_rows_may_be_packed(only_packed):
    model = model_of("mistral")
    attach(model)
    alone = [model(ids[None]).logits[0] for ids in sequences()]
    ids, places = token_ids(1, 12, seed=9)[0], torch.arange(12)
    rows = torch.stack([torch.cat(sequences()[:2]), ids])
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in LENGTHS[:2]]), places])
    alone = torch.stack([torch.cat(alone[:2]), model(ids[None]).logits[0]])
    only_packed()
    found = model(rows, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(found, alone, **CLOSE)


def test_an_encoder_takes_the_arguments_of_flash_attention(only_packed):
    model = tiny("bert")
    attach(model)
    base = model.base_model
    ids, there = padded()
    expected = base(ids, attention_mask=there.long()).last_hidden_state[there]
    only_packed()
    found = base(**packed("flash")).last_hidden_state[0]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_mass_and_dropout(only_packed):
    model = model_of("llama")
    prefix = attach(model, dropout=0.5)
    prefix.eval()
    ids, there = padded()
    expected = prefix.mass(ids, attention_mask=there.long())  # [N, B, H, L]
    only_packed()
    found = prefix.mass(**packed())
    torch.testing.assert_close(found[:, 0], expected.transpose(1, 2)[:, :, there], **CLOSE)
    prefix.train()
    torch.manual_seed(0)
    one = model(**packed()).logits
    torch.manual_seed(0)
    assert torch.equal(one, model(**packed()).logits)
    assert not torch.equal(one, model(**packed()).logits)


def test_what_packs_and_says_more_keeps_its_explicit_mask(monkeypatch):
    def with_more(**options):  # as images, whose tokens see one another
        return made(**options, or_mask_function=lambda b, h, q, k: (q < 2) & (k < 2))

    module = transformers.models.llama.modeling_llama
    model, made = model_of("llama"), module.create_causal_mask
    prefix = attach(model, positions="unshifted")
    monkeypatch.setattr(module, "create_causal_mask", with_more)
    places = {"position_ids": packed()["position_ids"], "use_cache": False}
    found = model(packed()["input_ids"], **places).logits
    expected = concat_twin(model, prefix)(packed()["input_ids"], **places).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    PrefixBank.of(model, [prefix, prefix])
    with pytest.raises(NotImplementedError, match="a mask of its own for packed sequences, which does not say whose"):
        model(packed()["input_ids"], **places, prefix_ids=torch.zeros(4, dtype=torch.int64))
    # without them the mask does not say where sequences begin
    options = packed("flash") | {"position_ids": torch.arange(TOTAL)[None]}
    with pytest.raises(NotImplementedError, match="neither causal nor a window and does not say where they begin"):
        model(**options, prefix_ids=torch.zeros(4, dtype=torch.int64))


def test_a_batch_with_a_mask_of_padding_is_not_packed(calls):
    model = model_of("llama")
    attach(model)
    batch = packed()
    model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    assert not calls


REFUSED = {
    "a cache that is made": (dict(way="positions", use_cache=True), NotImplementedError, "pass use_cache=False"),
    "a cache": (dict(way="flash", past_key_values=transformers.DynamicCache()), NotImplementedError, "take no cache"),
    "padding": (dict(way="flash", attention_mask=torch.ones(1, TOTAL)), NotImplementedError, "so leave it out"),
    "no positions": (dict(way="flash", position_ids=None), ValueError, "as DataCollatorWithFlattening makes them"),
    "no length": (dict(way="flash", max_length_k=None), ValueError, "cu_seq_lens_q came without max_length_k"),
    "other offsets": (dict(way="flash", cu_seq_lens_q=torch.tensor([0, 7, 9, 9, 18])), ValueError, "total of 19"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    model = model_of("llama")
    attach(model)
    options, error, words = REFUSED[case]
    options = dict(options)
    with pytest.raises(error, match=words):
        model(**packed(options.pop("way")) | options)
    assert not announced()
    # what was refused is forgotten
    assert model(token_ids(2, 5), attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1] * 5])).logits.isfinite().all()


def test_an_encoder_decoder_refuses_them():
    model = tiny("bart")
    attach(model)
    options = packed("flash")
    del options["position_ids"]
    with pytest.raises(NotImplementedError, match=r"cu_seq_lens_q describes .* BartModel .*; pad them"):
        model(**options, decoder_input_ids=options["input_ids"])


def labelled(way):
    """The collator's batch with labels, and the same padded."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=way == "flash", return_tensors="pt")
    ids, there = padded()
    return dict(collate([{"input_ids": t} for t in sequences()])), {
        "input_ids": ids,
        "attention_mask": there.long(),
        "labels": ids.masked_fill(~there, -100),
    }


@pytest.mark.parametrize("way", PACKINGS)
def test_labelled_loss(way, calls):
    model = model_of("gemma2")
    prefix = attach(model)
    batch, rows = labelled(way)
    assert batch["labels"][0, 0] == -100
    expected, plain = prefixattn.labelled_loss(model, **rows), model(**batch, use_cache=False).loss
    calls.clear()
    found = prefixattn.labelled_loss(model, **batch)
    assert len(calls) == 2
    grads = [torch.autograd.grad(loss, prefix.encoder.bank)[0] for loss in (expected, plain, found)]
    for loss, grad in ((expected, grads[0]), (plain, grads[1])):
        torch.testing.assert_close(found, loss, **CLOSE)
        torch.testing.assert_close(grads[2], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("way", PACKINGS)
def test_a_trainer_with_the_flattening_collator(way, calls, tmp_path):
    made = []
    for packs in (True, False):
        model = tiny("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        prefix = attach(model)
        before = prefix().detach().clone()
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=way == "flash")
        if not packs:
            collate = lambda _: labelled(way)[1]  # noqa: E731
        options = dict(
            max_steps=2, per_device_train_batch_size=4, learning_rate=5.0, optim="sgd", report_to=[], use_cpu=True
        )
        args = transformers.TrainingArguments(tmp_path / way, **options, save_strategy="no", disable_tqdm=True)
        data = [{"input_ids": ids.tolist()} for ids in sequences()]
        calls.clear()
        prefixattn.PrefixTrainer(model, args, train_dataset=data, data_collator=collate).train()
        assert bool(calls) == packs and (prefix() - before).abs().max() > 0.1
        made.append(prefix().detach())
    torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=1e-3)


def test_completions_of_shared_prompts_may_be_packed(only_packed):
    model = model_of("llama")
    prompts, there = token_ids(2, 5, seed=9), torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    groups, (ids, mask) = torch.tensor([1, 0, 0, 1]), padded()
    shared = prefixattn.SharedPrompt(model)
    with shared(prompts, there):
        expected = model(ids, attention_mask=mask.long(), prefix_ids=groups).logits[mask]
        only_packed()
        found = model(**packed(), prefix_ids=groups).logits[0]
    torch.testing.assert_close(found, expected, **CLOSE)


# dynamo makes a context for each autograd function in a way that torch itself warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_packs_by_the_arguments_of_flash_attention(only_packed):
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=1)
    prefix = attach(model)
    expected = model(**packed()).logits
    wanted = torch.autograd.grad(expected.square().sum(), prefix.encoder.bank)[0]
    only_packed()
    found = torch.compile(model, fullgraph=True, backend="eager")(**packed("flash")).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    grad = torch.autograd.grad(found.square().sum(), prefix.encoder.bank)[0]
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant, only_packed):
    model = model_of("llama")
    prefix = attach(model)
    wanted = torch.autograd.grad(model(**packed()).logits.square().sum(), prefix.encoder.bank)[0]
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    only_packed()
    batch = packed() | {"use_cache": None}  # with checkpoints a model makes no cache
    model(**batch).logits.square().sum().backward()
    torch.testing.assert_close(prefix.encoder.bank.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
