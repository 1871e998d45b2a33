"""Layers with sliding windows: the op gets the window, no mask of size L x S is made, and a prefix stays or slides."""

from dataclasses import replace

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from prefixattn.attach.hf import interface, masks
from prefixattn.testing.models import concat_twin, tiny, token_ids

P, W, L = 4, 5, 9
CLOSE = dict(rtol=1e-4, atol=3e-5)
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "mistral": {},
    "gemma2": {"tie_word_embeddings": False},  # softcap; a layer of each kind
    "gemma3": {},
    "gpt_oss": {},  # sinks
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}
PADDED = {
    "": [[1] * L, [1] * L],
    "left": [[1] * L, [0] * 4 + [1] * 5],
    "right": [[1] * L, [1] * 6 + [0] * 3],
}


def model_of(name):
    if name == "modernbert":
        torch.manual_seed(0)
        sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        special = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0)
        config = transformers.ModernBertConfig(**sizes, **special, **MIXED, local_attention=6, initializer_range=0.5)
        return transformers.ModernBertForMaskedLM(config).eval()
    return tiny(name, sliding_window=W, **MODELS[name])


def attach(model, **choices):
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share="none", positions="unshifted", **choices))
    with torch.no_grad():
        next(prefix.parameters()).mul_(3.0)
    return prefix


@pytest.fixture
def calls(monkeypatch):
    """What the op is called with: window_size, prefix_in_window and the mask."""
    found, op = [], interface.prefix_attention

    def noted(*tensors, **options):
        found.append((options["window_size"], options["prefix_in_window"], options["attn_mask"]))
        return op(*tensors, **options)

    monkeypatch.setattr(interface, "prefix_attention", noted)
    return found


CASES = [(name, padding, slides) for name in MODELS for padding in PADDED for slides in (False, True)]
CASES += [("modernbert", padding, False) for padding in PADDED]


@pytest.mark.parametrize(("name", "padding", "slides"), CASES)
def test_logits_and_gradients_are_those_of_explicit_keys_and_masks(name, padding, slides, calls, monkeypatch):
    model, ids = model_of(name), token_ids(2, L)
    mask = torch.tensor(PADDED[padding])
    prefix = attach(model, prefix_in_window=slides)
    twin = concat_twin(model, prefix)
    # positions that do not count padding, where the prefix would see it
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected = twin(ids, attention_mask=mask, **places).logits[mask == 1]
    wanted = torch.autograd.grad(expected.square().sum(), prefix.encoder.bank)[0]
    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(masks, "sdpa_mask", None)  # what makes the explicit ones
        found = model(ids, attention_mask=mask, **places).logits[mask == 1]
    torch.testing.assert_close(found, expected, **CLOSE)
    grad = torch.autograd.grad(found.square().sum(), prefix.encoder.bank)[0]
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    window = (3, 3) if name == "modernbert" else (W - 1, -1)
    windows = [size for size, *_ in calls]
    assert windows[0 if name != "qwen2" else 1] == window  # Qwen's first layers see all
    assert {seen for size, seen, _ in calls if size == window} == {slides}
    assert all(given is None if not padding else given.shape == (2, 1, 1, L) for *_, given in calls)


def made(function, **sizes):
    return masks.smallest_mask(batch_size=2, mask_function=function, local_size=W, **sizes)


def test_a_chunk_is_no_window():
    chunks = chunked_causal_mask_function(W, torch.zeros(2, dtype=torch.int64))
    assert made(chunks, q_length=W + 1, kv_length=W + 1).shape == (2, 1, W + 1, W + 1)
    assert made(chunks, q_length=W, kv_length=W).shape == (2, W)
    window = sliding_window_causal_mask_function(W)
    assert made(window, q_length=W + 1, kv_length=W + 1).shape == (2, 1, W + 1 + W)
    # what a model is to rework
    assert made(window, q_length=9, kv_length=9, allow_is_causal_skip=False).shape == (2, 1, 9, 9)
    # unused slots behind more keys than the window's, or at a place that only the device knows
    assert made(window, q_length=2, kv_length=20, q_offset=9).shape == (2, 1, 2, 20)
    assert made(window, q_length=2, kv_length=20, q_offset=torch.tensor(1)).shape == (2, 1, 2, 20)
    assert made(window, q_length=2, kv_length=20, q_offset=1).shape == (2, 3)


def test_a_layer_whose_mask_has_another_window_is_refused(monkeypatch):
    layer, q = torch.nn.Module(), torch.randn(2, 2, L, 8)
    mask = made(sliding_window_causal_mask_function(W), q_length=L, kv_length=L)
    interface.attention_with_prefix(layer, q, q, q, mask, sliding_window=W)
    for sliding_window in (W + 1, None):
        with pytest.raises(NotImplementedError, match=f"a window of {sliding_window}, and its mask one of {W}"):
            interface.attention_with_prefix(layer, q, q, q, mask, sliding_window=sliding_window)
    both = made(sliding_window_bidirectional_mask_function(W), q_length=L, kv_length=L)
    for sliding_window in (W, W + 1):  # a distance, or keys with the query's own among them
        interface.attention_with_prefix(layer, q, q, q, both, sliding_window=sliding_window)
    with pytest.raises(NotImplementedError, match=f"a window of {W - 1}, and its mask one of {W + 1}"):
        interface.attention_with_prefix(layer, q, q, q, both, sliding_window=W - 1)
    # a whole model of such gets explicit masks
    model = model_of("mistral")
    kind = type(model.model.layers[0].self_attn)
    forward = kind.forward

    def with_another(layer, *args, **options):
        layer.config.sliding_window = W + 1
        try:
            return forward(layer, *args, **options)
        finally:
            layer.config.sliding_window = W

    monkeypatch.setattr(kind, "forward", with_another)
    prefix = attach(model)
    assert prefix._adapter.implementation == interface.EXPLICIT["sdpa"] and not prefix._adapter.windows
    expected = concat_twin(model, prefix)(token_ids(2, L)).logits
    torch.testing.assert_close(model(token_ids(2, L)).logits, expected, **CLOSE)


WAYS = {
    "cache": dict(),
    "static": dict(cache_implementation="static"),
    "chunked_prefill": dict(prefill_chunk_size=3),
    "beams": dict(num_beams=2),
    "static_beams": dict(num_beams=2, cache_implementation="static"),
}


@pytest.mark.parametrize("tokens", [2, L])  # the window slides off the prefix in a step, and in the prompt
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_prefix_that_slides_generates_what_whole_passes_say(name, tokens):
    model, ids = model_of(name), token_ids(2, tokens)
    prefix = attach(model, prefix_in_window=True)
    options = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    options["attention_mask"] = torch.ones_like(ids)
    greedy, beams = (model.generate(ids, use_cache=False, num_beams=n, **options) for n in (1, 2))
    for way, more in WAYS.items():
        found = model.generate(ids, **options, **more)
        assert torch.equal(found, beams if "num_beams" in more else greedy), way
    prefix.config = replace(prefix.config, prefix_in_window=False)
    assert not torch.equal(model.generate(ids, **options), greedy)


@pytest.mark.parametrize("way", ["cache", "static", "chunked_prefill"])
def test_padding_that_is_in_the_window_of_a_step_is_hidden(way):
    model, ids = model_of("mistral"), token_ids(2, L)
    attach(model)
    mask = torch.tensor([[1] * L, [0] * 7 + [1] * 2])
    options = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    together = model.generate(ids, attention_mask=mask, **options, **WAYS[way])
    alone = model.generate(ids[1:, 7:], attention_mask=mask[1:, 7:], **options)
    assert torch.equal(together[1:, L:], alone[:, 2:])


# dynamo makes a context for each autograd function in a way that torch itself warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_generation():
    torch._dynamo.reset()
    model, ids = tiny("mistral", sliding_window=W, num_hidden_layers=1), token_ids(1, 3)
    attach(model, prefix_in_window=True)
    options = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    options["attention_mask"] = torch.ones_like(ids)
    wanted = model.generate(ids, use_cache=False, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), wanted)


def test_banks_and_combined_prefixes_slide():
    model, ids = model_of("mistral"), token_ids(3, L)
    one, other = attach(model, prefix_in_window=True), attach(model, prefix_in_window=True)
    other.config = replace(other.config, length=2)
    other.encoder.bank.data = other.encoder.bank.data[..., :2, :].contiguous()
    alone = []
    for prefix, row in ((one, 0), (other, 1), (one, 2)):
        prefix.activate()
        alone.append(model(ids[row : row + 1]).logits)
    bank = PrefixBank.of(model, [one, other])
    assert bank.config.prefix_in_window
    torch.testing.assert_close(model(ids, prefix_ids=torch.tensor([0, 1, 0])).logits, torch.cat(alone), **CLOSE)
    both = prefixattn.combine(model, [one, other])
    assert both.config.prefix_in_window
    torch.testing.assert_close(model(ids).logits, concat_twin(model, both)(ids).logits, **CLOSE)
    stays = attach(model)
    with pytest.raises(ValueError, match=r"prefixes\[1\] has prefix_in_window=False, expected the first's, True"):
        prefixattn.combine(model, [one, stays])
    with pytest.raises(ValueError, match="prefix 1 has prefix_in_window False, and prefix 0 True"):
        PrefixBank.of(model, [one, stays])


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_where_nothing_slides_it_is_refused(family):
    model = tiny(family)
    with pytest.raises(ValueError, match="prefix_in_window is True, but the model is no decoder with sliding windows"):
        prefixattn.attach(model, PrefixConfig(length=P, share="none", prefix_in_window=True))


def test_it_is_saved_and_a_model_without_windows_refuses_it(tmp_path):
    model, ids = model_of("mistral"), token_ids(2, L)
    prefix = attach(model, prefix_in_window=True)
    bank = PrefixBank.of(model, [prefix])
    expected = model(ids).logits
    prefix.save_pretrained(tmp_path / "prefix")
    bank.save_pretrained(tmp_path / "bank")
    for name in ("prefix", "bank"):
        again = model_of("mistral")
        assert prefixattn.load(again, tmp_path / name).config.prefix_in_window
        torch.testing.assert_close(again(ids).logits, expected, **CLOSE)
        with pytest.raises(ValueError, match="no decoder with sliding windows"):
            prefixattn.load(tiny("mistral", sliding_window=None), tmp_path / name)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_cache_serves_a_prefix_that_slides_for_any_number_of_tokens(name):
    model, ids = model_of(name), token_ids(2, L)
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share="none", prefix_in_window=True))
    with torch.no_grad():
        expected, served = model(ids).logits, model_of(name)(ids, past_key_values=prefix.to_cache(2)).logits
    torch.testing.assert_close(served, expected, **CLOSE)


def test_a_mask_of_the_caller_does_not_say_where_a_prefix_that_slides_lies():
    model, ids = model_of("mistral"), token_ids(1, L)
    attach(model, prefix_in_window=True)
    with pytest.raises(NotImplementedError, match=r"a mask of its own for 9 tokens \(packed .*prefix_in_window=False"):
        model(ids, attention_mask=torch.ones(1, 1, L, L, dtype=torch.bool).tril())
