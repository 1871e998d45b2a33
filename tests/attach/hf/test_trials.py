"""What attach's own passes read of a model of transformers, and that they leave nothing on it."""

import pytest
import torch
import transformers

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach.hf import probe
from prefixattn.testing.models import token_ids

TEXT = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
FREE = PrefixConfig(length=3, share="none")


def build(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


def sam3():
    backbone = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    backbone |= dict(patch_size=8, window_size=2, global_attn_indexes=[1], pretrain_image_size=32)
    sizes = dict(fpn_hidden_size=16, backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]])
    config = transformers.Sam3VisionConfig(backbone_config=dict(model_type="sam3_vit_model") | backbone, **sizes)
    return build(transformers.Sam3VisionModel, config)


@pytest.mark.parametrize("share", ["none", "deep"])
def test_what_a_config_does_not_say_is_said_by_the_config_around_the_layers(share):
    model, image = sam3(), torch.randn(2, 3, 32, 32)
    assert not hasattr(model.config, "hidden_size")
    plain = model(image).last_hidden_state
    prefix = prefixattn.attach(model, PrefixConfig(length=3, share=share))
    assert (prefix.geometry.width, prefix.geometry.kinds) == (32, {"self": 2})
    if share == "none":  # VPT's rule, of patches of 3 * 8 * 8 numbers
        assert 0 < prefix.encoder.bank.abs().max() <= (6 / (3 * 8 * 8 + 32)) ** 0.5
        assert not torch.allclose(model(image).last_hidden_state, plain)


def test_what_no_config_says_is_asked_for_in_words():
    model = sam3()
    site = probe.Site("backbone.layers.0.attention", "self", 2, 2, 16, 16, False)
    assert probe.field(model, model.config, site, "patch_size") == 8
    with pytest.raises(NotImplementedError, match="attach reads width in a config, but neither that of Sam3Vision"):
        probe.field(model, model.config, site, "width")


def test_a_refusal_leaves_swins_windows():
    """Which a run on the small image of its config overwrites before it fails."""
    config = transformers.SwinConfig(image_size=32, embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=7)
    model, image = build(transformers.SwinBackbone, config), torch.randn(1, 3, 96, 96)
    with pytest.raises(NotImplementedError, match="attach tries SwinModel with pixel_values alone, and without a pref"):
        prefixattn.attach(model, FREE)
    assert {m.window_size for m in model.modules() if type(m).__name__ == "SwinLayer"} == {7}
    fresh = build(transformers.SwinBackbone, config)
    torch.testing.assert_close(model(image).feature_maps, fresh(image).feature_maps, rtol=0, atol=0)


class OwnAttention(torch.nn.Module):
    """Of which nothing is known, so attach refuses a model that runs it."""

    def forward(self, hidden):
        return hidden


class Notes(transformers.LlamaModel):
    """Keeps something of each pass."""

    def __init__(self, config):
        super().__init__(config)
        self.last, self.passes, self.halved, self.halves, self.own = None, 0, False, False, torch.nn.Identity()
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, input_ids=None, **kwargs):
        self.passes += 1
        self.last = self.own(input_ids.clone())
        self.table = self.table + 1
        if self.halves and not self.halved:
            with torch.no_grad():
                self.layers[0].mlp.up_proj.weight.div_(2)
            self.halved = True
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_what_a_model_keeps_of_a_pass_is_of_its_users_passes(ran, refused):
    model = build(Notes, transformers.LlamaConfig(**TEXT))
    model.own = OwnAttention() if refused else torch.nn.Identity()
    if ran:
        model(token_ids(2, 6))
    last, table = model.last, model.table
    if refused:
        with pytest.raises(NotImplementedError, match="Notes has layers with an attention of their own"):
            prefixattn.attach(model, FREE)
    else:
        prefixattn.attach(model, FREE)
    assert model.last is last and model.table is table and model.passes == ran


def test_what_tells_of_weights_stays_where_they_were_written_to():
    model = build(Notes, transformers.LlamaConfig(**TEXT))
    model.halves, before = True, model.layers[0].mlp.up_proj.weight.detach().clone()
    prefixattn.attach(model, FREE)
    model(token_ids(2, 6))
    assert model.halved
    torch.testing.assert_close(model.layers[0].mlp.up_proj.weight, before / 2, rtol=0, atol=0)


def test_what_transformers_notes_of_its_hooks_stays():
    model = build(transformers.LlamaModel, transformers.LlamaConfig(**TEXT, output_hidden_states=True))
    prefix = prefixattn.attach(model, FREE)
    assert len(model(token_ids(2, 6)).hidden_states) == 3
    prefix.detach()
    assert len(model(token_ids(2, 6)).hidden_states) == 3
