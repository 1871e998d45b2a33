"""Every way of generating with a prefix equals decoding with whole forward passes and no cache."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import GenerationConfig

from prefixattn.attach.testing import ENCODER_DECODERS, concat_twin, tiny, token_ids

P, STEPS = 5, 6
FAMILIES = ("gpt2", "llama", "mistral", "gemma3", "bart", "t5")  # with a window of 5 tokens: mistral, gemma3
DECODERS = FAMILIES[:4]
LENGTHS, IDS = (5, 2, 4), torch.tensor([2, 0, 2])
# dynamo makes a context for each autograd function in a way that torch itself warns of
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
START = GenerationConfig(
    do_sample=False, max_new_tokens=STEPS, top_k=0, bos_token_id=0, pad_token_id=0, decoder_start_token_id=0
)


def model_of(family):
    model = tiny(family)
    model.generation_config = START
    return model


def generated(model, ids, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **settings)


@torch.no_grad()
def by_hand(model, ids, steps=STEPS, sample=False, **inputs):
    """The argmax, or a draw, of a whole forward pass for each token."""
    encodes = model.config.is_encoder_decoder
    out = ids.new_zeros(len(ids), 1) if encodes else ids
    for _ in range(steps):
        tokens = {"input_ids": ids, "decoder_input_ids": out} if encodes else {"input_ids": out}
        last = model(**tokens, **inputs, use_cache=False).logits[:, -1]
        token = last.softmax(-1).multinomial(1) if sample else last.argmax(-1, keepdim=True)
        out = torch.cat([out, token], 1)
    return out


WAYS = {
    "cache": dict(),
    "static": dict(cache_implementation="static"),
    "no_cache": dict(use_cache=False),
    "offloaded": dict(cache_implementation="offloaded"),
    "chunked_prefill": dict(prefill_chunk_size=4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_each_cache(family):
    model, ids = model_of(family), token_ids(2)
    plain = by_hand(model, ids)
    prefixattn.attach(model, PrefixConfig(P, "none"))
    wanted = by_hand(model, ids)
    assert not torch.equal(wanted, plain)
    for way, settings in WAYS.items():
        if way == "chunked_prefill" and family in ENCODER_DECODERS:
            continue  # it is for prompts of decoders
        assert torch.equal(generated(model, ids, **settings), wanted), way


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_sampling(family):
    model, ids = model_of(family), token_ids(2)
    prefix = prefixattn.attach(model, PrefixConfig(P, "none", positions="unshifted"))
    with torch.no_grad():
        twin = concat_twin(model, prefix)
    twin.generation_config = START
    for settings in (dict(num_beams=3), dict(num_beams=2, do_sample=True), dict(num_beams=3, num_return_sequences=2)):
        torch.manual_seed(7)
        wanted = generated(twin, ids, use_cache=False, **settings)
        for cache in ("dynamic", "static"):
            torch.manual_seed(7)
            assert torch.equal(generated(model, ids, cache_implementation=cache, **settings), wanted)
    torch.manual_seed(8)
    wanted = by_hand(model, ids.repeat_interleave(2, 0), sample=True)
    torch.manual_seed(8)
    assert torch.equal(generated(model, ids, do_sample=True, num_return_sequences=2), wanted)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_assisted_generation(family):
    ids = token_ids(1, 4).repeat(1, 3)  # a repetition for prompt lookup to find
    model, draft = model_of(family), tiny(family, seed=9)
    draft.generation_config = START
    prefixattn.attach(model, PrefixConfig(P, "none"))
    wanted = by_hand(model, ids)
    assert torch.equal(generated(model, ids, assistant_model=draft), wanted)
    prefixattn.attach(draft, PrefixConfig(3, "none"))  # it may have a prefix of its own
    assert torch.equal(generated(model, ids, assistant_model=draft), wanted)
    assert torch.equal(generated(model, ids, assistant_model=model), wanted)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), wanted)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding(family):
    model, ids = model_of(family), token_ids(2)
    prefixattn.attach(model, PrefixConfig(P, "none"))
    ids[1, :4] = 0
    mask = (ids != 0).long()
    alone = generated(model, ids[1:, 4:])
    for settings in ({}, dict(cache_implementation="static")):
        together = generated(model, ids, attention_mask=mask, **settings)
        assert torch.equal(together[1, 9:], alone[0, 5:])
        assert torch.equal(together[:1], generated(model, ids[:1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_the_tokens_and_no_prefix(family):
    model, ids = model_of(family), token_ids(2)
    prefixattn.attach(model, PrefixConfig(P, "none"))
    out = generated(model, ids, return_dict_in_generate=True)
    cache, tokens = out.past_key_values, out.sequences.shape[1] - 1  # the last one was not run
    assert cache.get_seq_length() == tokens
    own = getattr(cache, "self_attention_cache", cache)
    window = model.config.to_dict().get("sliding_window")
    sizes = {layer.keys.shape[2] for layer in own.layers}
    assert tokens in sizes if family == "gemma3" else sizes == {tokens if window is None else window - 1}
    if family in ENCODER_DECODERS:
        assert {layer.keys.shape[2] for layer in cache.cross_attention_cache.layers} == {ids.shape[1]}


def test_unshifted_positions_leave_the_whole_context():
    model, ids = model_of("gpt2"), token_ids(1, 60)  # of 64 positions
    prefix = prefixattn.attach(model, PrefixConfig(P, "none", positions="unshifted"))
    assert torch.equal(generated(model, ids, max_new_tokens=5), by_hand(model, ids, 5))
    prefix.detach()
    prefixattn.attach(model, PrefixConfig(P, "none", positions="shifted"))
    with pytest.raises(ValueError, match="position 64 is past the model's 64 positions, 5 of which the prefix takes"):
        generated(model, ids, max_new_tokens=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_generates_what_each_sample_does_alone(family):
    model, ids = model_of(family), token_ids(3)
    singles = [prefixattn.attach(model, PrefixConfig(n, "none")) for n in LENGTHS]
    alone = {"greedy": [], "beams": []}
    ways = {"greedy": dict(), "beams": dict(num_beams=3)}
    for own, row in zip(ids, IDS.tolist(), strict=True):
        singles[row].activate()
        for name, settings in ways.items():
            alone[name].append(generated(model, own[None], **settings))
    PrefixBank.of(model, singles)
    for name, settings in ways.items():
        wanted = torch.cat(alone[name])
        for more in ({}, dict(cache_implementation="static"), dict(use_cache=False)):
            assert torch.equal(generated(model, ids, prefix_ids=IDS, **settings, **more), wanted), (name, more)
    torch.manual_seed(8)
    wanted = by_hand(model, ids.repeat_interleave(2, 0), sample=True, prefix_ids=IDS.repeat_interleave(2))
    torch.manual_seed(8)
    assert torch.equal(generated(model, ids, prefix_ids=IDS, do_sample=True, num_return_sequences=2), wanted)
    assert len({tuple(generated(model, ids[:1], prefix_ids=torch.tensor([i]))[0].tolist()) for i in range(3)}) > 1


def test_a_mixed_batch_with_left_padding():
    model, ids = model_of("gpt2"), token_ids(3)
    bank = prefixattn.attach(model, PrefixConfig(P, "none", count=3))
    bank.set(2, bank.get(2)[..., :2, :])
    ids[0, :4] = 0
    mask = (ids != 0).long()
    together = generated(model, ids, attention_mask=mask, prefix_ids=IDS)
    assert torch.equal(together[0, 9:], generated(model, ids[:1, 4:], prefix_ids=IDS[:1])[0, 5:])


def test_assisted_generation_with_a_bank():
    model, ids, row = model_of("llama"), token_ids(1), torch.tensor([1])
    prefixattn.attach(model, PrefixConfig(P, "none", count=3))
    wanted = by_hand(model, ids, prefix_ids=row)
    assert torch.equal(generated(model, ids, prefix_ids=row, prompt_lookup_num_tokens=3), wanted)
    draft = tiny("llama", seed=9)
    draft.generation_config = START
    prefixattn.attach(draft, PrefixConfig(2, "none", count=3))  # generate passes prefix_ids to the draft too
    assert torch.equal(generated(model, ids, prefix_ids=row, assistant_model=draft), wanted)


def test_what_generate_is_not_told_is_refused():
    model, ids = model_of("llama"), token_ids(3)
    prefix = prefixattn.attach(model, PrefixConfig(P, "none"))
    with pytest.raises(ValueError, match="prefix_ids chooses among the prefixes of a PrefixBank"):
        generated(model, ids, prefix_ids=IDS)
    prefixattn.attach(model, PrefixConfig(P, "none", count=3))
    with pytest.raises(ValueError, match="prefix_ids is missing for a bank of T=3 prefixes"):
        generated(model, ids)
    with pytest.raises(ValueError, match="prefix_id2"):  # transformers' own check of what it does not know
        generated(model, ids, prefix_id2=IDS)
    prefix.activate()


@pytest.mark.parametrize("implementation", ["prefixattn", "sdpa"])
def test_continuous_batching_is_refused(implementation):
    """It takes implementations of transformers by their names; with one of those the prefix would be left out."""
    model = model_of("llama")
    prefixattn.attach(model, PrefixConfig(P, "none"))
    model.set_attn_implementation(implementation)
    with pytest.raises(Exception) as caught:
        model.generate_batch([[3, 4, 5]], generation_config=START)
    print(type(caught.value), caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_generation_equals_pefts(tmp_path, family):
    peft = pytest.importorskip("peft", reason="peft is not installed: its generation is not compared")
    model, ids = model_of(family), token_ids(2)
    prefixattn.attach(model, PrefixConfig(P, "none")).export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model_of(family), tmp_path)
    wanted = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=START)
    assert torch.equal(generated(model, ids), wanted)


@COMPILES
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_generation(family):
    torch._dynamo.reset()
    model, ids = model_of(family), token_ids(3)
    bank = prefixattn.attach(model, PrefixConfig(P, "none", count=3))
    bank.set(2, bank.get(2)[..., :2, :])
    wanted = generated(model, ids, prefix_ids=IDS)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(generated(model, ids, prefix_ids=IDS, cache_implementation="static"), wanted)
