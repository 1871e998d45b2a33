"""Prefixes in every family of Hugging Face models, against concatenation."""

import pytest
import torch
from torch import nn

import prefixattn
from prefixattn import PrefixConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from prefixattn.testing.models import (  # noqa: E402
    DECODERS,
    ENCODER_DECODERS,
    FAMILIES,
    concat_twin,
    model_inputs,
    tiny,
    token_ids,
)

CLOSE = dict(rtol=2e-5, atol=2e-5)
METHODS = {
    "deep": dict(length=5, hidden=16),
    "simple": dict(length=5, share="simple"),
    "none": dict(length=5, share="none"),
    "first": dict(length=5, share="none", layers="first"),
}


def shift(prefix):
    """Keyword arguments for a twin whose positions must start where the prefix ends."""
    if prefix.config.positions == "unshifted":
        return {}
    return {"position_ids": torch.arange(9)[None] + prefix.config.length}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_concatenation_with_its_gradients(family, method):
    model, inputs = tiny(family), model_inputs(family)
    prefix = prefixattn.attach(model, PrefixConfig(**METHODS[method]))
    twin = concat_twin(model, prefix)
    expected = twin(**inputs, **shift(prefix)).logits
    expected.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    out = model(**inputs).logits
    out.square().mean().backward()
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close({name: p.grad for name, p in prefix.named_parameters()}, wanted, **CLOSE)
    assert all(g.abs().sum() > 0 for g in wanted.values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_and_disabled_give_the_plain_model(family):
    model, inputs = tiny(family), model_inputs(family)
    with torch.no_grad():
        plain = model(**inputs).logits
        prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none"))
        assert not torch.equal(model(**inputs).logits, plain)
        with prefix.disabled():
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)
        prefix.detach()
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(module, "prefix_slot") for module in model.modules())


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS, "bert", "roberta"])
def test_padding_takes_no_part(family):
    model, ids = tiny(family), token_ids()
    prefixattn.attach(model, PrefixConfig(length=4, share="none"))
    side = {"decoder_input_ids": token_ids(3, 6, seed=2)} if family in ENCODER_DECODERS else {}
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[:, 9:] = 0
    padded = nn.functional.pad(ids, (0, 4), value=7)
    positions = {"position_ids": torch.arange(13)[None]} if family == "roberta" else {}
    same = {"position_ids": torch.arange(9)[None]} if family == "roberta" else {}
    with torch.no_grad():
        whole = model(input_ids=padded, attention_mask=mask, **side, **positions).logits
        alone = model(input_ids=ids, **side, **same).logits
    if family in DECODERS:
        whole = whole[:, :9]
    torch.testing.assert_close(whole, alone, **CLOSE)


def test_an_encoder_decoder_has_three_prefixes_of_its_own_depths():
    model, inputs = tiny("bart"), model_inputs("bart")
    prefix = prefixattn.attach(model, PrefixConfig(length=5, hidden=8))
    assert prefix.geometry.kinds == {"encoder": 3, "decoder": 2, "cross": 2}
    assert prefix().shape == (7, 2, 4, 5, 8) and len(prefix.encoder.networks) == 3
    prefix.detach()
    equal = prefixattn.attach(tiny("bart", encoder_layers=2), PrefixConfig(length=5, hidden=8))
    assert equal.encoder.networks == 3 and equal().shape == (6, 2, 4, 5, 8)  # one op for the three networks
    with torch.no_grad():
        seen = [model(**inputs).logits]
        for kind in ("encoder", "decoder", "cross"):
            one = prefixattn.attach(model, PrefixConfig(length=5, share="none", attentions=[kind]))
            assert len(one.slots) == prefix.geometry.kinds[kind]
            seen.append(model(**inputs).logits)
            one.detach()
    assert all(not torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_images_get_the_published_networks():
    prefix = prefixattn.attach(tiny("vit"), PrefixConfig(length=5))
    assert (prefix.config.network, prefix.config.hidden, prefix.config.positions) == ("per_layer", 48, "unshifted")
    assert prefix.encoder.networks == 2 and prefix.encoder.form.interleaved
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5  # VPT's
    rows = prefix.encoder.embedding.weight
    assert 0.9 * bound < rows.abs().max() <= bound


def test_layers_have_lengths_of_their_own():
    model, ids = tiny("llama"), token_ids()
    prefix = prefixattn.attach(model, PrefixConfig(length=[3, 6], share="none"))
    assert prefix.num_parameters(kept=True) == (3 + 6) * 2 * 2 * 8
    twin = concat_twin(model, prefix)
    out, expected = model(ids).logits, twin(ids, position_ids=torch.arange(9)[None] + 6).logits
    torch.testing.assert_close(out, expected, **CLOSE)
    out.sum().backward()
    assert (
        prefix.encoder.bank.grad[0, :, :, 3:].abs().sum() == 0 and prefix.encoder.bank.grad[1, :, :, 3:].abs().sum() > 0
    )
    with pytest.raises(ValueError, match="length names 3 lengths for 2 layers with a prefix"):
        prefixattn.attach(tiny("llama"), PrefixConfig(length=[1, 2, 3]))


def test_a_gate_multiplies_its_layer_and_learns():
    model, ids = tiny("llama"), token_ids()
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none", gate=True))
    ungated = prefix().detach().clone()
    with torch.no_grad():
        prefix.gate[1] = 0.5
    torch.testing.assert_close(prefix()[1], 0.5 * ungated[1])
    model(ids).logits.square().mean().backward()
    assert (prefix.gate.grad.abs() > 0).all()
    with torch.no_grad():
        gated = model(ids).logits
        prefix.fold()
        torch.testing.assert_close(model(ids).logits, gated, **CLOSE)
    assert prefix.gate is None and not prefix.config.gate


INITS = {
    "zero_free": (dict(share="none", init="zero"), lambda p: p().abs().max() == 0),
    "zero_deep": (dict(hidden=8, init="zero"), lambda p: p().abs().max() == 0),
    "zero_simple": (dict(share="simple", init="zero"), lambda p: p.encoder.vectors.abs().max() == 0),
    "uniform": (dict(share="none", init="uniform"), lambda p: 0.25 < p().abs().max() <= (3 / 32) ** 0.5),
    "normal": (dict(share="none", init="normal"), lambda p: p().abs().max() > 2),
}


@pytest.mark.parametrize("case", INITS)
def test_starts(case):
    choices, holds = INITS[case]
    torch.manual_seed(0)
    prefix = prefixattn.attach(tiny("llama"), PrefixConfig(length=8, **choices))
    assert holds(prefix)
    tiny_step = torch.optim.SGD(prefix.parameters(), lr=0.1)
    model, ids = prefix._adapter.model, token_ids()
    before = prefix().detach().clone()
    model(ids).logits.square().mean().backward()
    tiny_step.step()
    assert not torch.equal(before, prefix())  # it can leave the point where it starts


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "bart", "t5"])
def test_a_text_is_copied_and_fitted(family):
    model, ids = tiny(family), [5, 9, 3]
    copied = prefixattn.attach(model, PrefixConfig(share="none", init=ids))
    bank = copied().detach().clone()
    assert copied.config.length == 3 and bank.shape[3] == 3
    copied.detach()
    fitted = prefixattn.attach(model, PrefixConfig(share="deep", hidden=32, init=ids))
    error = (fitted() - bank).square().mean() / bank.square().mean()
    assert error < 1e-3
    if family in DECODERS:  # the text in front, or its keys and values as a prefix: the same
        fitted.detach()
        prefixattn.attach(model, PrefixConfig(share="none", init=ids))
        tokens = token_ids()
        with torch.no_grad():
            out = model(tokens).logits
            model_alone = tiny(family)
            expected = model_alone(torch.cat([torch.tensor([ids]).expand(3, -1), tokens], 1)).logits[:, 3:]
        torch.testing.assert_close(out, expected, **CLOSE)


def test_mass_is_the_weight_on_the_prefix(tmp_path):
    model, inputs = tiny("llama"), model_inputs("llama")
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none", layers=[1]))
    with torch.no_grad():
        mass = prefix.mass(**inputs)
        assert mass.shape == (1, 3, 4, 9) and ((mass > 0) & (mass < 1)).all()
        prefix.encoder.bank[:, 0] = 0  # every prefix key scores 0
        model.model.layers[1].self_attn.k_proj.weight.zero_()  # and so does every own key
    expected = 4 / (4 + torch.arange(1, 10)).expand(1, 3, 4, 9)
    mass = prefix.mass(**inputs)
    torch.testing.assert_close(mass, expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(prefix.mass(**inputs), mass)  # nothing of it stays behind
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no heat map")
    prefix.plot_mass(mass, tmp_path / "mass.png")
    assert (tmp_path / "mass.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"mass has shape \[2, 3\], expected \[N=1, B, H, L\]"):
        prefix.plot_mass(torch.zeros(2, 3), tmp_path / "mass.png")
    assert prefixattn.attach(model, PrefixConfig(length=2, share="none")).is_active
    with pytest.raises(ValueError, match="not the model's active one"):
        prefix.mass(**inputs)


def test_mass_of_an_encoder_decoder_is_asked_by_kind():
    model, inputs = tiny("bart"), model_inputs("bart")
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none", attentions=["cross"]))
    assert prefix.mass(**inputs).shape == (2, 3, 4, 6)
    prefix.detach()
    with pytest.raises(ValueError, match="queries differ in number"):
        prefixattn.attach(model, PrefixConfig(length=4, share="none")).mass(**inputs)


class Unreached(nn.Module):
    """An attention layer that leaves the arguments of the model's forward pass behind."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *args, prefix_call=None, **kwargs):
        return self.attention(*args, **kwargs)


def test_a_model_whose_layers_the_prefix_does_not_reach_is_refused():
    model, ids = tiny("llama"), token_ids()
    with torch.no_grad():
        plain = model(ids).logits
    for block in model.model.layers:
        block.self_attn = Unreached(block.self_attn)
    with pytest.raises(NotImplementedError, match=r"self_attn\.attention does not get"):
        prefixattn.attach(model, PrefixConfig(length=3))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters()) and not model.model._forward_pre_hooks


def other(name, config, **sizes):
    torch.manual_seed(0)
    common = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return getattr(transformers, name)(getattr(transformers, config)(**common | sizes)).eval()


TEXT, IMAGE = dict(vocab_size=50), dict(image_size=16, patch_size=8)
# models that nothing was written for
OTHERS = {
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT | dict(pad_token_id=0)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "electra": ("ElectraModel", "ElectraConfig", TEXT | dict(embedding_size=32)),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | dict(num_local_experts=2, num_key_value_heads=2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_nothing_was_written_for(name):
    cls, config, sizes = OTHERS[name]
    model = other(cls, config, **sizes)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if "image_size" in sizes else {"input_ids": token_ids()}
    with torch.no_grad():
        plain = model(**inputs)[0]
    prefix = prefixattn.attach(model, PrefixConfig(length=3, hidden=8))
    out = model(**inputs)[0]
    assert prefix.geometry.kinds == {"self": 2} and not torch.equal(out, plain)
    out.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in prefix.parameters())
    with pytest.raises(NotImplementedError, match=r"share='simple' does not know how a .* makes keys and values"):
        prefixattn.attach(model, PrefixConfig(length=3, share="simple"))


REFUSED = {
    "own_attention": ("BloomModel", "BloomConfig", dict(n_layer=2, n_head=4), "none of its layers calls"),
    "no_attention": ("MambaModel", "MambaConfig", {}, "none of its layers calls"),
    "another_call": ("FalconModel", "FalconConfig", {}, "FalconModel: it has an attention of its own"),
    "passes_nothing_on": (
        "SiglipTextModel",
        "SiglipTextConfig",
        dict(bos_token_id=1, eos_token_id=2),
        "does not pass on",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_reached_is_refused_and_left_as_it_was(case):
    cls, config, sizes, words = REFUSED[case]
    model = other(cls, config, vocab_size=50, **sizes)
    with torch.no_grad():
        plain = model(token_ids())[0]
    with pytest.raises(NotImplementedError, match=words):
        prefixattn.attach(model, PrefixConfig(length=3))
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids())[0], plain, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_pre_hooks
