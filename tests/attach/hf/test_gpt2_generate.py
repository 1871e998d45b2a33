"""Prefixes in GPT-2's generation: caches, padding, masks, search."""

import pytest
import torch
from torch import Tensor, nn

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache

from prefixattn.attach.hf import interface
from prefixattn.testing.models import concat_twin, tiny_gpt2, token_ids

P = 5
CLOSE = dict(rtol=1e-5, atol=1e-5)
# dynamo makes a context for each autograd function in a way that torch itself warns of
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
DEEP = PrefixConfig(length=P, hidden=16)


def test_left_padding_changes_nothing():
    model = tiny_gpt2()
    prefix = prefixattn.attach(model, DEEP)
    ids = token_ids(2, 9)
    ids[1, :4] = 0
    mask = (ids != 0).long()
    with torch.no_grad():
        alone = model(ids[1:, 4:]).logits
        at = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(ids, attention_mask=mask, position_ids=at).logits
        torch.testing.assert_close(padded[1:, 4:], alone, **CLOSE)
        assert padded.isfinite().all()
    settings = dict(do_sample=False, max_new_tokens=6)
    together = model.generate(ids, attention_mask=mask, **settings)
    single = model.generate(ids[1:, 4:], attention_mask=torch.ones(1, 5, dtype=torch.long), **settings)
    assert torch.equal(together[1, 9:], single[0, 5:])
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)
    assert torch.equal(static, together)
    assert prefix.config.length == P


def test_packed_sequences_are_independent():
    model, ids = tiny_gpt2(), token_ids(1, 9)
    prefixattn.attach(model, DEEP)
    at = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=at, use_cache=False).logits
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).logits, **CLOSE)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_pieces_through_a_cache_equal_the_whole(cache):
    """One token, then several at once (as assisted decoding asks for), then one."""
    model, ids = tiny_gpt2(), token_ids(2, 9)
    prefixattn.attach(model, DEEP)
    config = model.config
    past = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=12)
    with torch.no_grad():
        whole = model(ids).logits
        pieces = [model(part, past_key_values=past).logits for part in ids.split([3, 1, 4, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)


def decode_by_hand(model: nn.Module, ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


WAYS = {
    "cache": dict(),
    "static": dict(cache_implementation="static"),
    "no_cache": dict(use_cache=False),
    "prompt_lookup": dict(prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_generation_equals_decoding_by_hand(way):
    model = tiny_gpt2(eos_token_id=None)
    ids = token_ids(1, 3).repeat(1, 3)  # a repetition for prompt lookup to find
    plain = decode_by_hand(model, ids, 8)
    prefixattn.attach(model, DEEP)
    wanted = decode_by_hand(model, ids, 8)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, **WAYS[way])
    assert torch.equal(out, wanted)
    assert not torch.equal(out, plain)


def test_beams_and_sampling_equal_those_of_concatenation():
    model, ids = tiny_gpt2(), token_ids()
    prefix = prefixattn.attach(model, PrefixConfig(length=P, hidden=16, positions="unshifted"))
    with torch.no_grad():
        twin = concat_twin(model, prefix)
    mask = torch.ones_like(ids)
    beams = dict(num_beams=4, do_sample=False)
    for settings in (beams, dict(do_sample=True, top_k=20), dict(cache_implementation="static", **beams)):
        outs = []
        for each in (model, twin):
            torch.manual_seed(7)
            outs.append(each.generate(ids, attention_mask=mask, max_new_tokens=8, **settings))
        assert torch.equal(*outs)


def test_decoding_runs_the_network_once_and_training_once_a_step():
    model, ids = tiny_gpt2(), token_ids()
    prefix = prefixattn.attach(model, DEEP)
    runs = []
    prefix.encoder.register_forward_hook(lambda *_: runs.append(1))
    for step in range(1, 3):
        model(ids, labels=ids).loss.backward()
        assert len(runs) == step
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert len(runs) == 3


@COMPILES
def test_no_mask_over_queries_and_keys_is_made(monkeypatch):
    shapes = []
    whole = interface.prefix_attention

    def spy(*args, attn_mask=None, **kwargs):
        shapes.append(None if attn_mask is None else tuple(attn_mask.shape))
        return whole(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(interface, "prefix_attention", spy)
    model, ids = tiny_gpt2(), token_ids()
    prefixattn.attach(model, DEEP)
    shapes.clear()  # of attach's own passes
    mask = torch.ones_like(ids)
    model(ids, attention_mask=mask)
    assert set(shapes) == {None}
    shapes.clear()
    mask[0, 0] = 0
    model(ids, attention_mask=mask)
    assert set(shapes) == {(3, 1, 1, 9)}
    shapes.clear()
    settings = dict(do_sample=False, max_new_tokens=4, cache_implementation="static")
    model.generate(ids, attention_mask=mask, **settings)
    assert shapes and all(shape[1:3] == (1, 1) for shape in shapes)
    shapes.clear()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)
    assert set(shapes) == {None}
