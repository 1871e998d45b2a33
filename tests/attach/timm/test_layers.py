"""timm's attention with a prefix, where inputs and settings are not the usual ones."""

import copy

import pytest
import timm
import torch
from torch import nn

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.testing.timm import FAMILIES, concatenating, images, tiny

CLOSE = dict(rtol=2e-5, atol=2e-5)
SAME = dict(rtol=0, atol=0)
FREE = PrefixConfig(length=4, share="none")


@pytest.fixture
def unfused():
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


@pytest.mark.parametrize("share", ["none", "deep", "simple"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_images(family, share):
    if family == "dinov3":
        pytest.skip("timm's own model cannot reshape its rotation for no image")
    model = tiny(family)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share=share))
    out = model(images()[:0])
    assert out.shape == (0, 5)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in prefix.parameters())
    layers, heads, tokens = len(prefix.slots), prefix.geometry.heads, prefix.mass(images()).shape[-1]
    assert prefix.mass(images()[:0]).shape == (layers, 0, heads, tokens)


@pytest.mark.parametrize("memory", [dict(), dict(per="width"), dict(phi="mlp", hidden=5)])
def test_a_batch_without_images_and_prefix_tuning_plus(memory):
    for family in ("vit", "few_kv_heads"):
        model = tiny(family)
        plus = prefixattn.attach(model, prefixattn.PrefixPlusConfig(**memory))
        model(images()[:0]).sum().backward()
        assert all(not p.grad.any() for p in plus.parameters())
        plus.detach()


INPUTS = {
    "one image": (dict(), images(1)),
    "other sizes": (dict(dynamic_img_size=True), torch.randn(2, 3, 40, 16)),
    "channels last": (dict(), images().to(memory_format=torch.channels_last)),
    "no class token": (dict(class_token=False, global_pool="avg"), images()),
    "registers": (dict(reg_tokens=3), images()),
    "no head": (dict(num_classes=0), images()),
    "no bias": (dict(qkv_bias=False), images()),
    "other norm": (dict(norm_layer="rmsnorm", qk_norm=True), images()),
    "one channel": (dict(in_chans=1), images()[:, :1]),
}


@pytest.mark.parametrize("case", INPUTS)
def test_models_and_images_of_other_kinds(case):
    choices, x = INPUTS[case]
    model = tiny("vit", **choices)
    twin = copy.deepcopy(model)
    prefix = prefixattn.attach(model, FREE)
    with torch.no_grad(), concatenating(prefix):
        expected = twin(x)
    torch.testing.assert_close(model(x).detach(), expected, **CLOSE)


@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_patch_dropout_leaves_the_prefix(family):
    model = tiny(family, patch_drop_rate=0.5)
    twin = copy.deepcopy(model)
    prefix = prefixattn.attach(model, FREE)
    outs = []
    for run in (model, twin):
        run.train()
        torch.manual_seed(0)
        if run is twin:
            with torch.no_grad(), concatenating(prefix):
                outs.append(run(images()))
        else:
            outs.append(run(images()).detach())
    torch.testing.assert_close(*outs, **CLOSE)
    model.eval()
    assert not torch.allclose(model(images()), outs[0], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["normed", "eva02", "naflex_gated"])
def test_norms_of_queries_and_keys_in_half_precision(family, dtype):
    model, twin = tiny(family), tiny(family)
    prefix = prefixattn.attach(model, FREE)
    with concatenating(prefix):
        expected = twin(images()).detach()
    with torch.autocast("cpu", dtype):
        cast = model(images())
    whole = model.to(dtype)(images().to(dtype))
    for out in (cast, whole):
        assert out.dtype == dtype and (out.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("family", ["vit", "eva02", "few_kv_heads"])
def test_unfused_models_have_the_same_prefix(family, unfused):
    model = tiny(family)
    timm.layers.set_fused_attn(True)
    twin = tiny(family)
    assert not model.blocks[0].attn.fused_attn and twin.blocks[0].attn.fused_attn
    prefix = prefixattn.attach(model, FREE)
    with concatenating(prefix):
        expected = twin(images())
    torch.testing.assert_close(model(images()), expected, **CLOSE)
    with concatenating(prefix):
        expected = twin(images(), is_causal=True)
    # timm's unfused attention has causality go before a mask
    torch.testing.assert_close(model(images(), attn_mask=torch.zeros(10, 10), is_causal=True), expected, **CLOSE)


def test_a_mask_and_causality_exclude_each_other_as_in_timm():
    model = tiny("vit")
    prefixattn.attach(model, FREE)
    with pytest.raises(ValueError, match="attn_mask and is_causal=True exclude each other"):
        model(images(), attn_mask=torch.zeros(10, 10), is_causal=True)


def test_dropout_of_single_layers_is_on_where_timm_has_it_on(unfused):
    """Monte Carlo dropout: the model in evaluation mode, its dropouts in training mode."""
    model = tiny("vit", attn_drop_rate=0.5)
    prefix = prefixattn.attach(model, FREE)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with prefix.disabled():
        assert not torch.equal(model(images()), model(images()))
    assert not torch.equal(model(images()), model(images()))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    torch.testing.assert_close(model(images()), model(images()), **SAME)


def test_a_hook_that_waits_for_attention_weights_is_told_that_there_are_none(unfused):
    model, weights = tiny("vit"), []
    prefix = prefixattn.attach(model, FREE)
    handle = model.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    with pytest.raises(NotImplementedError, match="attention with a prefix never makes"):
        model(images())
    with prefix.disabled():
        model(images())
    assert weights[0].shape == (3, 4, 10, 10)
    handle.remove()
    model(images())
