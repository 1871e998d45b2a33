"""Masks of models of transformers with a prefix: causality is what the model asked for, a mask has a column a token."""

import pytest
import torch
import transformers

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach.hf import interface
from prefixattn.attach.hf.masks import Read
from prefixattn.testing.models import token_ids

TEXT = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT |= dict(max_position_embeddings=64, pad_token_id=1, initializer_range=0.2)
BART = dict(vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
BART |= dict(decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
BART |= dict(init_std=0.3, pad_token_id=1)
T5 = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
CLIP = {name: value for name, value in TEXT.items() if name != "initializer_range"}
FREE = PrefixConfig(length=3, share="none")


def build(name, sizes, config=None, **more):
    torch.manual_seed(0)
    config = config or name.replace("ForCausalLM", "").replace("Model", "") + "Config"
    return getattr(transformers, name)(getattr(transformers, config)(**sizes, **more)).eval()


# name of the class -> its config's, sizes, whether earlier tokens see later ones
CAUSALITY = {
    "SplinterModel": (None, TEXT | dict(question_token_id=50), True),  # its attention does not say what it is
    "BertModel": (None, TEXT, True),
    "DogeForCausalLM": (None, TEXT | dict(num_key_value_heads=2), False),  # makes a float mask of the mask
    "LlamaForCausalLM": (None, TEXT, False),
    "BartForConditionalGeneration": ("BartConfig", BART, False),  # of its decoder
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", CAUSALITY)
def test_later_tokens_are_seen_where_the_plain_model_sees_them(name, padded):
    config, sizes, sees = CAUSALITY[name]
    model = build(name, sizes, config)
    one = token_ids(2, 7)
    other = one.clone()
    other[:, -1] = (other[:, -1] + 5) % 40 + 2
    mask = dict(attention_mask=torch.tensor([[1] * 7, [0, 0] + [1] * 5])) if padded else {}

    def moved():
        def run(ids):
            if model.config.is_encoder_decoder:
                return model(input_ids=one, decoder_input_ids=ids, **mask)[0]
            return model(ids, **mask)[0]

        with torch.no_grad():
            return (run(one) - run(other))[:, 2:-1].abs().max().item()

    assert (moved() > 1e-5) is sees
    prefixattn.attach(model, FREE)
    assert (moved() > 1e-5) is sees


@pytest.mark.parametrize(
    ("name", "sizes", "columns"),
    [
        ("BertModel", TEXT, 7),
        ("BertModel", TEXT, 12),
        ("ElectraModel", TEXT | dict(embedding_size=32), 7),
        ("T5EncoderModel", T5, 7),
        ("CLIPTextModel", CLIP | dict(eos_token_id=2), 12),  # as for a prefix in front
        ("LlamaModel", TEXT, 7),
        ("LlamaModel", TEXT, 12),
        ("GPT2Model", dict(n_embd=32, n_layer=2, n_head=4), 12),
    ],
)
def test_a_mask_without_a_column_for_each_token_is_refused(name, sizes, columns):
    model = build(name, sizes, {"T5EncoderModel": "T5Config"}.get(name))
    prefixattn.attach(model, FREE)
    ids, mask = token_ids(2, 9), torch.ones(2, columns, dtype=torch.int64)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match=f"attention_mask has {columns} columns, expected 9"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["BigBirdPegasus", "PegasusX"])
def test_layers_with_an_attention_of_their_own_are_named_and_can_be_left_out(name):
    more = {"attention_type": "original_full"} if name == "BigBirdPegasus" else dict(block_size=4, num_global_tokens=2)
    model = build(f"{name}ForConditionalGeneration", BART | more, f"{name}Config")
    ids = token_ids(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    inputs = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4].contiguous())
    plain = model(**inputs).logits
    with pytest.raises(NotImplementedError, match=r"of their own.*encoder.*attentions=\['decoder', 'cross'\]"):
        prefixattn.attach(model, FREE)
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)
    prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none", attentions=["decoder", "cross"]))
    assert prefix.geometry.kinds == {"decoder": 2, "cross": 2}
    assert not torch.allclose(model(**inputs).logits, plain)
    with torch.no_grad():
        prefix.encoder.bank.fill_(0)
        prefix.encoder.bank[:, 0] = -1e4  # keys that no query of these sizes looks at are no prefix
    assert model(**inputs).logits.isfinite().all()


def test_attention_over_another_sequence_is_known_by_its_length():
    model = build("NllbMoeModel", BART | dict(num_experts=2), "NllbMoeConfig")
    assert prefixattn.attach(model, FREE).geometry.kinds == {"encoder": 2, "decoder": 2, "cross": 2}


def test_a_model_that_computes_something_else_is_refused_and_left(monkeypatch):
    model = build("LlamaModel", TEXT)
    plain = model(token_ids(2, 6))[0]
    monkeypatch.setattr(interface, "read", lambda *given: Read(None, False))  # masks are lost
    with pytest.raises(NotImplementedError, match="LlamaModel computes something else with the attention"):
        prefixattn.attach(model, FREE)
    torch.testing.assert_close(model(token_ids(2, 6))[0], plain, rtol=0, atol=0)


# what a mask says of one query behind four tokens, the first of which pads one sample
STEP = dict(batch_size=2, q_length=1, kv_length=7, attention_mask=torch.tensor([[True] * 5, [False] + [True] * 4]))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("offset", [4, torch.tensor(4)], ids=["int", "tensor"])
@pytest.mark.parametrize("skip", [True, False], ids=["", "explicit"])
def test_the_mask_of_a_step_has_four_axes_where_the_model_may_not_skip_it(skip, offset, padded):
    asked = STEP if padded else STEP | dict(attention_mask=None)
    mask = interface.smallest_mask(q_offset=offset, allow_is_causal_skip=skip, **asked)
    columns = 7 if isinstance(offset, torch.Tensor) or not skip else 5
    wanted = (torch.arange(columns) < 5).repeat(2, 1)
    wanted[1, 0] = not padded
    assert mask.dtype == torch.bool
    torch.testing.assert_close(mask, wanted if skip else wanted[:, None, None, :], rtol=0, atol=0)


def reworking(name):
    """A model that makes masks of its masks: Doge adds to them, T5Gemma 2 puts two of them beside each other."""
    sizes = TEXT | dict(num_key_value_heads=2, bos_token_id=2, eos_token_id=None)
    if name == "doge":
        return build("DogeForCausalLM", sizes)
    sizes |= dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=8)
    image = dict(mm_tokens_per_image=4, boi_token_index=55, eoi_token_index=56, image_token_index=57)
    encoder = dict(text_config=dict(sizes), vision_config=vision | dict(image_size=16), **image)
    more = dict(encoder=encoder, decoder=dict(sizes), image_token_index=57)
    return build("T5Gemma2ForConditionalGeneration", more, "T5Gemma2Config")


# dynamo makes a context for each autograd function in a way that torch itself warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("way", ["dynamic", "static", "compiled"])
@pytest.mark.parametrize("name", ["doge", "t5gemma2"])
def test_a_model_that_reworks_its_masks_generates_what_whole_passes_say(name, way):
    torch._dynamo.reset()
    model, ids, steps = reworking(name), token_ids(2, 9) + 2, 6
    prefix = prefixattn.attach(model, FREE)
    with torch.no_grad():
        prefix.encoder.bank.mul_(4)
    out = ids if name == "doge" else torch.full((2, 1), 2)
    for _ in range(steps):
        tokens = dict(input_ids=out) if name == "doge" else dict(input_ids=ids, decoder_input_ids=out)
        with torch.no_grad():
            out = torch.cat([out, model(**tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    if way == "compiled":
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")

    def generated(ids, mask):
        options = dict(do_sample=False, max_new_tokens=steps, pad_token_id=1, decoder_start_token_id=2)
        cache = dict() if way == "dynamic" else dict(cache_implementation="static")
        return model.generate(ids, attention_mask=mask, **options, **cache)

    assert torch.equal(generated(ids, torch.ones_like(ids)), out)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    together = generated(ids.where(mask == 1, 1), mask)
    assert torch.equal(together[0], out[0])
    assert torch.equal(together[1, -steps:], generated(ids[1:, 4:], mask[1:, 4:])[0, -steps:])
