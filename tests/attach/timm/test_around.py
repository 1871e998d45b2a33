"""What stands around a timm model with a prefix: tracers, wrappers, offloaded weights, devices without memory."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach import attached
from prefixattn.testing.timm import images, tiny

SAME = dict(rtol=0, atol=0)
FREE = PrefixConfig(length=4, share="none")
OLD = pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore::torch.jit.TracerWarning")

TRACERS = {
    "torch.jit.script": torch.jit.script,
    "torch.jit.trace": lambda model: torch.jit.trace(model, images()),
    "torch.fx": torch.fx.symbolic_trace,
}


@OLD
@pytest.mark.parametrize("family", ["vit", "eva02", "parallel"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_what_cannot_record_a_prefix_says_so(tracer, family):
    model = tiny(family)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    expected = model(images())
    with pytest.raises(NotImplementedError, match=f"{tracer}.*torch.export.export can.*detach"):
        TRACERS[tracer](model)
    torch.testing.assert_close(model(images()), expected, **SAME)
    prefix.detach()
    if family == "vit":  # timm's others are not traced without a prefix either
        torch.testing.assert_close(TRACERS[tracer](model)(images()), model(images()), rtol=1e-5, atol=1e-5)


@OLD
def test_the_plain_model_is_traced_inside_disabled():
    model = tiny("vit")
    prefix = prefixattn.attach(model, FREE)
    with prefix.disabled():
        plain = model(images())
        traced = [TRACERS[name](model) for name in ("torch.jit.trace", "torch.fx")]
    torch.testing.assert_close(traced[0](images()), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(images()), plain, atol=1e-3)


@OLD
def test_an_attention_layer_made_for_prefixes_is_not_scripted():
    with pytest.raises(NotImplementedError, match=r"timm's own Attention, not prefixattn\.timm_attention"):
        torch.jit.script(tiny("vit", attn_layer=prefixattn.timm_attention))


def test_functions_of_parameters_and_of_images():
    model = tiny("vit")
    prefixattn.attach(model, FREE)
    expected, x = model(images()), images()
    out = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    torch.testing.assert_close(out, expected, **SAME)
    x.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: model(x).sum())(images()), x.grad)
    with pytest.raises(
        NotImplementedError, match=r"no rule for torch\.func\.vmap; fold the mapped axis into the batch"
    ):
        torch.vmap(lambda image: model(image[None]))(images())


WAYS = {
    "forward": lambda model, x: model.forward(x),
    "features": lambda model, x: model.forward_head(model.forward_features(x)),
    "sequential": lambda model, x: nn.Sequential(nn.Identity(), model)(x),
    "parallel": lambda model, x: nn.DataParallel(model)(x),  # which is the model itself where there is no GPU
    "blocks": lambda model, x: model.forward_head(model.norm(model.blocks(model.norm_pre(tokens(model, x))))),
    "checkpoint": lambda model, x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
}


def tokens(model, x):
    return model._pos_embed(model.patch_embed(x))


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_a_model_passes_its_prefix_by(way):
    model = tiny("vit")
    prefix = prefixattn.attach(model, FREE)
    expected = model(images())
    expected.square().mean().backward()
    wanted, prefix.encoder.bank.grad = prefix.encoder.bank.grad, None
    out = WAYS[way](model, images())
    torch.testing.assert_close(out, expected, **SAME)
    out.square().mean().backward()
    torch.testing.assert_close(prefix.encoder.bank.grad, wanted, **SAME)
    with prefix.disabled():
        assert not torch.allclose(WAYS[way](model, images()), expected, atol=1e-3)


def with_lora(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": AveragedModel,
    "data parallel": nn.DataParallel,
    "LoRA": with_lora,
    "compiled LoRA": lambda model: torch.compile(with_lora(model), backend="eager"),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_in_a_wrapper_gets_the_prefix(wrapper):
    wrapped = WRAPPERS[wrapper](tiny("vit"))
    with torch.no_grad():
        plain = wrapped(images())
        prefix = prefixattn.attach(wrapped, FREE)
        assert attached(wrapped) is prefix and not any(p.requires_grad for p in wrapped.parameters())
        assert not torch.allclose(wrapped(images()), plain, atol=1e-3)
        with prefix.disabled():
            torch.testing.assert_close(wrapped(images()), plain, **SAME)
    wrapped(images()).sum().backward()
    assert (prefix.encoder.bank.grad.flatten(1).abs().sum(1) > 0).all()
    prefix.detach()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images()), plain, **SAME)


def test_a_class_that_holds_a_model_is_refused():
    with pytest.raises(NotImplementedError, match=r"does not know the class Sequential.*give that model"):
        prefixattn.attach(nn.Sequential(tiny("vit")), FREE)


def test_timms_own_wrapper_for_features():
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=32, depth=4, out_indices=[0, 2])
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    prefix = prefixattn.attach(model, FREE)
    assert prefix.geometry.layers == 3  # timm prunes what comes after
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(model(x), plain, strict=True))
    with prefix.disabled():
        torch.testing.assert_close(model(x), plain, **SAME)


@pytest.mark.parametrize("share", ["none", "deep", "simple"])
def test_offloaded_weights(share, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    results = []
    for offload in (
        lambda model: model,
        lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
        lambda model: accelerate.disk_offload(model, str(tmp_path), execution_device="cpu"),
    ):
        model = offload(tiny("vit"))
        torch.manual_seed(0)
        prefix = prefixattn.attach(model, PrefixConfig(length=4, share=share, hidden=8 if share == "deep" else None))
        out = model(images())
        out.square().mean().backward()
        assert prefix().device.type == "cpu"
        results.append([out.detach(), *(p.grad for p in prefix.parameters())])
    for others in results[1:]:
        torch.testing.assert_close(others, results[0], rtol=1e-5, atol=1e-5)


def test_attention_that_accelerate_has_its_hands_on_is_refused_by_name():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(tiny("eva"), execution_device="cpu")
    with pytest.raises(NotImplementedError, match="EvaAttention, whose forward was replaced"):
        prefixattn.attach(model, FREE)


METHODS = {
    "none": FREE,
    "deep": PrefixConfig(length=4, hidden=8),
    "simple": PrefixConfig(length=4, share="simple"),
    "gate": PrefixConfig(length=4, share="none", gate=True),
    "plus": prefixattn.PrefixPlusConfig(),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_meta(method):
    model = tiny("vit").to("meta")
    prefix = prefixattn.attach(model, METHODS[method])
    x = images().to("meta")
    assert model(x).shape == (3, 5) and all(p.device.type == "meta" for p in prefix.parameters())
    with torch.no_grad():
        assert model(x).shape == (3, 5)
    model(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in prefix.parameters())
    prefix.detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", [torch.inference_mode, lambda: torch.device("meta")])
def test_a_prefix_can_be_trained_wherever_it_was_made(where, method):
    model = tiny("vit")
    with where():
        prefix = prefixattn.attach(model, METHODS[method])
    model(images()).square().mean().backward()
    assert all(p.grad is not None and p.device.type == "cpu" for p in prefix.parameters())
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        torch.testing.assert_close(copied(images()), model(images()), **SAME)
