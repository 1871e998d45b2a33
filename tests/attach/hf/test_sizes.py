"""Layers of several sizes (Gemma 4): one tensor holds all prefixes, and each layer reads the part that fits it."""

import pytest
import torch

import prefixattn
from prefixattn import FactoredAdamW, PrefixBank, PrefixConfig, PrefixPlusConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from prefixattn.prefixes.geometry import Geometry  # noqa: E402
from prefixattn.testing.models import token_ids  # noqa: E402

P, L = 4, 9
CLOSE = dict(rtol=2e-5, atol=2e-5)
SIZES = [(2, 8), (1, 16)]  # Hkv and D by layer


def model_of(seed=0):
    torch.manual_seed(seed)
    return transformers.Gemma4ForCausalLM(
        transformers.Gemma4TextConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, per_layer_config={"1": {"head_dim": 16, "num_key_value_heads": 1}},
            layer_types=["sliding_attention", "full_attention"], sliding_window=5, hidden_size_per_layer_input=0,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(use_cache=False, **inputs).logits


def test_what_a_layer_does_not_read_gets_no_gradient_and_is_not_counted():
    model = model_of()
    prefix = prefixattn.attach(model, PrefixConfig(P, share="none"))
    assert prefix.geometry.sizes == ((2, 8, 8), (1, 16, 16))
    assert prefix().shape == (2, 2, 2, P, 16)  # the largest of each
    assert prefix.num_parameters(kept=True) == P * sum(2 * Hkv * D for Hkv, D in SIZES)
    model(token_ids()).logits.square().mean().backward()
    for grad, (Hkv, D) in zip(prefix.encoder.bank.grad, SIZES, strict=True):
        read = grad.new_zeros(grad.shape, dtype=torch.bool)
        read[:, :Hkv, :, :D] = True
        assert (grad[read] != 0).all() and not grad[~read].any()


@pytest.mark.parametrize("share", ["deep", "none"])
def test_files_hold_it_and_tell_another_model_from_it(share, tmp_path):
    model, ids = model_of(), token_ids()
    prefix = prefixattn.attach(model, PrefixConfig(P, share=share, hidden=8))
    expected = logits_of(model, input_ids=ids)
    prefix.save_pretrained(tmp_path / "prefix")
    prefix.detach()
    prefixattn.load(model, tmp_path / "prefix")
    torch.testing.assert_close(logits_of(model, input_ids=ids), expected, rtol=0, atol=0)
    config = model.config
    config.per_layer_config = {"1": {"head_dim": 8, "num_key_value_heads": 1}}
    other = transformers.Gemma4ForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"of a prefix for another model|describes the model as"):
        prefixattn.load(other, tmp_path / "prefix")


def test_an_optimizer_owns_the_network():
    model, ids = model_of(), token_ids()
    prefix = prefixattn.attach(model, PrefixConfig(P, hidden=8))
    optimizer = FactoredAdamW(prefix, lr=0.05)
    losses = []
    for _ in range(5):
        loss = prefixattn.labelled_loss(model, input_ids=ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_text_is_copied():
    model, text = model_of(), [5, 9, 3]
    prefixattn.attach(model, PrefixConfig(share="none", init=text))
    ids = token_ids(3, 2)  # the window of 5 sees the text and these
    found = logits_of(model, input_ids=ids)
    whole = logits_of(model_of(), input_ids=torch.cat([torch.tensor([text]).expand(3, -1), ids], 1))
    torch.testing.assert_close(found, whole[:, 3:], **CLOSE)


def test_a_bank_gives_each_sample_its_own():
    model, ids = model_of(), token_ids()
    prefix = prefixattn.attach(model, PrefixConfig(P, share="none", count=2))
    mixed = logits_of(model, input_ids=ids, prefix_ids=torch.tensor([1, 0, 1]))
    for row in (0, 1):
        alone = logits_of(model, input_ids=ids, prefix_ids=torch.full((3,), row))
        torch.testing.assert_close(mixed[1 - row :: 2][:1], alone[1 - row :: 2][:1], **CLOSE)
    assert isinstance(prefix, PrefixBank) and not torch.allclose(mixed[:1], mixed[1:2], **CLOSE)


def test_a_cache_holds_each_layers_part():
    model, ids = model_of(), token_ids(1, 1)
    prefix = prefixattn.attach(model, PrefixConfig(P, share="none"))
    expected = logits_of(model, input_ids=ids)
    cache = prefix.to_cache(1, tokens=1)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, Hkv, P, D) for Hkv, D in SIZES]
    with prefix.disabled(), torch.no_grad():
        found = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_prompts_are_shared():
    model = model_of()
    prefix = prefixattn.attach(model, PrefixConfig(P, share="none"))
    prompt, rest = token_ids(1, 2), token_ids(2, 3, seed=5)
    whole = logits_of(model, input_ids=torch.cat([prompt.expand(2, -1), rest], 1))[:, 2:]
    with torch.no_grad(), prefixattn.SharedPrompt(model)(prompt):
        found = model(rest, prefix_ids=torch.zeros(2, dtype=torch.int64)).logits
    torch.testing.assert_close(found, whole, **CLOSE)
    assert prefix.is_active


def test_what_has_one_size_is_refused_by_name():
    model = model_of()
    with pytest.raises(NotImplementedError, match=r"layers of gemma4_text have keys of several sizes.*PrefixConfig is"):
        prefixattn.attach(model, PrefixPlusConfig())


def test_a_geometry_of_one_size_says_nothing_of_sizes():
    one = Geometry("llama", 2, 2, 8, 32)
    assert "sizes" not in one.to_dict() and one.of(1) == (2, 8, 8)
    key = torch.randn(2, 3, 8)
    assert torch.equal(one.joined(key, key), torch.stack([key, key]))
