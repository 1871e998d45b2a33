"""Every way of generating with a prefix equals decoding with whole forward passes and no cache."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import GenerationConfig, cache_utils
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from prefixattn.testing.models import ENCODER_DECODERS, concat_twin, tiny, token_ids

P, STEPS = 5, 6
FAMILIES = ("gpt2", "llama", "mistral", "gemma3", "bart", "t5")  # with a window of 5 tokens: mistral, gemma3
DECODERS = FAMILIES[:4]
LENGTHS, IDS = (5, 2, 4), torch.tensor([2, 0, 2])
# dynamo makes a context for each autograd function in a way that torch itself warns of
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# T5's tied head would repeat the token before it
CHOICES = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"]}, "t5": {"tie_word_embeddings": False}}
TOKENS = dict(bos_token_id=0, pad_token_id=0, decoder_start_token_id=0)  # and no end


def model_of(family, seed=0):
    model = tiny(family, seed, **CHOICES.get(family, {}))
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=STEPS, top_k=0, **TOKENS)
    return model


def generated(model, ids, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **settings)


def attach(model, *choices, **more):
    """Keys and values large enough to change what is said."""
    prefix = prefixattn.attach(model, PrefixConfig(*choices, share="none", **more))
    with torch.no_grad():
        next(prefix.parameters()).mul_(4.0)
    return prefix


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


# an encoder's input is no prompt that could come in chunks
CASES = [(f, way) for f in FAMILIES for way in WAYS if way != "chunked_prefill" or f not in ENCODER_DECODERS]
CASES += [
    (f, way)
    for f in ("qwen2", "qwen3", "gemma2", "gpt_oss", "deepseek_v2", "deepseek_v3")
    for way in ("cache", "static")
]


@pytest.mark.parametrize("family, way", CASES)
def test_greedy_generation_with_each_cache(family, way):
    if way == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded cache needs a GPU")
    model, ids = model_of(family), token_ids(2)
    plain = by_hand(model, ids)
    attach(model, P)
    wanted = by_hand(model, ids)
    assert not torch.equal(wanted, plain)
    assert torch.equal(generated(model, ids, **WAYS[way]), wanted)


QUANTISED = {
    "fp8": (lambda: hasattr(cache_utils, "Fp8QuantizedLayer"), "this transformers has no fp8 cache"),
    "quanto": (is_optimum_quanto_available, "optimum-quanto is not installed"),
    "hqq": (is_hqq_available, "hqq is not installed"),
}


@pytest.mark.parametrize("backend", QUANTISED)
def test_a_quantised_cache_rounds_tokens_alone(backend):
    """So that it rounds what the same cache rounds where the prefix is concatenated after it."""
    runs, reason = QUANTISED[backend]
    if not runs():
        pytest.skip(reason)
    model, ids = model_of("llama"), token_ids(2)
    prefix = attach(model, P, positions="unshifted")
    with torch.no_grad():
        twin = concat_twin(model, prefix)
    twin.generation_config = model.generation_config
    settings = dict(cache_implementation="quantized", cache_config={"backend": backend}, num_beams=2)
    assert torch.equal(generated(model, ids, **settings), generated(twin, ids, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_sampling(family):
    model, ids = model_of(family), token_ids(2)
    prefix = attach(model, P, positions="unshifted")
    with torch.no_grad():
        twin = concat_twin(model, prefix)
    twin.generation_config = model.generation_config
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
    model, draft = model_of(family), model_of(family, seed=9)
    attach(model, P)
    wanted = by_hand(model, ids)
    assert torch.equal(generated(model, ids, assistant_model=draft), wanted)
    attach(draft, 3)  # it may have a prefix of its own
    assert torch.equal(generated(model, ids, assistant_model=draft), wanted)
    assert torch.equal(generated(model, ids, assistant_model=model), wanted)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), wanted)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding(family):
    model, ids = model_of(family), token_ids(2)
    attach(model, P)
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
    attach(model, P)
    out = generated(model, ids, return_dict_in_generate=True)
    cache, tokens = out.past_key_values, out.sequences.shape[1] - 1  # the last one was not run
    assert cache.get_seq_length() == tokens
    own = getattr(cache, "self_attention_cache", cache)
    sizes = [layer.keys.shape[2] for layer in own.layers]
    assert sizes == {"mistral": [4, 4], "gemma3": [4, tokens]}.get(family, [tokens, tokens])
    if family in ENCODER_DECODERS:
        assert {layer.keys.shape[2] for layer in cache.cross_attention_cache.layers} == {ids.shape[1]}


def test_unshifted_positions_leave_the_whole_context():
    model, ids = model_of("gpt2"), token_ids(1, 60)  # of 64 positions
    prefix = attach(model, P, positions="unshifted")
    assert torch.equal(generated(model, ids, max_new_tokens=5), by_hand(model, ids, 5))
    prefix.detach()
    attach(model, P, positions="shifted")
    with pytest.raises(ValueError, match="position 64 is past the model's 64 positions, 5 of which the prefix takes"):
        generated(model, ids, max_new_tokens=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_generates_what_each_sample_does_alone(family):
    model, ids = model_of(family), token_ids(3)
    singles = [attach(model, n) for n in LENGTHS]
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
    bank = attach(model, P, count=3)
    bank.set(2, bank.get(2)[..., :2, :])
    ids[0, :4] = 0
    mask = (ids != 0).long()
    together = generated(model, ids, attention_mask=mask, prefix_ids=IDS)
    assert torch.equal(together[0, 9:], generated(model, ids[:1, 4:], prefix_ids=IDS[:1])[0, 5:])


def test_assisted_generation_with_a_bank():
    model, ids, row = model_of("llama"), token_ids(1), torch.tensor([1])
    attach(model, P, count=3)
    wanted = by_hand(model, ids, prefix_ids=row)
    assert torch.equal(generated(model, ids, prefix_ids=row, prompt_lookup_num_tokens=3), wanted)
    draft = model_of("llama", seed=9)
    attach(draft, 2, count=3)  # generate passes prefix_ids to the draft too
    assert torch.equal(generated(model, ids, prefix_ids=row, assistant_model=draft), wanted)


def test_what_generate_is_not_told_is_refused():
    model, ids = model_of("llama"), token_ids(3)
    prefix = attach(model, P)
    with pytest.raises(ValueError, match="prefix_ids chooses among the prefixes of a PrefixBank"):
        generated(model, ids, prefix_ids=IDS)
    attach(model, P, count=3)
    with pytest.raises(ValueError, match="prefix_ids is missing for a bank of T=3 prefixes"):
        generated(model, ids)
    with pytest.raises(ValueError, match="prefix_id2"):  # transformers' own check of what it does not know
        generated(model, ids, prefix_id2=IDS)
    prefix.activate()


@pytest.mark.parametrize("implementation", ["prefixattn", "sdpa"])
def test_continuous_batching_is_refused(implementation):
    model = model_of("llama")
    prefix = attach(model, P)
    model.set_attn_implementation(implementation)
    with pytest.raises(NotImplementedError, match=r"continuous batching \(generate_batch\) takes no attention but"):
        model.generate_batch([[3, 4, 5]])
    with prefix.disabled():
        assert model.init_continuous_batching() is not None
    prefix.detach()
    assert "init_continuous_batching" not in vars(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_generation_equals_pefts(tmp_path, family):
    peft = pytest.importorskip("peft", reason="peft is not installed: its generation is not compared")
    model, ids = model_of(family), token_ids(2)
    attach(model, P).export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model_of(family), tmp_path)
    wanted = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(generated(model, ids), wanted)


@COMPILES
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_generation(family):
    torch._dynamo.reset()
    model, ids = model_of(family), token_ids(3)
    bank = attach(model, P, count=3)
    bank.set(2, bank.get(2)[..., :2, :])
    wanted = generated(model, ids, prefix_ids=IDS)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(generated(model, ids, prefix_ids=IDS, cache_implementation="static"), wanted)
