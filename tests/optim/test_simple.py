"""A simple share that an optimizer owns: its projections run once for a step, forward and backward."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.optim import FactoredAdamW, FactoredSGD
from prefixattn.optim.lazy_grad import DeferredGradient
from prefixattn.prefixes.networks import Projected
from prefixattn.testing.models import tiny_gpt2, token_ids

CONFIG = PrefixConfig(length=4, share="simple")


def attached(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = tiny_gpt2().to(dtype)
    torch.manual_seed(2)
    return model, prefixattn.attach(model, CONFIG)


def backward(model: Any, ids: Tensor, micro: int = 1) -> None:
    for part in ids.chunk(micro):
        (model(part, labels=part).loss * len(part) / len(ids)).backward()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often all projections ran, forward and backward."""
    counts = {"forward": 0, "backward": 0}
    projected, pull = prefixattn.prefixes.networks.SimpleShare._projected, Projected.pull

    def forward(*args: Any) -> Tensor:
        counts["forward"] += 1
        return projected(*args)

    def pulled(*args: Any) -> Tensor:
        counts["backward"] += 1
        return pull(*args)

    monkeypatch.setattr(prefixattn.prefixes.networks.SimpleShare, "_projected", forward)
    monkeypatch.setattr(Projected, "pull", pulled)
    return counts


@pytest.mark.parametrize("clip", ["", "max_norm", "torch", "scaler"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_equal_to_torchs_with_micro_batches(kind: str, clip: str, counted: dict[str, int]) -> None:
    ids = token_ids(batch=4)
    found = []
    for factored in (True, False):
        model, prefix = attached()
        max_norm = {"max_norm": 0.5} if factored and clip == "max_norm" else {}
        if kind == "adamw":
            optimizer: Any = (
                FactoredAdamW(prefix, lr=1e-2, **max_norm)
                if factored
                else torch.optim.AdamW(prefix.parameters(), lr=1e-2)
            )
        else:
            optimizer = (
                FactoredSGD(prefix, lr=1e-2, momentum=0.9, **max_norm)
                if factored
                else torch.optim.SGD(prefix.parameters(), lr=1e-2, momentum=0.9)
            )
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=clip == "scaler")
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(3):
            optimizer.zero_grad()
            for part in ids.chunk(2):
                scaler.scale(model(part, labels=part).loss / 2).backward()
            if clip == "scaler":
                scaler.unscale_(optimizer)
            if clip in ("torch", "scaler") or (clip and not factored):
                torch.nn.utils.clip_grad_norm_(prefix.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        found.append(prefix.encoder.vectors.detach())
        if factored:
            assert counted == {"forward": 3, "backward": 3}
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_made_when_it_is_read_and_added_to() -> None:
    ids, (model, prefix), (other, plain) = token_ids(batch=4), attached(), attached()
    optimizer = FactoredAdamW(prefix)
    for micro, net in ((2, other), (1, other)):
        backward(net, ids, micro)
    backward(model, ids, 2)
    grad = prefix.encoder.vectors.grad
    assert type(grad) is DeferredGradient
    first = grad.to_dense()
    backward(model, ids, 1)
    torch.testing.assert_close(2 * first, grad.to_dense(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad.to_dense(), plain.encoder.vectors.grad, rtol=1e-4, atol=1e-6)
    assert optimizer.param_groups


def test_kv_is_a_leaf_until_a_parameter_changes() -> None:
    ids, (model, prefix) = token_ids(), attached()
    optimizer = FactoredAdamW(prefix, lr=0.1)
    kv = prefix()
    assert kv.is_leaf and kv.requires_grad and prefix() is kv
    assert prefix(torch.bfloat16).dtype == torch.bfloat16
    backward(model, ids)
    before = kv.detach().clone()
    optimizer.step()
    after = prefix()
    assert after is not kv and not torch.equal(after, before)
    with pytest.raises(RuntimeError, match="projections behind the prefix was changed"):
        kv.sum().backward()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(2)
    assert prefix() is not after and not torch.equal(prefix(), after)


@pytest.mark.parametrize("what", ["vectors", "weight"])
def test_what_was_changed_before_the_gradient_is_made_is_refused(what: str) -> None:
    ids, (model, prefix) = token_ids(), attached()
    optimizer = FactoredAdamW(prefix, lr=0.1)
    backward(model, ids)
    t = prefix.encoder.vectors if what == "vectors" else model.transformer.h[1].ln_1.weight
    with torch.no_grad():
        t.mul_(2)
    before = prefix.encoder.vectors.detach().clone()
    with pytest.raises(RuntimeError, match="were changed, moved or sharded"):
        optimizer.step()
    assert torch.equal(before, prefix.encoder.vectors)
    optimizer.zero_grad()
    backward(model, ids)
    optimizer.step()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    ids, (model, prefix) = token_ids(), attached()
    optimizer = FactoredAdamW(prefix, lr=0.1)
    before = prefix.encoder.vectors.detach().clone()
    (model(ids, labels=ids).loss * float("inf")).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(before, prefix.encoder.vectors) and not optimizer.state


def test_a_trained_projection_gets_its_gradient() -> None:
    """As when the model is not all frozen: the graph must not be cut."""
    ids, (model, prefix) = token_ids(), attached()
    weight = model.transformer.h[0].attn.c_attn.weight.requires_grad_()
    optimizer = FactoredAdamW(prefix)
    prefix().square().sum().backward()
    assert weight.grad is not None and type(prefix.encoder.vectors.grad) is Tensor
    assert optimizer.param_groups and len(ids)


def test_when_the_optimizer_is_gone_gradients_are_ordinary() -> None:
    ids, (model, prefix), (other, plain) = token_ids(), attached(), attached()
    optimizer = FactoredAdamW(prefix)
    loss = model(ids, labels=ids).loss
    del optimizer
    loss.backward()
    backward(other, ids)
    assert type(prefix.encoder.vectors.grad) is Tensor
    torch.testing.assert_close(prefix.encoder.vectors.grad, plain.encoder.vectors.grad)
    assert not prefix().is_leaf


def test_another_optimizer_and_a_half_model() -> None:
    ids, (model, prefix), (other, plain) = token_ids(), attached(torch.bfloat16), attached(torch.bfloat16)
    FactoredAdamW(prefix)
    kept = FactoredAdamW(prefix)
    steps = [torch.optim.AdamW(p.parameters(), lr=0.1) for p in (prefix, plain)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net, step in ((model, steps[0]), (other, steps[1])):
            backward(net, ids)
            step.step()
    assert torch.equal(prefix.encoder.vectors, plain.encoder.vectors) and kept.param_groups


def test_a_fused_step_of_another_optimizer_is_seen() -> None:
    """It leaves no trace in the vectors' version."""
    ids, (model, prefix) = token_ids(), attached()
    kept, other = FactoredAdamW(prefix), torch.optim.AdamW(prefix.parameters(), lr=0.1, fused=True)
    backward(model, ids)
    before = prefix()
    other.step()
    assert prefix() is not before and not torch.equal(prefix(), before) and kept.param_groups
