"""timm models whose blocks are taken out, replaced or left out after attach."""

import copy

import pytest
import timm
import torch
from torch import nn

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.testing.timm import images, tiny

SAME = dict(rtol=0, atol=0)
SHARES = {
    "none": PrefixConfig(length=4, share="none"),
    "deep": PrefixConfig(length=4, hidden=8),
    "simple": PrefixConfig(length=4, share="simple"),
    "plus": prefixattn.PrefixPlusConfig(init="normal"),
}


def remove(model, index):
    del model.blocks[index]


def put(model, index, module):
    model.blocks[index] = module


# what a user does to the blocks -> which of three remain
REMOVALS = {
    "prune": (lambda model: model.prune_intermediate_layers([1], prune_head=False), [0, 1]),
    "front": (lambda model: setattr(model, "blocks", model.blocks[:2]), [0, 1]),
    "back": (lambda model: setattr(model, "blocks", model.blocks[1:]), [1, 2]),
    "middle": (lambda model: remove(model, 1), [0, 2]),
    "identity": (lambda model: put(model, 1, nn.Identity()), [0, 2]),
    "last": (lambda model: put(model, 2, nn.Identity()), [0, 1]),
}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("removal", REMOVALS)
def test_the_blocks_that_remain_keep_their_prefix(removal, share):
    take, remain = REMOVALS[removal]
    model = tiny("vit")
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    take(twin)
    flags = {name: p.requires_grad for name, p in twin.named_parameters()}
    kinds = [type(module) for module in twin.modules()]
    plain = twin.requires_grad_(False)(images())
    prefix = prefixattn.attach(model, SHARES[share])
    take(model)
    out = model(images())
    out.square().mean().backward()
    model.blocks[0](torch.randn(2, 10, 32))
    with prefix.disabled():
        torch.testing.assert_close(model(images()), plain, **SAME)
    # a prefix of the remaining layers alone, on a model that never had others
    kv = prefix()
    if share == "plus":
        other = prefixattn.attach(twin, SHARES[share])
        for i, slot in enumerate(remain):
            for own, theirs in zip(other()[i][1:], kv[slot][1:], strict=True):
                own is None or own.data.copy_(theirs)
    else:
        other = prefixattn.attach(twin, SHARES["none"])
        other.encoder.bank.data.copy_(kv[remain])
    torch.testing.assert_close(out, twin(images()), rtol=1e-5, atol=1e-5)
    if share == "none":
        gradient = prefix.encoder.bank.grad.flatten(1).abs().sum(1)
        assert [i for i, g in enumerate(gradient) if g > 0] == remain
    if share != "plus":
        with pytest.raises(ValueError, match="1 of 3 layers"):
            prefix.mass(images())
    prefix.detach()
    other.detach()
    assert [type(module) for module in model.modules()] == kinds
    if removal != "back":  # flags go by name, and its blocks have other names than they had
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any("prefix_slot" in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model.requires_grad_(False)(images()), plain, **SAME)
    again = prefixattn.attach(model, SHARES[share])
    assert again.geometry.layers == 2


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: copy.copy(copy.deepcopy(model))])
def test_a_pruned_model_is_copied(copying):
    model = tiny("eva02")
    prefix = prefixattn.attach(model, SHARES["none"])
    model.prune_intermediate_layers([0])
    copied = copying(model)
    torch.testing.assert_close(copied(images()), model(images()), **SAME)
    prefix.detach()


def test_a_pruned_model_moves_to_another_type():
    model = tiny("vit")
    prefix = prefixattn.attach(model, SHARES["simple"])
    model.prune_intermediate_layers([1], prune_head=False)
    assert model.bfloat16()(images().bfloat16()).isfinite().all()
    prefix.detach()


class Passing(nn.Module):
    def forward(self, x, **_):
        return x


REPLACEMENTS = {
    "attention": (lambda m: setattr(m.blocks[1], "attn", timm.layers.Attention(32, 4)), "came after attach"),
    "block": (lambda m: put(m, 1, tiny("vit", 5).blocks[0]), "came after attach"),
    "forward": (lambda m: setattr(m.blocks[1].attn, "forward", lambda x, **_: x), "did not call it"),
    "skipped": (lambda m: setattr(m.blocks[1], "forward", lambda x, **_: x), "did not call it"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_layer_that_gets_no_call_raises(replacement, grad):
    replace, words = REPLACEMENTS[replacement]
    model = tiny("vit")
    prefix = prefixattn.attach(model, SHARES["none"])
    replace(model)
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match=words):
            model(images())
        with pytest.raises(ValueError, match=words):
            prefix.mass(images())
        with prefix.disabled():
            model(images())
    prefix.detach()
    model(images())


def test_a_layer_without_a_prefix_may_be_replaced():
    model = tiny("vit")
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none", layers=[0, 2]))
    model.blocks[1].attn = timm.layers.Attention(32, 4)
    model(images())
    assert prefix.mass(images()).shape[0] == 2
    model.blocks[0].attn = Passing()  # no attention any more
    model(images())


def test_a_pass_that_the_caller_stops_early_is_none_of_the_model():
    model = tiny("vit")
    prefix = prefixattn.attach(model, SHARES["none"])
    model.forward_intermediates(images(), indices=[0], stop_early=True)
    model.get_intermediate_layers(images(), n=[1])

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    handle = model.blocks[1].register_forward_hook(stop)
    with pytest.raises(Stop):
        model(images())
    handle.remove()
    model(images())
    assert prefix.is_active


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # Dynamo asks it of what an object holds
)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_blocks_that_are_compiled_by_themselves_have_their_prefix(checkpoints):
    model = tiny("vit")
    prefixattn.attach(model, SHARES["none"])
    expected = model(images()).detach()
    model.set_grad_checkpointing(checkpoints)
    model.blocks[0].compile(backend="eager")
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    out = model(images())
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_new_head_or_embedding_changes_nothing_for_the_prefix():
    model = tiny("vit")
    twin = copy.deepcopy(model)
    prefix = prefixattn.attach(model, SHARES["deep"])
    model.reset_classifier(7)
    assert model.head.weight.requires_grad  # a new head is there to be trained
    calls = []
    prefix.encoder.register_forward_hook(lambda *_: calls.append(1))
    expected = model(images())
    assert expected.shape == (3, 7) and len(calls) == 1
    model.patch_embed = copy.deepcopy(model.patch_embed)
    model.patch_embed.proj = nn.Conv2d(3, 32, 8, 8)
    model.patch_embed.proj.load_state_dict(twin.patch_embed.proj.state_dict())
    torch.testing.assert_close(model(images()), expected, **SAME)
    prefix.detach()
    assert not any(m._forward_pre_hooks for m in model.modules() if m is not model.patch_embed)
