"""Prefixes in vision transformers of timm, against concatenation."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.testing.timm import FAMILIES, concatenating, images, tiny

CLOSE = dict(rtol=2e-5, atol=2e-5)
METHODS = {
    "deep": dict(length=5, hidden=16),
    "simple": dict(length=5, share="simple"),
    "none": dict(length=5, share="none"),
    "one_network": dict(length=5, network="one", hidden=16),
    "first": dict(length=5, share="none", layers="first"),
    "list": dict(length=[3, 6], share="simple", layers=[0, 2]),
}


def gradients(prefix):
    return {name: p.grad.clone() for name, p in prefix.named_parameters()}


# what does not depend on the family is tried with three of them
CASES = [(family, method) for family in FAMILIES for method in ("deep", "simple")]
CASES += [(f, m) for f in ("vit", "eva02", "few_kv_heads") for m in ("none", "one_network", "first", "list")]


@pytest.mark.parametrize("family, method", CASES)
def test_equals_concatenation_with_its_gradients(family, method):
    model = tiny(family)
    twin = copy.deepcopy(model).requires_grad_(False)
    prefix = prefixattn.attach(model, PrefixConfig(**METHODS[method]))
    with concatenating(prefix):
        expected = twin(images())
    expected.square().mean().backward()
    wanted = gradients(prefix)
    prefix.zero_grad()
    out = model(images())
    out.square().mean().backward()
    torch.testing.assert_close(out, expected, **CLOSE)
    scale = max(g.abs().max() for g in wanted.values())
    torch.testing.assert_close(gradients(prefix), wanted, rtol=1e-4, atol=2e-5 * max(1.0, float(scale)))
    assert all(g.abs().sum() > 0 for g in wanted.values())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert (twin(images()) - expected).abs().max() > 1e-3  # the prefix matters at all


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_and_detached_are_the_plain_model(family):
    # frozen before too: torch multiplies another way where a parameter wants a gradient
    model, x = tiny(family).requires_grad_(False), images()
    state, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    plain = model(x)
    model.requires_grad_(True)
    prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none"))
    assert list(model.state_dict()) == state and not any(p.requires_grad for p in model.parameters())
    assert not torch.equal(model(x), plain)
    with prefix.disabled():
        torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    assert not torch.equal(model(x), plain)
    prefix.detach()
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    assert not any("prefix_slot" in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model.requires_grad_(False)(x), plain, rtol=0, atol=0)


def masks():
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(3, 1, 10, 10, generator=generator) > 0.3
    visible[:, :, :, 0] = True
    return {
        "bool": dict(attn_mask=visible),
        "additive": dict(attn_mask=torch.randn(10, 10, generator=generator)),
        "keys": dict(attn_mask=visible[:, :, :1]),
        "causal": dict(is_causal=True),
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("family", ["vit", "eva02", "parallel"])
def test_masks_are_of_the_tokens_alone(family, mask):
    model, options = tiny(family), masks()[mask]
    twin = copy.deepcopy(model)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none"))
    with torch.no_grad(), concatenating(prefix):
        expected = twin(images(), **options)
    with torch.no_grad():
        torch.testing.assert_close(model(images(), **options), expected, **CLOSE)
        assert not torch.allclose(model(images()), expected, **CLOSE)


def test_naflex_batches_of_images_of_several_sizes():
    model = tiny("naflex")
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none"))
    patches = torch.randn(2, 9, 8 * 8 * 3, generator=torch.Generator().manual_seed(4))
    valid = torch.arange(9).expand(2, -1) < torch.tensor([[9], [6]])
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(3)) * valid[:, :, None]  # 3 x 3 and 2 x 3 patches
    batch = {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}
    alone = {name: t[1:, :6] for name, t in batch.items()}  # the second image without padding
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1:], model(alone), **CLOSE)
        together = model(batch)
        with prefix.disabled():
            assert not torch.allclose(model(batch), together, atol=1e-3)


@pytest.mark.parametrize("family", ["eva", "eva02_fused"])
def test_a_bias_added_after_the_projection(family):
    model = tiny(family)
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    twin = copy.deepcopy(model)
    for share in ("none", "simple"):
        prefix = prefixattn.attach(model, PrefixConfig(length=4, share=share))
        with torch.no_grad(), concatenating(prefix):
            expected = twin(images())
        torch.testing.assert_close(model(images()).detach(), expected, **CLOSE)
        prefix.detach()


NORMS = {"parallel": "norm", "post_norm": ""}


@pytest.mark.parametrize("family", ["vit", "normed", "eva", "eva02", "few_kv_heads", "post_norm", "parallel"])
def test_simple_share_is_a_row_through_the_block(family, monkeypatch):
    """Keys and values of a prefix equal those of a token whose input to the block is the vector."""
    model, seen = tiny(family), []
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="simple", layers=[0]))
    around = model.blocks[0].attns[0] if family == "parallel" else model.blocks[0]
    norm = NORMS.get(family, "norm1")
    rows = getattr(around, norm)(prefix.encoder.vectors[0]) if norm else prefix.encoder.vectors[0]

    def attention(q, k, v, **_):
        seen.append(torch.stack([k, v]))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with prefix.disabled():
        around.attn(rows[None])
    group = around.attn.num_heads // prefix.geometry.kv_heads  # timm repeats key heads
    torch.testing.assert_close(prefix()[0], seen[0][:, 0, ::group], **CLOSE)


def test_defaults_are_the_published_ones_for_images():
    prefix = prefixattn.attach(tiny("vit"), PrefixConfig(length=5))
    config = prefix.config
    assert (config.network, config.hidden, config.positions, config.init) == ("per_layer", 48, "unshifted", "uniform")
    assert prefix.encoder.networks == 3 and prefix.encoder.form.interleaved
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5  # VPT's
    assert 0.9 * bound < prefix.encoder.embedding.weight.abs().max() <= bound
    assert prefix.geometry.model_type == "VisionTransformer" and prefix.geometry.layers == 3


REFUSED = {
    "swin": ("swin_tiny_patch4_window7_224", "timm.models.swin_transformer.WindowAttention"),
    "beit": ("beit_base_patch16_224", "timm.models.beit.Attention"),
    "sam": ("samvit_base_patch16", "timm.models.vision_transformer_sam.Attention"),
    "diff": ("vit_dlittle_patch16_reg1_gap_256", "DiffAttention"),
    "resnet": ("resnet18", "attach finds no attention in ResNet"),
    "fused_block": ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
    "levels": ("crossvit_9_240", "CrossAttention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_attention_is_refused_by_name(case):
    name, words = REFUSED[case]
    with torch.device("meta"):
        model = timm.create_model(name)
    before = [type(m) for m in model.modules()]
    with pytest.raises(NotImplementedError, match=words):
        prefixattn.attach(model, PrefixConfig(length=3))
    assert [type(m) for m in model.modules()] == before and all(p.requires_grad for p in model.parameters())


class Other(timm.layers.Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) * 2


class Same(timm.layers.Attention):
    """Of the same computation."""


def test_a_subclass_is_taken_if_it_computes_the_same():
    with pytest.raises(NotImplementedError, match="Other"):
        prefixattn.attach(tiny("vit", attn_layer=Other), PrefixConfig(length=3))
    model = tiny("vit", attn_layer=Same)
    prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none"))
    assert all(isinstance(block.attn, Same) for block in model.blocks)
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(images()), model(images()), rtol=0, atol=0)
    prefix.detach()
    assert all(type(block.attn) is Same for block in model.blocks)
    model.blocks[1].attn.forward = lambda x, **_: x
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.attn is a"):
        prefixattn.attach(model, PrefixConfig(length=3))


def test_refusals_in_words():
    model = tiny("vit")
    with pytest.raises(ValueError, match="init is 'a bird', but VisionTransformer takes images"):
        prefixattn.attach(model, PrefixConfig(share="none", init="a bird"))
    with pytest.raises(ValueError, match="positions is 'shifted'"):
        prefixattn.attach(model, PrefixConfig(positions="shifted"))
    with pytest.raises(NotImplementedError, match="count is 4: a timm model's forward pass takes no prefix_ids"):
        prefixattn.attach(model, PrefixConfig(share="none", count=4))
    with pytest.raises(ValueError, match="layers names layer 3, but the model has 3"):
        prefixattn.attach(model, PrefixConfig(layers=[3]))
    model.blocks[2].forward = lambda x, **_: x  # a block that does not attend
    with pytest.raises(NotImplementedError, match="2 of 3 layers"):
        prefixattn.attach(model, PrefixConfig(length=3))
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_pre_hooks
    uneven = tiny("few_kv_heads", num_kv_heads=[2, 4, 2])
    with pytest.raises(NotImplementedError, match="the layers of Eva differ in size"):
        prefixattn.attach(uneven, PrefixConfig(length=3))


class Around(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.norm_before, self.attn, self.mlp, self.norm2 = block.norm1, block.attn, block.mlp, block.norm2

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.attn(self.norm_before(x), attn_mask=attn_mask, is_causal=is_causal)
        return x + self.mlp(self.norm2(x))


def test_simple_share_refuses_a_block_whose_norm_it_does_not_know():
    model = tiny("vit")
    for i, block in enumerate(model.blocks):
        model.blocks[i] = Around(block)
    prefixattn.attach(model, PrefixConfig(length=3, share="none")).detach()
    with pytest.raises(NotImplementedError, match="which norm stands before the attention of a Around"):
        prefixattn.attach(model, PrefixConfig(length=3, share="simple"))
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_pre_hooks


def test_attention_layer_at_creation():
    plain = tiny("vit").requires_grad_(False)
    model = tiny("vit", attn_layer=prefixattn.timm_attention).requires_grad_(False)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=0)
    prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none"))
    with concatenating(prefix):
        expected = plain(images())
    torch.testing.assert_close(model(images()), expected, **CLOSE)
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(images()), model(images()), rtol=0, atol=0)
    prefix.detach()
    assert all(type(block.attn) is prefixattn.timm_attention for block in model.blocks)
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=0)


@pytest.mark.parametrize("choices", [dict(), dict(phi="gelu"), dict(per="width"), dict(phi="mlp", hidden=5)])
@pytest.mark.parametrize("family", ["vit", "eva02", "few_kv_heads"])
def test_prefix_tuning_plus_adds_to_the_attention(family, choices, monkeypatch):
    model, seen = tiny(family).requires_grad_(False), []
    plain = F.scaled_dot_product_attention

    def attention(q, k, v, **options):
        seen.append(q)
        memory = plus()[len(seen) - 1]
        features = dict(elu=F.elu, gelu=F.gelu, mlp=lambda t: t)[memory.phi]
        rows = q if len(memory.matrix) == q.shape[1] else q.transpose(1, 2).flatten(2)[:, None]  # [B, heads, N, D]
        if memory.weight is not None:
            rows = torch.relu(rows @ memory.weight.mT + memory.bias[:, None])
        added = features(rows) @ memory.matrix
        if len(memory.matrix) != q.shape[1]:
            added = added[:, 0].unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        return plain(q, k, v, **options) + added

    torch.manual_seed(0)
    plus = prefixattn.attach(model, prefixattn.PrefixPlusConfig(init="normal", **choices))
    out = model(images())
    out.square().mean().backward()
    found = {name: p.grad.clone() for name, p in plus.named_parameters()}
    plus.zero_grad()
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with plus.disabled():
        expected = model(images())
    expected.square().mean().backward()
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(found, {name: p.grad for name, p in plus.named_parameters()}, **CLOSE)
    assert len(seen) == 3 and all(g.abs().sum() > 0 for g in found.values())
