"""Prefixes in a Hugging Face GPT-2, against concatenation, transformers' own cache and PEFT."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import prefixattn
from prefixattn import Prefix, PrefixConfig

pytest.importorskip("transformers")
from transformers import DynamicCache, GPT2LMHeadModel, GPT2Model

from prefixattn.attach import attached
from prefixattn.attach.hf import interface
from prefixattn.testing.models import concat_twin, tiny_gpt2, token_ids

P = 5
CLOSE = dict(rtol=1e-5, atol=1e-5)
# deep, simple and none in every layer, in the first, in a list
CONFIGS = {
    "deep": PrefixConfig(length=P, hidden=16),
    "deep_unshifted": PrefixConfig(length=P, hidden=16, positions="unshifted"),
    "deep_first": PrefixConfig(length=P, hidden=16, layers="first"),
    "simple": PrefixConfig(length=P, share="simple"),
    "simple_last": PrefixConfig(length=P, share="simple", layers=[1]),
    "none": PrefixConfig(length=P, share="none"),
}


def positions(prefix: Prefix, length: int) -> Tensor:
    start = prefix.config.length if prefix.config.positions == "shifted" else 0
    return torch.arange(start, start + length)[None]


def gradients(prefix: Prefix) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    return grads


@pytest.mark.parametrize("case", CONFIGS)
def test_equals_concatenation_with_its_gradients(case):
    model, ids = tiny_gpt2(), token_ids()
    prefix = prefixattn.attach(model, CONFIGS[case])
    twin = concat_twin(model, prefix)
    expected = twin(ids, labels=ids, position_ids=positions(prefix, 9))
    expected.loss.backward()
    wanted = gradients(prefix)
    out = model(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(gradients(prefix), wanted, **CLOSE)
    assert all(g.abs().sum() > 0 for g in wanted.values())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def prefix_cache(model: nn.Module, prefix: Prefix, batch: int) -> DynamicCache:
    pairs = [[t.expand(batch, -1, -1, -1) for t in kv] for kv in prefix().detach()]
    return DynamicCache(pairs)


def test_equals_a_cache_that_holds_the_prefix():
    model, ids = tiny_gpt2(), token_ids()
    prefix = prefixattn.attach(model, CONFIGS["none"])
    with prefix.disabled(), torch.no_grad():
        expected = model(ids, past_key_values=prefix_cache(model, prefix, 3)).logits
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_equals_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed: no comparison with its prefix tuning")
    model, ids = tiny_gpt2(), token_ids()
    plain = copy.deepcopy(model)
    prefix = prefixattn.attach(model, CONFIGS["none"])
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(plain, config)
    rows = prefix().permute(3, 0, 1, 2, 4).reshape(P, -1)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(rows)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1], **CLOSE)


@pytest.mark.parametrize("kind", ["activations", "vectors"])
def test_a_prefix_made_of_real_tokens_is_those_tokens(kind):
    """Keys and values of two tokens, or the layers' inputs at them, stand in for the tokens themselves."""
    model, ids = tiny_gpt2(), token_ids()
    with torch.no_grad():
        head = ids[:1, :2].expand(3, -1)
        whole = model(torch.cat([head, ids], 1), output_hidden_states=True)
        if kind == "activations":
            prefix = prefixattn.attach(model, PrefixConfig(share="none", init=head[0].tolist()))
        else:
            prefix = prefixattn.attach(model, PrefixConfig(length=2, share="simple"))
            prefix.encoder.vectors.copy_(torch.stack([h[0, :2] for h in whole.hidden_states[:2]]))
        out = model(ids).logits
    assert prefix.config.length == 2
    torch.testing.assert_close(out, whole.logits[:, 2:], **CLOSE)


def test_a_text_is_tokenised_as_a_word_inside_a_sentence():
    seen = []

    def tokenizer(text, add_special_tokens):
        seen.append((text, add_special_tokens))
        return {"input_ids": [7, 9, 11]}

    model = tiny_gpt2()
    prefix = prefixattn.attach(model, PrefixConfig(length=5, share="none", init="summarize"), tokenizer)
    assert seen == [(" summarize", False)]
    assert prefix.config.length == 3 and prefix().shape[3] == 3


def test_disabled_and_detach_give_the_model_back_bit_for_bit():
    model, ids = tiny_gpt2(), token_ids()
    model.transformer.wpe.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    keys, implementation = list(model.state_dict()), model.config._attn_implementation
    before = model(ids).logits
    prefix = prefixattn.attach(model, CONFIGS["deep"])
    assert list(model.state_dict()) == keys
    inside = model(ids).logits
    assert not torch.equal(inside, before)
    with prefix.disabled():
        assert torch.equal(model(ids).logits, before)
        with prefix.disabled():
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, inside)
    prefix.detach()
    assert torch.equal(model(ids).logits, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.config._attn_implementation == implementation
    assert not model.transformer._forward_pre_hooks and attached(model) is None
    with pytest.raises(ValueError, match="the prefix is detached from its model"):
        prefix.detach()
    again = prefixattn.attach(model, CONFIGS["deep"])
    assert attached(model) is again


def test_detached_while_disabled_gives_the_model_back():
    model, ids = tiny_gpt2(), token_ids()
    before, implementation = model(ids).logits, model.config._attn_implementation
    prefix = prefixattn.attach(model, CONFIGS["deep"])
    with prefix.disabled():
        prefix.detach()
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, before)


def test_a_prefix_made_in_inference_mode_works_and_is_never_stale():
    model, ids = tiny_gpt2(), token_ids()
    with torch.inference_mode():
        prefix = prefixattn.attach(model, CONFIGS["none"])
        first = model(ids).logits
        prefix.encoder.bank.add_(1.0)
        second = model(ids).logits
    assert not torch.equal(first, second)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, second)


def test_two_models_of_one_config_hold_two_prefixes():
    first, second = tiny_gpt2(0), tiny_gpt2(1)
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    ids = token_ids()
    before = second(ids).logits
    prefixes = [prefixattn.attach(model, CONFIGS["deep"]) for model in (first, second)]
    attached_out = second(ids).logits
    prefixes[0].detach()
    assert torch.equal(second(ids).logits, attached_out)
    prefixes[1].detach()
    assert torch.equal(second(ids).logits, before)
    assert first.config._attn_implementation != interface.NAME != second.config._attn_implementation


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_has_a_prefix_of_its_own(way):
    model, ids = tiny_gpt2(), token_ids()
    prefix = prefixattn.attach(model, CONFIGS["simple"])
    wanted = model(ids).logits
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    other = attached(twin)
    assert other is not None and other is not prefix
    assert torch.equal(twin(ids).logits, wanted)
    with torch.no_grad():
        other.encoder.vectors.zero_()
    assert not torch.equal(twin(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)
    other.detach()
    assert attached(twin) is None and attached(model) is prefix


def test_a_model_without_a_head_works():
    model, ids = tiny_gpt2(cls=GPT2Model), token_ids()
    before = model(ids).last_hidden_state
    prefix = prefixattn.attach(model, CONFIGS["deep"])
    out = model(ids, None, torch.ones_like(ids)).last_hidden_state  # positional, as transformers allows
    out.sum().backward()
    assert not torch.equal(out, before) and all(p.grad is not None for p in prefix.parameters())


def test_an_attached_model_saves_as_the_plain_one(tmp_path):
    model, ids = tiny_gpt2(), token_ids()
    before = model(ids).logits
    prefixattn.attach(model, CONFIGS["deep"])
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(again.eval()(ids).logits, before)


def test_the_whole_context_is_usable_only_without_shifted_positions():
    model, ids = tiny_gpt2(), token_ids(1, 64)
    prefix = prefixattn.attach(model, CONFIGS["deep_unshifted"])
    assert model(ids).logits.shape == (1, 64, 50)
    prefix.detach()
    prefixattn.attach(model, CONFIGS["deep"])
    assert model(ids[:, :59]).logits.shape == (1, 59, 50)
    with pytest.raises(ValueError, match="position 64 is past the model's 64 positions, 5 of which the prefix takes"):
        model(ids[:, :60])


def test_several_prefixes_take_turns():
    model, ids = tiny_gpt2(), token_ids()
    with torch.no_grad():
        plain = model(ids).logits
        first = prefixattn.attach(model, PrefixConfig(length=3, hidden=8))
        alone = model(ids).logits
        second = prefixattn.attach(model, PrefixConfig(length=7, share="none", layers="first"))
        assert attached(model) is second and second.is_active and not first.is_active
        other = model(ids).logits
        assert not torch.equal(alone, other)
        first.activate()
        torch.testing.assert_close(model(ids).logits, alone, rtol=0, atol=0)
        with second.disabled():
            torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
        first.detach()  # the one that is left takes over
        assert attached(model) is second
        torch.testing.assert_close(model(ids).logits, other, rtol=0, atol=0)
        with pytest.raises(ValueError, match="detached"):
            first.activate()
        second.detach()
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    assert attached(model) is None and all(p.requires_grad for p in model.parameters())


def test_refusals_are_in_words():
    model, ids = tiny_gpt2(), token_ids()
    config = CONFIGS["deep"]
    with pytest.raises(NotImplementedError, match=r"attach does not know the class Linear; it knows .* transformers"):
        prefixattn.attach(nn.Linear(2, 2), config)
    with pytest.raises(ValueError, match="model is a str, expected a torch module"):
        prefixattn.attach("gpt2", config)
    with pytest.raises(ValueError, match="config is a dict, expected a PrefixConfig"):
        prefixattn.attach(model, {"length": 5})
    with pytest.raises(ValueError, match="layers names layer 7, but the model has 2 layers"):
        prefixattn.attach(model, PrefixConfig(layers=[7]))
    with pytest.raises(ValueError, match="init is the text 'summarize': attach needs the tokenizer"):
        prefixattn.attach(model, PrefixConfig(share="none", init="summarize"))
    with pytest.raises(ValueError, match="init has token id 50, but the model's vocabulary ends at 49"):
        prefixattn.attach(model, PrefixConfig(share="none", init=[3, 50]))
    with pytest.raises(ValueError, match="init has 70 tokens, but the model has 64 positions"):
        prefixattn.attach(model, PrefixConfig(share="none", init=[0] * 70))
    assert attached(model) is None and all(p.requires_grad for p in model.parameters())
    prefixattn.attach(model, config)
    with pytest.raises(ValueError, match="attention_mask has 14 columns, expected 9: one for each token"):
        model(ids, attention_mask=torch.ones(3, 14))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"implementation was set to 'sdpa' after attach, .* expected 'prefixattn'"):
        model(ids)
    model.set_attn_implementation("prefixattn")
    past = model(ids).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 columns, expected 10"):
        model(ids[:, :1], attention_mask=torch.ones(3, 1), past_key_values=past)
