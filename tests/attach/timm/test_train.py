"""Prefixes in timm's models: in turns, with dropout, copied, saved, trained beside the head."""

import copy
import pickle

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach import attached
from prefixattn.testing.timm import images, tiny

CLOSE = dict(rtol=2e-5, atol=2e-5)
SAME = dict(rtol=0, atol=0)
FREE = PrefixConfig(length=4, share="none")
DEEP = PrefixConfig(length=4, hidden=8)


def test_several_prefixes_take_turns():
    model = tiny("eva02")
    first, second = prefixattn.attach(model, FREE), prefixattn.attach(model, PrefixConfig(length=7, hidden=8))
    with torch.no_grad():
        of_second = model(images())
        first.activate()
        of_first = model(images())
        assert not torch.allclose(of_first, of_second, atol=1e-3) and first.is_active
        assert first.mass(images()).shape == (3, 3, 4, 10)
        first.detach()
        torch.testing.assert_close(model(images()), of_second, **SAME)
    second.detach()
    assert not model._forward_pre_hooks


def test_mass_is_the_weight_on_the_prefix():
    for family in ("vit", "eva02"):  # packed, and not
        model = tiny(family)
        prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none", layers=[1]))
        mass = prefix.mass(images())
        assert mass.shape == (1, 3, 4, 10) and ((mass > 0) & (mass < 1)).all()
        with torch.no_grad():
            for block in model.blocks:
                for parameter in block.attn.parameters():
                    parameter.zero_()  # every score is 0
        torch.testing.assert_close(prefix.mass(images()), torch.full((1, 3, 4, 10), 4 / 14), **CLOSE)


def test_dropout_is_per_sample_and_of_the_prefix_mode():
    model = tiny("vit")
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none", dropout=0.5))
    twice = images(1).expand(2, -1, -1, -1)
    out = model(twice)
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    prefix.eval()
    out = model(twice)
    torch.testing.assert_close(out[0], out[1], **CLOSE)
    assert not model.training


def test_the_models_own_dropout():
    model = tiny("vit", attn_drop_rate=0.5)
    prefix = prefixattn.attach(model, FREE)
    model.train()
    torch.manual_seed(0)
    first, second = model(images()), model(images())
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(model(images()), first, **SAME)
    model.eval()
    torch.testing.assert_close(model(images()), model(images()), **SAME)
    assert prefix.training


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_copies_have_prefixes_of_their_own(family, copying):
    model = tiny(family)
    prefix = prefixattn.attach(model, DEEP)
    model.forward_intermediates(images(), indices=[0], stop_early=True)  # a pass that was left has nothing to copy
    copied = copying(model)
    theirs = attached(copied)
    assert theirs is not prefix and theirs._adapter.model is copied
    torch.testing.assert_close(copied(images()), model(images()), **SAME)
    with torch.no_grad():
        theirs.encoder.embedding.weight.add_(1.0)
    assert not torch.allclose(copied(images()), model(images()), atol=1e-3)
    theirs.detach()
    assert not copied._forward_pre_hooks and model._forward_pre_hooks
    with prefix.disabled():
        torch.testing.assert_close(copied.requires_grad_(False)(images()), model(images()), **SAME)


@pytest.mark.parametrize("choices", [DEEP, PrefixConfig(length=4, share="simple"), FREE])
def test_saved_and_loaded(tmp_path, choices):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = tiny("eva02")
    prefix = prefixattn.attach(model, choices)
    expected = model(images())
    prefix.save_pretrained(tmp_path / "whole")
    prefix.save_pretrained(tmp_path / "folded", folded=True)
    prefix.detach()
    for folder in ("whole", "folded"):
        loaded = prefixattn.load(model, tmp_path / folder)
        torch.testing.assert_close(model(images()), expected, **CLOSE)
        loaded.detach()
    with pytest.raises(ValueError, match="model_type='Eva', here 'VisionTransformer'"):
        prefixattn.load(tiny("vit"), tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["torch", "factored"])
def test_the_head_trains_beside_the_prefix(optimizer):
    model = tiny("vit")
    prefix = prefixattn.attach(model, DEEP)
    model.head.requires_grad_(True)
    head = list(model.head.parameters())
    before = [t.detach().clone() for t in (*head, *prefix.parameters())]
    labels = torch.tensor([0, 1, 2])
    if optimizer == "torch":
        step = torch.optim.SGD([*head, *prefix.parameters()], lr=0.1, momentum=0.9)
    else:
        groups = [{"params": prefix}, {"params": head, "lr": 0.05, "weight_decay": 0.0}]
        step = prefixattn.FactoredSGD(groups, lr=0.1, momentum=0.9)
    losses = []
    for _ in range(8):
        step.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images()), labels)
        loss.backward()
        step.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = [*head, *prefix.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    others = [p for name, p in model.named_parameters() if not name.startswith("head")]
    assert all(p.grad is None and not p.requires_grad for p in others)


def test_factored_optimizers_equal_torchs_under_checkpoints():
    finals = []
    for factored in (False, True):
        model = tiny("vit")
        model.set_grad_checkpointing(factored)
        torch.manual_seed(0)
        prefix = prefixattn.attach(model, DEEP)
        step = prefixattn.FactoredSGD(prefix, lr=0.1) if factored else torch.optim.SGD(prefix.parameters(), lr=0.1)
        for _ in range(3):
            step.zero_grad()
            model(images()).square().mean().backward()
            step.step()
        finals.append(prefix().detach())
    torch.testing.assert_close(*finals, **CLOSE)
