"""Training a prefix in GPT-2: checkpoints, dropout, compilers and half precision."""

import pytest
import torch
from torch import Tensor, nn

import prefixattn
from prefixattn import Prefix, PrefixConfig

pytest.importorskip("transformers")
from prefixattn.testing.models import tiny_gpt2, token_ids

P = 5
CLOSE = dict(rtol=1e-5, atol=1e-5)
# dynamo makes a context for each autograd function in a way that torch itself warns of
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
CONFIGS = {
    "deep": PrefixConfig(length=P, hidden=16),
    "deep_first": PrefixConfig(length=P, hidden=16, layers="first"),
    "simple": PrefixConfig(length=P, share="simple"),
    "none": PrefixConfig(length=P, share="none"),
}


def gradients(prefix: Prefix) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    return grads


def checkpoint_layers(model: nn.Module, reentrant: bool) -> None:
    # The newer name is missing from older transformers, the older deprecated by newer ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("case", ["deep", "simple", "none", "deep_first"])
def test_gradient_checkpointing_gives_identical_gradients(case, reentrant):
    ids = token_ids()
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    prefix = prefixattn.attach(model, CONFIGS[case])
    runs = []
    prefix.encoder.register_forward_hook(lambda *_: runs.append(1))
    model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = gradients(prefix)
    checkpoint_layers(model, reentrant)
    for step in range(2, 4):
        # Another forward before the backward: what a layer meets when it is run again is its own forward's.
        loss = model(ids, labels=ids, use_cache=False).loss
        with prefix.disabled(), torch.no_grad():
            model.eval()(ids.flip(0), use_cache=False)
        model.train()
        loss.backward()
        assert len(runs) == step
        torch.testing.assert_close(gradients(prefix), wanted, rtol=0, atol=0)


def test_a_second_backward_through_reentrant_checkpoints_adds_as_much_again():
    ids = token_ids()
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    prefix = prefixattn.attach(model, CONFIGS["deep"])
    checkpoint_layers(model, reentrant=True)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    loss.backward()
    torch.testing.assert_close(gradients(prefix), {name: 2 * g for name, g in once.items()}, **CLOSE)


def test_checkpointing_repeats_the_prefix_dropout():
    ids = token_ids()
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    prefix = prefixattn.attach(model, PrefixConfig(length=P, hidden=16, dropout=0.5))
    found = []
    for reentrant in (None, True, False):
        if reentrant is not None:
            checkpoint_layers(model, reentrant)
        torch.manual_seed(3)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(gradients(prefix))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


@COMPILES
@pytest.mark.parametrize("case", ["deep", "simple"])
def test_compiles_as_one_graph_with_its_backward(case):
    torch._dynamo.reset()
    model, ids = tiny_gpt2(), token_ids()
    prefix = prefixattn.attach(model, CONFIGS[case])
    eager = model(ids, labels=ids)
    eager.loss.backward()
    wanted = gradients(prefix)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False)
    out.loss.backward()
    torch.testing.assert_close(out.logits, eager.logits, **CLOSE)
    torch.testing.assert_close(gradients(prefix), wanted, **CLOSE)


def test_the_modes_of_model_and_prefix_are_apart():
    model = tiny_gpt2()
    prefix = prefixattn.attach(model, PrefixConfig(length=P, hidden=16, dropout=0.5))
    assert prefix.training and not model.training
    prefix.eval()
    model.train()
    assert model.training and not prefix.training


def test_prefix_dropout_has_a_mask_for_each_sample_and_follows_the_seed():
    model, ids = tiny_gpt2(), token_ids(1).repeat(2, 1)
    prefix = prefixattn.attach(model, PrefixConfig(length=P, hidden=16, dropout=0.5))
    torch.manual_seed(1)
    first = model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(first[0], first[1])
    prefix.eval()
    calm = model(ids).logits
    assert torch.equal(calm[0], calm[1])


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_a_float32_prefix_trains_in_a_half_precision_model(way):
    model, ids = tiny_gpt2(), token_ids()
    exact = prefixattn.attach(model, CONFIGS["deep"])
    wanted = model(ids).logits
    if way == "bfloat16":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in exact.parameters())
    error = (out.logits.float() - wanted).norm() / wanted.norm()
    assert error < 0.03, f"relative error {error:.1e}; bfloat16 resolves 4e-3"
