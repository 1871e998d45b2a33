"""positions="shifted": a prefix takes the first P positions, however a model makes its own."""

import pytest
import torch
import transformers
from torch import nn

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.testing.models import token_ids

P = 3
TEXT = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT |= dict(max_position_embeddings=64, pad_token_id=1, initializer_range=0.2)
OPT = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, init_std=0.2)
OPT |= dict(word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1)
BART = dict(vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
BART |= dict(decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
BART |= dict(init_std=0.3, pad_token_id=1)
DECODER = dict(is_decoder=True)
FREE = PrefixConfig(length=P, share="none")


def build(name, config, sizes):
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=60, n_embd=32, n_layer=2, n_head=4)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", TEXT | DECODER),  # from the padding index on
    "camembert": ("CamembertForCausalLM", "CamembertConfig", TEXT | DECODER),
    "bert": ("BertLMHeadModel", "BertConfig", TEXT | DECODER),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),  # of the mask
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
}


def positions_of(model, **inputs):
    """What the model's position embedding is called with."""
    seen = []

    def note(module, args, kwargs):
        values = [*args, *kwargs.values()]
        seen.append([t for t in values if isinstance(t, torch.Tensor) and not t.is_floating_point()][-1].clone())

    words = ("position_embeddings", "embed_positions", "wpe", "rotary_emb")
    names = [n for n, m in model.named_modules() if n.endswith(words) and not n.startswith("model.encoder")]
    tables = [model.get_submodule(n) for n in names if not isinstance(model.get_submodule(n), nn.ModuleList)]
    handles = [table.register_forward_pre_hook(note, with_kwargs=True) for table in tables]
    try:
        with torch.no_grad():
            out = model(**inputs)[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen, out


@pytest.mark.parametrize("given", [False, True], ids=["", "position_ids"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_shifts_what_the_model_makes(name, given):
    model = build(*MODELS[name])
    ids = token_ids(2, 6) + 1
    inputs = {"input_ids": ids}
    if name == "bart":
        inputs["decoder_input_ids"] = ids
    if given:
        if name == "bart":
            pytest.skip("a decoder of BART's takes no position_ids")
        inputs["position_ids"] = torch.arange(6)[None].expand(2, 6) * 2 + 2
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share="none", positions="shifted"))
    shifted, _ = positions_of(model, **inputs)
    with prefix.disabled():
        plain, _ = positions_of(model, **inputs)
    assert plain and len(plain) == len(shifted)
    for one, other in zip(plain, shifted, strict=True):
        assert torch.equal(other, one + P)
    prefix.detach()
    unshifted = prefixattn.attach(model, PrefixConfig(length=P, share="none", positions="unshifted"))
    for one, other in zip(plain, positions_of(model, **inputs)[0], strict=True):
        assert torch.equal(other, one)
    assert unshifted.is_active


@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_batch_padded_on_the_left_without_position_ids_gives_what_its_samples_give(name, positions):
    model = build(*MODELS[name])
    prefixattn.attach(model, PrefixConfig(length=P, share="none", positions=positions))
    ids = token_ids(2, 6) + 1
    padded, mask = torch.full((2, 9), 1), torch.zeros(2, 9, dtype=torch.int64)
    padded[0, 3:], mask[0, 3:] = ids[0], 1
    padded[1, 1:7], mask[1, 1:7] = ids[1], 1  # on both sides
    found = model(padded, attention_mask=mask).logits
    for row, first in ((0, 3), (1, 1)):
        torch.testing.assert_close(
            found[row, first : first + 6], model(ids[row : row + 1]).logits[0], rtol=1e-5, atol=1e-5
        )
    left = dict(input_ids=padded[:1], attention_mask=mask[:1])
    options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=1)
    torch.testing.assert_close(model.generate(**left, **options).logits[0], found[:1, -1], rtol=1e-5, atol=1e-5)


def test_positions_of_three_axes_are_shifted_in_a_forward_pass_as_in_generate():
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(intermediate_size=48, max_position_embeddings=128, pad_token_id=0, rope_parameters=rope)
    vision = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, patch_size=4, spatial_merge_size=2)
    special = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision | dict(temporal_patch_size=2), **special)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    ids = torch.tensor([[5, 6, 92, 90, 90, 90, 90, 93, 7, 8, 9]])
    inputs = dict(input_ids=ids, pixel_values=torch.randn(16, 96), image_grid_thw=torch.tensor([[1, 4, 4]]))
    inputs["mm_token_type_ids"] = (ids == 90).int()
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share="none"))
    assert prefix.config.positions == "shifted"

    def made():
        model.model.rope_deltas = None
        return positions_of(model, **inputs)

    shifted, out = made()
    with prefix.disabled():
        plain, _ = made()
    assert plain[-1].shape[0] >= 3 and plain[-1].unique().numel() < plain[-1].shape[-1]  # an image's share positions
    assert torch.equal(shifted[-1], plain[-1] + P)
    model.model.rope_deltas = None
    options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    generated = model.generate(**inputs, **options).logits[0]
    torch.testing.assert_close(generated, out[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "PegasusForConditionalGeneration"])
def test_each_sample_of_a_bank_shifts_by_its_own_length(name):
    model = build(name, name.replace("ForConditionalGeneration", "Config"), BART)
    short, long = (
        prefixattn.attach(model, PrefixConfig(length=n, share="none", attentions=["decoder"], positions="shifted"))
        for n in (2, 5)
    )
    ids = token_ids(2, 7)
    inputs = dict(input_ids=ids, decoder_input_ids=ids[:, :4])
    expected = []
    for row, prefix in enumerate((long, short)):
        prefix.activate()
        expected.append(model(**{k: t[row : row + 1] for k, t in inputs.items()}).logits)
    prefixattn.PrefixBank.of(model, [short, long])
    found = model(**inputs, prefix_ids=torch.tensor([1, 0])).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_position_past_the_models_last_is_refused():
    model = build(*MODELS["roberta"])
    prefixattn.attach(model, PrefixConfig(length=P, share="none"))
    with pytest.raises(ValueError, match="position 64 is past the model's 64 positions, 3 of which the prefix takes"):
        model(torch.full((1, 60), 5))


class Picky(transformers.MoshiModel):
    """Hands positions on to its layers, as all of its class, and wants them in a row for each sample, or not at all."""

    refuses = False

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        if position_ids is not None:
            if self.refuses:
                raise TypeError("no position_ids")
            position_ids = position_ids.view(-1).view(input_ids.shape)
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


@pytest.mark.filterwarnings("ignore:Picky hands its positions on nowhere")
@pytest.mark.parametrize("refuses", [False, True], ids=["viewed", "refused"])
def test_positions_as_an_argument_are_in_a_row_for_each_sample(refuses):
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(0)
    model = Picky(transformers.MoshiConfig(**sizes, head_dim=8, ffn_dim=48, max_position_embeddings=64)).eval()
    ids, given = token_ids(2, 6), torch.arange(6).repeat(2, 1)
    model.refuses = refuses
    prefix = prefixattn.attach(model, FREE)
    assert prefix.config.positions == ("unshifted" if refuses else "shifted")
    assert model(ids)[0].shape == (2, 6, 32)
    if not refuses:
        torch.testing.assert_close(model(ids)[0], model(ids, position_ids=given)[0], rtol=0, atol=0)
        cached = model(ids[:, :4], use_cache=True).past_key_values
        rest = model(ids[:, 4:], past_key_values=cached, use_cache=True)[0]
        torch.testing.assert_close(rest, model(ids)[0][:, 4:], rtol=1e-5, atol=1e-5)


def test_positions_from_a_padding_index_on_that_pass_no_embedding_are_left():
    text = dict(vocab_size=60, embed_dim=32, layers=2, attention_heads=4, ffn_dim=48, max_position_embeddings=64)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, head_dim=16)
    config = transformers.Kosmos2_5Config(text_config=text | dict(pad_token_id=1), vision_config=vision)
    torch.manual_seed(0)
    model, ids = transformers.Kosmos2_5Model(config).eval(), token_ids(2, 6) + 2
    plain = model(ids)[0]
    with pytest.warns(UserWarning, match="Kosmos2_5Model hands its positions on nowhere that a prefix could shift"):
        prefix = prefixattn.attach(model, FREE)
    assert prefix.config.positions == "unshifted"
    assert not torch.allclose(model(ids)[0], plain)
    with prefix.disabled():
        torch.testing.assert_close(model(ids)[0], plain, rtol=0, atol=0)
