"""Families beyond the table of docs/models.md: with a prefix they are what concatenation is, or are refused by name."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from prefixattn.testing.models import concat_twin, token_ids  # noqa: E402

CLOSE = dict(rtol=5e-5, atol=5e-5)
P = 3
_SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
_TEXT = _SIZES | dict(vocab_size=50, pad_token_id=0, bos_token_id=0, eos_token_id=0, max_position_embeddings=64)
_GROUPED = _TEXT | dict(num_key_value_heads=2, head_dim=8)
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_WHISPER = dict(
    vocab_size=50, d_model=32, num_mel_bins=8, max_source_positions=12, max_target_positions=30, init_std=0.2,
    encoder_layers=3, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
# name -> class of the model, class of its config, sizes; layers of each kind
MODELS = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _GROUPED | _EXPERTS | dict(moe_intermediate_size=16)),
    # a layer that sees chunks of 4 tokens and rotates, and one that sees all and does not
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _GROUPED | _EXPERTS | dict(intermediate_size_mlp=48, attention_chunk_size=4, no_rope_layers=[1, 0]),
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _TEXT | dict(cls_token_id=0, sep_token_id=0, local_attention=6, layer_types=["sliding_attention"] * 2),
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", _SIZES | dict(image_size=16, patch_size=4)),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    # layers with a window, and every other one with fewer heads, which are wider
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        _GROUPED
        | dict(
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=5,
            per_layer_config={"1": {"head_dim": 16, "num_key_value_heads": 1}},
            hidden_size_per_layer_input=0,
        ),
    ),
}
SINCE = {"dinov2": "5.23"}  # version of transformers from which its layers get the arguments of the forward pass
KINDS = {"whisper": {"encoder": 3, "decoder": 2, "cross": 2}}
WRITERS = "qwen3_moe", "llama4_text", "whisper", "gemma4"


def small(name):
    torch.manual_seed(0)
    cls, config, sizes = MODELS[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()
    model.loss_type = "ForCausalLM"
    return model


def inputs_of(name):
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {
            "input_features": torch.randn(3, 8, 24, generator=generator),
            "decoder_input_ids": token_ids(3, 6, seed=2),
        }
    if name == "dinov2":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    return {"input_ids": token_ids(3)}


def shifted(name, prefix):
    """Where a twin's positions start, which has no prefix in its cache."""
    if prefix.config.positions == "unshifted":
        return {}
    return {"position_ids": torch.arange(9)[None] + P}


@pytest.mark.parametrize("share", ["deep", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_concatenation_with_its_gradients(name, share):
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, SINCE.get(name, "0").split("."))):
        pytest.skip(f"{name} can be reached from transformers {SINCE[name]} on, and this is {version}")
    model, inputs = small(name), inputs_of(name)
    with torch.no_grad():
        plain = model(**inputs)[0]
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share=share, hidden=8))
    assert prefix.geometry.kinds == KINDS.get(name, {"self": 2})
    twin = concat_twin(model, prefix)
    expected = twin(**inputs, **shifted(name, prefix))[0]
    expected.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    out = model(**inputs)[0]
    out.square().mean().backward()
    assert not torch.allclose(out, plain, **CLOSE)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close({name: p.grad for name, p in prefix.named_parameters()}, wanted, **CLOSE)
    assert all(g.abs().sum() > 0 for g in wanted.values())
    prefix.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], plain, rtol=0, atol=0)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_generation_goes_on_where_a_pass_over_all_would(name, beams):
    model, inputs = small(name), inputs_of(name)
    if name == "whisper":
        inputs = {"input_features": inputs["input_features"]}
    prefix = prefixattn.attach(model, PrefixConfig(length=P, share="none"))
    options = dict(do_sample=False, num_beams=beams, min_new_tokens=8, max_new_tokens=8)
    cached = model.generate(**inputs, **options)
    torch.testing.assert_close(cached, model.generate(**inputs, **options, use_cache=False))
    with prefix.disabled():
        assert not torch.equal(cached, model.generate(**inputs, **options))


REFUSED = {
    "siglip_vision": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16)
        | dict(patch_size=8),
        "attach cannot reach the layers of SiglipVisionModel.* does not pass on",
    ),
    "another_ear": (
        "Speech2TextModel",
        "Speech2TextConfig",
        dict(d_model=32, vocab_size=50, encoder_layers=1, decoder_layers=1),
        "Speech2TextModel takes input_features, but its config has not both num_mel_bins and max_source_positions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_by_name(name):
    cls, config, sizes, words = REFUSED[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=words):
        prefixattn.attach(model, PrefixConfig(length=P))
    assert model.config._attn_implementation == before and not model._forward_pre_hooks
    assert all(p.requires_grad for p in model.parameters())
