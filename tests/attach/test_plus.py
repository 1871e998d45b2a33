"""Prefix-Tuning+ in models: phi(q) M on the attention's output, against plain PyTorch."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import prefixattn
from prefixattn import PrefixConfig, PrefixPlusConfig

pytest.importorskip("transformers", reason="transformers is not installed")

from prefixattn.attach import attached
from prefixattn.testing.models import FAMILIES, concatenate, model_inputs, tiny, token_ids

CLOSE = dict(rtol=2e-5, atol=2e-5)
PHI = {"elu": F.elu, "gelu": F.gelu, "relu": torch.relu, "none": lambda t: t}
CASES = {
    "elu": PrefixPlusConfig(init="normal"),
    "gelu": PrefixPlusConfig(phi="gelu", init="normal"),
    "first": PrefixPlusConfig(phi="relu", layers="first", init="normal"),
    "width": PrefixPlusConfig(per="width", init="normal"),
    "mlp": PrefixPlusConfig(phi="mlp", hidden=5, init="normal"),
    "mlp_width": PrefixPlusConfig(phi="mlp", per="width", init="normal"),
}


def added(memory, q):
    """What a layer adds, [B, L, H, Dv], by the paper's formula and head by head."""
    B, H, L, _ = q.shape
    heads = [q[:, h] for h in range(H)] if len(memory.matrix) == H else [q.transpose(1, 2).flatten(2)]
    outs = []
    for h, rows in enumerate(heads):
        if memory.weight is None:
            features = PHI[memory.phi](rows)
        else:
            features = torch.relu(F.linear(rows, memory.weight[h], memory.bias[h]))
        outs.append(features @ memory.matrix[h])
    return torch.cat(outs, -1).view(B, L, H, -1)


def twin_of(model, plus):
    twin = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    twin.load_state_dict(model.state_dict())
    concatenate(twin)
    base = getattr(twin, twin.base_model_prefix, twin)
    for slot, memory in zip(plus.slots, plus(), strict=True):
        site = base.get_submodule(plus._adapter.sites[slot].path)
        site.reference_added = lambda q, memory=memory: added(memory, q)
    return twin


def gradients(plus, out):
    out.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in plus.named_parameters()}
    plus.zero_grad()
    return grads


# every case in two families, the paper's in all
PAIRS = [(family, case) for family in ("llama", "vit") for case in CASES]
PAIRS += [(family, "elu") for family in ("gpt2", *FAMILIES) if family not in ("llama", "vit")]


@pytest.mark.parametrize("family, case", PAIRS)
def test_adds_phi_of_q_times_m_with_its_gradients(family, case):
    model, inputs = tiny(family), model_inputs(family)
    torch.manual_seed(3)
    plus = prefixattn.attach(model, CASES[case])
    expected = twin_of(model, plus)(**inputs).logits
    wanted = gradients(plus, expected)
    out = model(**inputs).logits
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(gradients(plus, out), wanted, **CLOSE)
    assert all(g.abs().sum() > 0 for g in wanted.values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("case", ["elu", "width", "mlp"])
def test_starts_as_the_plain_model_and_learns(case):
    model, inputs = tiny("llama"), model_inputs("llama")
    with torch.no_grad():
        plain = model(**inputs).logits
    plus = prefixattn.attach(model, replace(CASES[case], init="zero"))
    out = model(**inputs).logits
    torch.testing.assert_close(out, plain, **CLOSE)
    optimizer = torch.optim.SGD(plus.parameters(), lr=0.1)
    F.cross_entropy(out.flatten(0, 1), inputs["input_ids"].flatten()).backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, plain, **CLOSE)
        with plus.disabled():
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)
        plus.detach()
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_gives_identical_gradients(reentrant, dtype):
    model, inputs = tiny("llama").to(dtype), model_inputs("llama")
    plus = prefixattn.attach(model, CASES["elu"])
    wanted = gradients(plus, model(**inputs, use_cache=False).logits.float())
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    out = model(**inputs, use_cache=False).logits.float()
    torch.testing.assert_close(gradients(plus, out), wanted, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", ["elu", "mlp_width"])
def test_compiles_as_one_graph_with_its_backward(case):
    torch._dynamo.reset()
    model, inputs = tiny("llama"), model_inputs("llama")
    plus = prefixattn.attach(model, CASES[case])
    eager = model(**inputs, use_cache=False).logits
    wanted = gradients(plus, eager)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).logits
    torch.testing.assert_close(out, eager, **CLOSE)
    torch.testing.assert_close(gradients(plus, out), wanted, **CLOSE)


def test_generates_as_it_decodes():
    model, ids = tiny("llama"), token_ids(2, 5)
    prefixattn.attach(model, CASES["elu"])
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", ["elu", "mlp_width"])
def test_comes_back_from_disk_and_from_a_copy(case, tmp_path):
    model, inputs = tiny("llama"), model_inputs("llama")
    plus = prefixattn.attach(model, CASES[case])
    plus.save_pretrained(tmp_path)
    loaded = prefixattn.load(tiny("llama"), tmp_path)
    assert loaded.config == CASES[case] and isinstance(loaded, prefixattn.PrefixPlus)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(loaded._adapter.model(**inputs).logits, expected, rtol=0, atol=0)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(**inputs).logits, expected, rtol=0, atol=0)
        for p in plus.parameters():
            p.mul_(2)
        assert not torch.equal(model(**inputs).logits, expected)
        plus.restore(tmp_path)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected one of PrefixPlusConfig"):
        prefixattn.attach(tiny("llama"), PrefixPlusConfig(layers="first")).restore(tmp_path)
    with pytest.raises(ValueError, match="is of a prefix for another model: layers=2, here 1"):
        prefixattn.load(tiny("llama", num_hidden_layers=1), tmp_path)


def test_takes_turns_with_a_prefix():
    model, inputs = tiny("llama"), model_inputs("llama")
    with torch.no_grad():
        prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none"))
        alone = model(**inputs).logits
        plus = prefixattn.attach(model, CASES["elu"])
        assert attached(model) is plus
        assert not torch.equal(model(**inputs).logits, alone)
        prefix.activate()
        torch.testing.assert_close(model(**inputs).logits, alone, rtol=0, atol=0)
    with pytest.raises(ValueError, match="prefix_ids chooses among the prefixes of a PrefixBank"):
        plus.activate()
        model(**inputs, prefix_ids=torch.zeros(3, dtype=torch.long))


REFUSED = {
    "phi": (dict(phi="tanh"), "phi is 'tanh', expected one of 'none', 'elu', 'gelu', 'relu', 'mlp'"),
    "per": (dict(per="layer"), "per is 'layer', expected one of 'head', 'width'"),
    "init": (dict(init="ones"), "init is 'ones', expected one of 'zero', 'normal'"),
    "hidden": (dict(phi="mlp", hidden=0), "hidden is 0, expected an integer from 1"),
    "hidden_elu": (dict(hidden=5), "hidden is 5 with phi='elu'; only phi='mlp' has features of its own"),
    "layers": (dict(layers=[]), r"layers is \[\], expected increasing layer indices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_config_is_refused_in_words(case):
    choices, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        PrefixPlusConfig(**choices)
