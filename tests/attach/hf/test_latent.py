"""DeepSeek V2 and V3: values of another width than keys, a cache of latent vectors; training, files, refusals."""

import json

import pytest
import torch

import prefixattn
from prefixattn import FactoredAdamW, PrefixBank, PrefixConfig, PrefixPlusConfig

pytest.importorskip("transformers", reason="transformers is not installed")

from prefixattn.attach.hf import interface
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import DeepShare
from prefixattn.testing.models import concat_twin, tiny, token_ids

CLOSE = dict(rtol=2e-5, atol=2e-5)
FAMILIES = ("deepseek_v2", "deepseek_v3")
# the released models' heads; a dense layer, and one of experts
REAL = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.1,
}
PLAIN_ROPE = {"rope_interleave": False}
D, DV = 16, 12  # of the small ones, with 4 heads
CHOICES = {
    "deep": PrefixConfig(3, hidden=8),
    "simple": PrefixConfig(3, share="simple"),
    "none": PrefixConfig(3, share="none", gate=True),
    "lengths": PrefixConfig([2, 3], share="none"),
    "plus": PrefixPlusConfig(init="normal"),
    "plus_width": PrefixPlusConfig(phi="mlp", per="width", init="normal"),
}


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_192_and_128_train_and_generate(family):
    model, ids = tiny(family, **REAL), token_ids(2)
    prefix = prefixattn.attach(model, PrefixConfig(4, hidden=8))
    assert (prefix.geometry.head_dim, prefix.geometry.value_dim) == (192, 128)
    twin = concat_twin(model, prefix)
    expected = twin(ids, position_ids=torch.arange(9)[None] + 4, use_cache=False).logits
    expected.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    out = model(ids, use_cache=False).logits
    out.square().mean().backward()
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close({name: p.grad for name, p in prefix.named_parameters()}, wanted, **CLOSE)
    assert all(g.abs().sum() > 0 for g in wanted.values())
    # steps of decoding, behind a cache of latent vectors
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :6], use_cache=True)
        steps = [model(ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(6, 9)]
    torch.testing.assert_close(torch.cat([first.logits, *steps], 1), whole, **CLOSE)


@pytest.mark.parametrize("choice", CHOICES)
def test_is_saved_and_loaded(choice, tmp_path):
    model, ids = tiny("deepseek_v3"), token_ids(2)
    prefix = prefixattn.attach(model, CHOICES[choice])
    if choice == "none":
        prefix.gate.data[1] = 0.5
    out = logits_of(model, ids)
    prefix.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "prefix.json").read_text())["model"]["value_dim"] == DV
    again = tiny("deepseek_v3")
    loaded = prefixattn.load(again, tmp_path)
    torch.testing.assert_close(loaded.state_dict(), prefix.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(logits_of(again, ids), out, rtol=0, atol=0)
    if not choice.startswith("plus"):
        prefix.save_pretrained(tmp_path, folded=True)
        third = tiny("deepseek_v3")
        assert prefixattn.load(third, tmp_path).folded
        torch.testing.assert_close(logits_of(third, ids), out, **CLOSE)


def test_keys_and_values_lie_side_by_side_and_are_counted():
    model = tiny("deepseek_v3")
    prefix = prefixattn.attach(model, PrefixConfig(3, share="none", init="zero"))
    assert prefix().shape == prefix.encoder.bank.shape == (2, 1, 4, 3, D + DV)
    assert prefix.num_parameters() == prefix.num_parameters(kept=True) == 2 * 4 * 3 * (D + DV)
    with torch.no_grad():
        prefix.encoder.bank[..., D:] = 1.0
    keys, values = zip(*prefix.layer_prefixes(torch.float32, torch.device("cpu")), strict=True)
    assert all(k.shape == (4, 3, D) and not k.any() for k in keys)
    assert all(v.shape == (4, 3, DV) and (v == 1).all() for v in values)
    prefix.detach()
    deep = prefixattn.attach(model, PrefixConfig(3, hidden=8))
    assert deep.encoder.up.weight.shape == (2 * 4 * (D + DV), 8) and deep().shape == (2, 1, 4, 3, D + DV)
    folded = deep().detach()
    assert torch.equal(deep.fold()(), folded) and deep.num_parameters(kept=True) == 2 * 4 * 3 * (D + DV)


def test_a_network_makes_of_each_head_key_and_value():
    prefix = prefixattn.attach(tiny("deepseek_v3"), PrefixConfig(3, hidden=8))
    x, w1, b1, w2, b2 = prefix.encoder.parameters_in_order()
    rows = torch.tanh(x @ w1.T + b1) @ w2.T + b2  # [P, O]
    expected = rows.view(3, 2, 4, D + DV).permute(1, 2, 0, 3)[:, None]
    torch.testing.assert_close(prefix(), expected)
    prefix.encoder.fused = False
    torch.testing.assert_close(prefix(), expected)


@pytest.mark.parametrize("family, sizes", [("deepseek_v2", {}), ("deepseek_v3", {}), ("deepseek_v3", PLAIN_ROPE)])
def test_a_vector_becomes_what_a_token_at_the_first_place_becomes(family, sizes):
    """There a rotation turns nothing."""
    model, token = tiny(family, **sizes), token_ids(1, 1)
    prefix = prefixattn.attach(model, PrefixConfig(1, share="simple"))
    with torch.no_grad(), interface.watched() as calls, prefix._adapter.overriding(interface.PLAIN):
        model(token, use_cache=False)
        prefix.encoder.vectors[0] = model.model.embed_tokens(token[0])
    key, value = prefix.layer_prefixes(torch.float32, torch.device("cpu"))[0]
    torch.testing.assert_close(key, calls[0].key[0])
    torch.testing.assert_close(value, calls[0].value[0])


def test_the_optimizer_owns_the_network():
    """Its steps are those of torch's AdamW."""
    ids, found = token_ids(2), []
    for optimizer in (FactoredAdamW, torch.optim.AdamW):
        model = tiny("deepseek_v3")
        torch.manual_seed(3)
        prefix = prefixattn.attach(model, PrefixConfig(3, hidden=8))
        steps = optimizer(prefix if optimizer is FactoredAdamW else prefix.parameters(), lr=1e-2)
        for _ in range(3):
            steps.zero_grad()
            model(ids, use_cache=False).logits.square().mean().backward()
            steps.step()
        found.append(prefix().detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_banks_and_combinations_of_them(tmp_path):
    model, ids = tiny("deepseek_v3"), token_ids(2)
    singles = [prefixattn.attach(model, PrefixConfig(n, share="none")) for n in (2, 4)]
    alone = []
    for single in singles:
        single.activate()
        alone.append(logits_of(model, ids))
    joined = prefixattn.combine(model, singles)
    assert joined().shape == (2, 1, 4, 6, D + DV)
    torch.testing.assert_close(joined()[..., 2:, :], singles[1](), rtol=0, atol=0)
    bank = PrefixBank.of(model, singles)
    bank.save_pretrained(tmp_path)
    again = tiny("deepseek_v3")
    opened = PrefixBank.open(again, tmp_path)
    opened.set(0, bank.get(1))
    torch.testing.assert_close(opened.get(0), singles[1].encoder.bank, rtol=0, atol=0)
    with torch.no_grad():
        mixed = model(ids, prefix_ids=torch.tensor([0, 1]), use_cache=False).logits
        both = again(ids, prefix_ids=torch.tensor([0, 1]), use_cache=False).logits
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), **CLOSE)
    torch.testing.assert_close(both, alone[1], **CLOSE)
    assert bank.num_parameters(kept=True) == (2 + 4) * 2 * 4 * (D + DV)
    with pytest.raises(ValueError, match=r"expected \[N=2, 1, Hkv=4, n, D=28\]"):
        bank.set(0, torch.zeros(2, 2, 4, 2, D))


def test_packed_sequences_are_what_each_is_alone():
    model, lengths = tiny("deepseek_v3"), (3, 6)
    prefixattn.attach(model, PrefixConfig(3, share="none"))
    rows = [token_ids(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        together = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, torch.cat([logits_of(model, row) for row in rows], 1), **CLOSE)


def test_files_of_other_widths_are_refused(tmp_path):
    prefixattn.attach(tiny("deepseek_v3"), PrefixConfig(3, share="none")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of a prefix for another model: value_dim=12, here 8$"):
        prefixattn.load(tiny("deepseek_v3", v_head_dim=8), tmp_path)
    with pytest.raises(ValueError, match=r"of a prefix for another model: value_dim=12, here 16$"):
        prefixattn.load(tiny("deepseek_v3", v_head_dim=16), tmp_path)
    prefixattn.attach(tiny("deepseek_v3", v_head_dim=16), PrefixConfig(3, share="none")).save_pretrained(tmp_path)
    assert "value_dim" not in json.loads((tmp_path / "prefix.json").read_text())["model"]  # as files were before
    with pytest.raises(ValueError, match=r"of a prefix for another model: value_dim=16, here 12$"):
        prefixattn.load(tiny("deepseek_v3"), tmp_path)


def test_what_cannot_be_done_is_refused_by_name(tmp_path):
    prefix = prefixattn.attach(tiny("deepseek_v3"), PrefixConfig(3, share="none"))
    words = "deepseek_v3 has keys of width 16 and values of width 12; an adapter of PEFT has one width for both: save_"
    with pytest.raises(NotImplementedError, match=words):
        prefix.export_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(NotImplementedError, match=words):
        prefixattn.load(tiny("deepseek_v3"), tmp_path)
    odd = Geometry("toy", layers=2, kv_heads=3, head_dim=8, width=16, value_dim=4)
    words = "share='deep' with keys of width 8, values of width 4 and Hkv=3 key heads; it takes an even number"
    with pytest.raises(NotImplementedError, match=words):
        DeepShare(2, 3, 4, odd)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_latent_vectors_holds_no_prefix(family, tmp_path):
    prefix = prefixattn.attach(tiny(family), PrefixConfig(3, share="none"))
    for served in (prefix.to_cache, lambda: prefix.export_cache(tmp_path)):
        with pytest.raises(NotImplementedError, match="may hold something else than keys and values: "):
            served()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_that_draft_several_tokens_change_nothing_in_what_is_written(layers, monkeypatch):
    """Multi-token prediction: generate(use_mtp=True). The drafting layers have no prefix; the model itself decides."""
    modeling = pytest.importorskip("transformers.modeling_layers", reason="this transformers has no drafting layers")
    model, ids = tiny("deepseek_v3", num_mtp_layers=layers), token_ids(1)
    drafts = []

    def random_weights(main, *args, **kwargs):  # a checkpoint's would be read from disk
        torch.manual_seed(1)
        drafting = modeling.MtpModel(main, layers).eval()
        drafting.register_forward_hook(lambda *call: drafts.append(call[-1]))
        return drafting

    monkeypatch.setattr(modeling.MtpModel, "from_pretrained", random_weights)
    options = dict(min_new_tokens=12, max_new_tokens=12, do_sample=False)
    plain = model.generate(ids, **options)
    prefixattn.attach(model, PrefixConfig(5, share="none"))
    written = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_mtp=True, **options), written)
    assert drafts and not torch.equal(written, plain)
