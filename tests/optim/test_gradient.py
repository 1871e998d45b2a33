"""Gradients that are two factors, or not made yet: norms, clipping, GradScaler, zeroing, and every other operation."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from prefixattn.optim import DeferredGradient, FactoredAdamW, FactoredGradient, FactoredSGD, lazy_grad
from prefixattn.testing.optim import NETWORKS, assert_as_close, loss, network, parameters, targets, twin

ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def warned_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_grad, "_warned", True)


def pair(name: str = "language", dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, Tensor]:
    """A network with factored gradients, its optimizer, one with ordinary gradients, and the targets behind them."""
    net = network(name, dtype=dtype)
    other, wanted = twin(net, dtype), targets(net)
    optimizer = FactoredAdamW(net, **ADAMW)
    loss(net, wanted).backward()
    loss(other, wanted).backward()
    return net, optimizer, other, wanted


def assert_same_gradients(net: Any, other: Any, rtol: float = 1e-9) -> None:
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert p.grad.shape == q.grad.shape and p.grad.dtype == q.grad.dtype, name
        torch.testing.assert_close(p.grad.to_dense(), q.grad, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_kinds() -> None:
    net, _, other, _ = pair()
    assert type(net.up.weight.grad) is FactoredGradient
    others = [p.grad for p in net.parameters() if p is not net.up.weight]
    assert all(type(g) is DeferredGradient for g in others)
    assert_same_gradients(net, other)
    assert "ranks=[5]" in repr(net.up.weight.grad)
    assert net.up.weight.grad.is_leaf and not net.up.weight.grad.requires_grad


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_norm_from_gram_matrices(name: str, foreach: bool | None) -> None:
    net, _, other, wanted = pair(name)
    torch.testing.assert_close(
        torch.linalg.vector_norm(net.up.weight.grad), other.up.weight.grad.norm(), rtol=1e-12, atol=0
    )
    loss(net, wanted[:3]).backward()
    loss(other, wanted[:3]).backward()
    norms = [clip_grad_norm_(n.parameters(), 0.5, foreach=foreach) for n in (net, other)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
    assert type(net.up.weight.grad) is FactoredGradient and net.up.weight.grad.value.dense is None
    assert_same_gradients(net, other)


def test_norm_of_float32_is_float64s() -> None:
    """Rows of h that nearly cancel: sums in float32 would lose the norm."""
    net = network("language", hidden=64)
    with torch.no_grad():
        net.embedding.weight[1:] = net.embedding.weight[0] + 1e-3 * torch.randn_like(net.embedding.weight[1:])
    optimizer = FactoredAdamW(net)
    (net() * (torch.arange(5.0) - 2)[:, None]).sum().backward()
    [(source, _)] = net.up.weight.grad.value.parts
    exact = (source.rows().double().mT @ source.h.double()).norm()
    assert abs(torch.linalg.vector_norm(net.up.weight.grad).double() / exact - 1) < 2e-7
    del optimizer


@pytest.mark.parametrize("norm_type", [1.0, float("inf")])
def test_other_norms_and_clipping_of_values_make_the_numbers(norm_type: float) -> None:
    net, optimizer, other, _ = pair()
    norms = [clip_grad_norm_(n.parameters(), 0.5, norm_type=norm_type) for n in (net, other)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-10, atol=0)
    clip_grad_value_(net.parameters(), 1e-3)
    clip_grad_value_(other.parameters(), 1e-3)
    assert_same_gradients(net, other)
    assert net.up.weight.grad.value.dense is not None
    torch_step(other)
    optimizer.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def torch_step(other: Any) -> None:
    torch.optim.AdamW(other.parameters(), **ADAMW).step()


def test_making_the_large_gradient_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_grad, "_warned", False)
    net, *_ = pair()
    with pytest.warns(UserWarning, match="makes the whole gradient"):
        net.up.weight.grad.abs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert net.up.weight.grad.abs().max() > 0


OPERATIONS: dict[str, Any] = {
    "mul": lambda g: g * 3.0,
    "mul_": lambda g: g.mul_(3.0),
    "mul_tensor": lambda g: g.mul_(torch.tensor(0.25, dtype=g.dtype)),
    "div": lambda g: g / 3,
    "div_": lambda g: g.div_(torch.tensor(3.0)),
    "mul_wide": lambda g: g * torch.full_like(g.to_dense(), 2.0),
    "neg": lambda g: -g,
    "sum": lambda g: g.sum(),
    "add": lambda g: g + g.clone(),
    "add_itself": lambda g: g.add_(g),
    "add_alpha": lambda g: g.add_(g.detach().clone(), alpha=-0.5),
    "add_dense": lambda g: g + torch.ones(g.shape, dtype=g.dtype),
    "radd_dense": lambda g: torch.ones(g.shape, dtype=g.dtype).add(g),
    "dense_add_": lambda g: torch.ones(g.shape, dtype=g.dtype).add_(g),
    "clone": lambda g: g.clone(),
    "detach": lambda g: g.detach(),
    "data": lambda g: g.data,
    "clamp_": lambda g: g.clamp_(-1e-2, 1e-2),
    "view": lambda g: g.flatten()[3:9],
    "to": lambda g: g.to(torch.float32),
    "zero_": lambda g: g.zero_(),
    "norm": lambda g: g.norm(),
    "isfinite": lambda g: g.isfinite().all(),
    "zeros_like": torch.zeros_like,
    "foreach_mul": lambda g: torch._foreach_mul([g, torch.ones(2, dtype=g.dtype)], 2.0)[0],
    "foreach_mul_list": lambda g: (torch._foreach_mul_([g, torch.ones(2, dtype=g.dtype)], [2.0, 3.0]), g)[1],
    "foreach_norm": lambda g: torch._foreach_norm([g, torch.ones(2, dtype=g.dtype)])[0],
    "foreach_norm_1": lambda g: torch._foreach_norm([g, torch.ones(2, dtype=g.dtype)], 1.0)[0],
    "foreach_zero_": lambda g: (torch._foreach_zero_([g, torch.ones(2, dtype=g.dtype)]), g)[1],
    "deepcopy": copy.deepcopy,
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_the_numbers(operation: str) -> None:
    net, _, other, _ = pair()
    run = OPERATIONS[operation]
    for name, p in net.named_parameters():
        g, q = p.grad, other.get_parameter(name).grad
        found, expected = run(g), run(q)
        for a, b in ((found, expected), (g, q)):
            torch.testing.assert_close(a.to_dense(), b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_views_and_detached_ones_share_the_numbers() -> None:
    net, _, other, _ = pair()
    for grads in ([p.grad for p in net.parameters()], [p.grad for p in other.parameters()]):
        for g in grads:
            g.detach().mul_(2.0)
            g.flatten()[0] = 7.0
            g.detach().mul_(2.0)
            g.clone().zero_()
    assert_same_gradients(net, other)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    net, optimizer, other, wanted = pair()
    theirs = torch.optim.AdamW(other.parameters(), **ADAMW)
    for one, o in ((net, optimizer), (other, theirs)):
        o.step()
        o.zero_grad(set_to_none=set_to_none)
        o.step()  # of nothing, or of zeros: moments decay
        loss(one, wanted).backward()
        o.step()
    assert_same_gradients(net, other)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    net.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in net.parameters())
    else:
        assert all(float(p.grad.norm()) == 0 for p in net.parameters())


@pytest.mark.parametrize("scaled_between", [True, False])
def test_scaling_between_micro_batches(scaled_between: bool) -> None:
    net, _, other, wanted = pair()
    for one in (net, other):
        assert all(p.grad.sum() is not None for p in one.parameters())  # made, and to be made again
        if scaled_between:
            one.up.weight.grad.mul_(0.5)
            one.down.weight.grad.mul_(3.0)
        loss(one, wanted[:2]).backward()
        one.down.bias.grad = one.down.bias.grad.clone()
        loss(one, wanted[1:4]).backward()
    assert_same_gradients(net, other)
    clip_grad_norm_(net.parameters(), 0.7)
    clip_grad_norm_(other.parameters(), 0.7)
    loss(net, wanted[1:]).backward()
    loss(other, wanted[1:]).backward()
    assert_same_gradients(net, other)


@pytest.mark.parametrize("by", ["torch", "max_norm"])
@pytest.mark.parametrize("kind", [FactoredAdamW, FactoredSGD])
def test_clipped_training_is_torchs(by: str, kind: Any) -> None:
    net = network()
    theirs, exact, wanted = twin(net), twin(net, torch.float64), targets(net)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    ours = kind(net, **options, max_norm=2.0 if by == "max_norm" else None)
    plain = torch.optim.AdamW if kind is FactoredAdamW else torch.optim.SGD
    made = [ours, *(plain(t.parameters(), **options) for t in (theirs, exact))]
    norms: list[list[float]] = []
    for one, optimizer in zip((net, theirs, exact), made, strict=True):
        norms.append([])
        for i in range(50):
            optimizer.zero_grad()
            loss(one, wanted[i % len(wanted)][None]).backward()
            if optimizer is ours and by == "max_norm":
                optimizer.step()
                norms[-1].append(float(ours.grad_norm))
            else:
                norms[-1].append(float(clip_grad_norm_(one.parameters(), 2.0)))
                optimizer.step()
    assert_as_close(net, theirs, exact)
    assert norms[0] == pytest.approx(norms[2], rel=1e-5)
    assert min(norms[2]) > 2.0, "nothing was clipped"


def test_grad_scaler() -> None:
    net = network()
    theirs, exact, wanted = twin(net), twin(net, torch.float64), targets(net)
    made = [FactoredAdamW(net, **ADAMW), *(torch.optim.AdamW(t.parameters(), **ADAMW) for t in (theirs, exact))]
    for one, optimizer in zip((net, theirs, exact), made, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
        for i in range(12):
            optimizer.zero_grad()
            factor = float("inf") if i in (2, 7) else 1.0
            before, state = parameters(one), copy.deepcopy(optimizer.state_dict()["state"])
            scaler.scale(loss(one, wanted[i % 7][None]) * factor).backward()
            if i % 2:
                scaler.unscale_(optimizer)
                clip_grad_norm_(one.parameters(), 2.0)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if factor != 1:
                assert scaler.get_scale() == scale / 2
                assert all(torch.equal(before[name], p) for name, p in one.named_parameters())
                assert_same_state(optimizer.state_dict()["state"], state)
    assert_as_close(net, theirs, exact)


def assert_same_state(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].keys() == expected[key].keys()
        assert all(torch.equal(found[key][name], value) for name, value in expected[key].items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    net, wanted = network(), targets(network())
    head = torch.nn.Linear(2, 1)
    optimizer = FactoredAdamW([net, head], **ADAMW)

    def backward(factor: float, head_factor: float = 1.0) -> None:
        optimizer.zero_grad()
        (loss(net, wanted) * factor + head(torch.ones(1, 2)).sum() * head_factor).backward()

    backward(1.0)
    optimizer.step()
    before, heads = parameters(net), [p.detach().clone() for p in head.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    backward(bad)
    with pytest.warns(RuntimeWarning, match=r"up\.weight is not finite.*1 skipped"):
        optimizer.step()
    backward(1.0, bad)
    with pytest.warns(RuntimeWarning, match=r"of weight, bias is not finite.*2 skipped"):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(heads, head.parameters(), strict=True))
    assert_same_state(optimizer.state_dict()["state"], state)
    assert optimizer.skipped_steps == 2
    saved = optimizer.state_dict()
    backward(1.0)
    optimizer.step()
    assert not torch.equal(before["up.weight"], net.up.weight)
    other = FactoredAdamW([network(), torch.nn.Linear(2, 1)])
    other.load_state_dict(saved)
    assert other.skipped_steps == 2


def test_a_parameter_changed_between_backward_and_step() -> None:
    """dy @ w2 needs the w2 of the forward pass; a wrong one is refused, and forgetting the gradient helps."""
    net, optimizer, _, wanted = pair()
    with torch.no_grad():
        net.up.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"w2 .* was changed between the backward pass"):
        net.down.weight.grad.sum()
    optimizer.zero_grad()
    loss(net, wanted).backward()
    optimizer.step()
