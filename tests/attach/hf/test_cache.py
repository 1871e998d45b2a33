"""A prefix as a cache of transformers': what a plain model makes of it, and what no cache holds."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file  # noqa: E402
from transformers import DynamicCache, EncoderDecoderCache  # noqa: E402

from prefixattn.attach.hf import cache as cache_module  # noqa: E402
from prefixattn.testing.models import model_inputs, tiny, token_ids  # noqa: E402

P, B, NEW = 5, 3, 5
CLOSE = dict(rtol=1e-5, atol=1e-5)
WINDOW = 24  # of which P rows, 9 tokens and NEW more take 19
# the family, what makes it, and of which attentions
CASES = {
    "gpt2": ("gpt2", {}, None),
    "llama": ("llama", {}, None),  # GQA
    "mistral": ("mistral", {"sliding_window": WINDOW}, None),
    "qwen2": ("qwen2", {}, None),
    "qwen3": ("qwen3", {}, None),  # heads of another width
    "gemma2": ("gemma2", {"sliding_window": WINDOW}, None),  # softcap, windows in every other layer
    "gemma3": ("gemma3", {"sliding_window": WINDOW}, None),
    "gpt_oss": ("gpt_oss", {"sliding_window": WINDOW}, None),
    "bart_decoder": ("bart", {}, ["decoder"]),
    "bart_cross": ("bart", {}, ["cross"]),
    "bart": ("bart", {}, ["decoder", "cross"]),
    "t5": ("t5", {"decoder_start_token_id": 0}, ["cross"]),
}
GREEDY = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)


def make(name):
    family, sizes, _ = CASES[name]
    model = tiny(family, **sizes)
    model.generation_config.forced_eos_token_id = None
    return model


def prefixed(name, **choices):
    attentions = CASES[name][2]
    if attentions is not None:
        choices |= {"attentions": attentions, "positions": "shifted" if "decoder" in attentions else "unshifted"}
    model = make(name)
    return model, prefixattn.attach(model, PrefixConfig(**{"length": P, "hidden": 8, **choices}))


def most(name):
    return 9 + NEW if "sliding_window" in CASES[name][1] else None


def with_prefix_seen(mask, name):
    """What plain transformers asks for: a column for each token of the cache too."""
    return mask if CASES[name][0] in ("bart", "t5") else torch.cat([mask.new_ones(len(mask), P), mask], 1)


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_makes_of_the_cache_what_the_prefix_makes(name):
    model, prefix = prefixed(name)
    inputs, plain = model_inputs(CASES[name][0], B), make(name)
    mask = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        ours = model(**inputs, attention_mask=mask).logits
        text = model.generate(inputs["input_ids"], attention_mask=mask, **GREEDY)
        cache = prefix.to_cache(B, tokens=most(name))
        theirs = plain(**inputs, attention_mask=with_prefix_seen(mask, name), past_key_values=cache).logits
        cache = prefix.to_cache(B, tokens=most(name))
        again = {"attention_mask": with_prefix_seen(mask, name), "past_key_values": cache}
        assert torch.equal(plain.generate(inputs["input_ids"], **again, **GREEDY), text)
        without = plain(**inputs, attention_mask=mask).logits
    torch.testing.assert_close(theirs, ours, **CLOSE)
    assert (without - ours).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_on_the_left_is_served_too(name):
    model, prefix = prefixed(name)
    ids, plain = token_ids(B), make(name)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    text = model.generate(ids, attention_mask=mask, **GREEDY)
    served = {"attention_mask": with_prefix_seen(mask, name), "past_key_values": prefix.to_cache(B)}
    assert torch.equal(plain.generate(ids, **served, **GREEDY), text)


@pytest.mark.parametrize("name", ["llama", "bart_decoder"])
def test_beams_take_a_cache_of_samples_times_beams(name):
    model, prefix = prefixed(name)
    ids, plain = token_ids(B), make(name)
    mask, beams = torch.ones_like(ids), {**GREEDY, "num_beams": 2}
    text = model.generate(ids, attention_mask=mask, **beams)
    served = {"attention_mask": with_prefix_seen(mask, name), "past_key_values": prefix.to_cache(2 * B)}
    assert torch.equal(plain.generate(ids, **served, **beams), text)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bart"])
def test_a_cache_that_is_built_of_the_file_by_transformers_alone_gives_the_logits(name, tmp_path):
    model, prefix = prefixed(name)
    prefix.export_cache(tmp_path, tokens=most(name))
    plain, inputs = make(name), model_inputs(CASES[name][0], 1)
    found = load_file(tmp_path / "prefix_cache.safetensors")
    depth = len(prefix.slots) // (2 if name == "bart" else 1)

    def cache(start):
        pairs = [tuple(found.pop(f"{start}layers.{l}.{part}")[None] for part in ("key", "value")) for l in range(depth)]
        return DynamicCache(pairs, config=plain.config)

    made = cache("")
    if name == "bart":
        made = EncoderDecoderCache(made, cache("cross."))
        made.is_updated = dict.fromkeys(range(depth), False)
    assert not found
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(plain(**inputs, past_key_values=made).logits, expected, **CLOSE)


def test_the_file_says_its_layout(tmp_path):
    _, prefix = prefixed("llama")
    prefix.export_cache(tmp_path)
    [file] = tmp_path.iterdir()
    with safetensors.safe_open(file, "pt") as opened:
        said = opened.metadata()
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    assert shapes == {f"layers.{l}.{part}": [2, P, 8] for l in (0, 1) for part in ("key", "value")}
    assert (said["format"], said["length"], said["model_type"]) == ("prefixattn.cache/1", str(P), "llama")
    assert "tokens begin at P" in said["layout"] and "without rotation" in said["layout"]


def test_another_prefix_takes_the_files_place(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        _, prefix = prefixed("llama", share="none")
        prefix.export_cache(tmp_path)
        found = load_file(tmp_path / "prefix_cache.safetensors")
        assert torch.equal(found["layers.1.value"], prefix()[1, 1])


def test_a_cache_has_the_models_type_and_no_graph():
    model = make("llama").bfloat16()
    prefix = prefixattn.attach(model, PrefixConfig(length=P, hidden=8))
    cache = prefix.to_cache(2)
    for layer, kv in zip(cache.layers, prefix(torch.bfloat16), strict=True):
        assert torch.equal(layer.keys, kv[0].expand(2, -1, -1, -1)) and not layer.values.requires_grad
    with torch.no_grad():
        ours, plain = model(token_ids(2)).logits, make("llama").bfloat16()
        theirs = plain(token_ids(2), past_key_values=cache).logits
        exact = concatenated_in_float64(prefix)
    assert (theirs - exact).abs().mean() <= 2 * (ours - exact).abs().mean() + 1e-3


def concatenated_in_float64(prefix):
    plain, cache = make("llama").bfloat16().double(), prefix.to_cache(2)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    return plain(token_ids(2), past_key_values=cache).logits


def test_serving_changes_neither_model_nor_prefix():
    model, prefix = prefixed("gpt2", share="none", dropout=0.5)
    model.train()
    state, before = prefix.training, prefix().clone()
    first, second = prefix.to_cache(), prefix.to_cache()
    with torch.no_grad():
        make("gpt2")(token_ids(1), past_key_values=first)
    assert first.get_seq_length() == P + 9 and second.get_seq_length() == P
    assert model.training and prefix.training == state and torch.equal(prefix(), before) and prefix.is_active


# banks


def test_each_sample_of_a_cache_has_its_own_prefix_of_a_bank():
    model = make("llama")
    bank = prefixattn.attach(model, PrefixConfig(length=P, share="none", count=4))
    ids, prefix_ids = token_ids(B), torch.tensor([3, 0, 3])
    with torch.no_grad():
        ours = model(ids, prefix_ids=prefix_ids).logits
        theirs = make("llama")(ids, past_key_values=bank.to_cache(prefix_ids=prefix_ids)).logits
    torch.testing.assert_close(theirs, ours, **CLOSE)
    bank.encoder.lengths[1] = 2
    short = bank.to_cache(prefix_ids=torch.tensor([1]))
    assert short.get_seq_length() == 2
    with pytest.raises(ValueError, match=r"have the lengths \[2, 5\]; a cache has as many rows for every sample"):
        bank.to_cache(prefix_ids=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="prefix_ids is missing for a bank of T=4"):
        bank.to_cache(2)


def test_a_bank_is_no_file_of_a_cache(tmp_path):
    bank = prefixattn.attach(make("llama"), PrefixConfig(length=P, share="none", count=4))
    with pytest.raises(NotImplementedError, match="holds one prefix, and the bank T=4"):
        bank.export_cache(tmp_path)
    assert not list(tmp_path.iterdir())


# what no cache holds

REFUSED = {
    "unshifted": ("gpt2", {"positions": "unshifted"}, "positions is 'unshifted'; with rows in 'self' attention"),
    "some layers": ("gpt2", {"layers": [0]}, r"layers is \(0,\); a cache has as many rows in every layer"),
    "lengths": ("gpt2", {"length": [5, 3]}, r"length is \(5, 3\); a cache has as many rows in every layer"),
    "encoder": ("bart", {"attentions": ["encoder"]}, r"an encoder has no cache: a prefix of \('decoder', 'cross'\)"),
    "all of BART": ("bart", {}, "attentions is 'all'; an encoder has no cache"),
    "BART's decoder": ("bart", {"attentions": ["decoder"]}, "would have to be 'shifted'"),
    "T5's decoder": ("t5", {"attentions": ["decoder"]}, "positions is 'unshifted'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_cache_does_not_hold_is_refused(case, tmp_path):
    family, choices, words = REFUSED[case]
    prefix = prefixattn.attach(tiny(family), PrefixConfig(**{"length": P, "share": "none", **choices}))
    for served in (prefix.to_cache, lambda: prefix.export_cache(tmp_path)):
        with pytest.raises(ValueError, match=words):
            served()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_is_refused_unless_what_follows_is_said_to_fit(family):
    prefix = prefixattn.attach(tiny(family, sliding_window=12), PrefixConfig(length=P, share="none"))
    for tokens in (None, 8):
        with pytest.raises(ValueError, match=f"tokens is {tokens}; .* window of 12, .* at most 7 tokens can follow it"):
            prefix.to_cache(tokens=tokens)
    assert prefix.to_cache(tokens=7).get_seq_length() == P
    # and the limit is the true one: of one token more the window hides a row
    plain, model, ids = tiny(family, sliding_window=12), prefix._adapter.model, token_ids(1, 8)
    with torch.no_grad():
        apart = (plain(ids, past_key_values=prefix.to_cache(tokens=7)).logits - model(ids).logits).abs().amax((0, 2))
    assert apart[:7].max() < 1e-4 < apart[7]


def test_a_model_that_makes_something_else_of_a_cache_is_refused(monkeypatch):
    """As ALiBi's bias would fall on a cache: here the rows of one layer are not those of the prefix."""
    _, prefix = prefixed("gpt2")
    filled = cache_module._filled

    def other(adapter, rows):
        cache = filled(adapter, rows)
        cache.layers[1].values = -cache.layers[1].values
        return cache

    monkeypatch.setattr(cache_module, "_filled", other)
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel computes something else with the prefix in its cac"):
        prefix.to_cache()


def test_encoders_images_and_wrong_numbers_are_refused():
    bert = prefixattn.attach(tiny("bert"), PrefixConfig(length=P, share="none"))
    with pytest.raises(NotImplementedError, match="BertModel is no decoder, and has no cache"):
        bert.to_cache()
    _, prefix = prefixed("gpt2")
    with pytest.raises(ValueError, match="batch is 0, expected an integer from 1"):
        prefix.to_cache(0)
    with pytest.raises(ValueError, match="tokens is 0, expected None or an integer from 1"):
        prefix.to_cache(tokens=0)
    with pytest.raises(ValueError, match="prefix_ids chooses among the prefixes of a PrefixBank"):
        prefix.to_cache(prefix_ids=torch.zeros(1, dtype=torch.int64))
    with prefix.disabled(), pytest.raises(ValueError, match=r"GPT2Model runs without its prefix, inside disabled\(\)"):
        prefix.to_cache()
    prefix.detach()
    with pytest.raises(ValueError, match="detached from its model"):
        prefix.to_cache()


def test_timm_has_no_cache():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    prefix = prefixattn.attach(model, PrefixConfig(length=P))
    with pytest.raises(NotImplementedError, match="are for models of transformers"):
        prefix.to_cache()
