"""What happens around a step of ours: other optimizers, changed parameters, replaced gradients; no half steps."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixattn
from prefixattn import FactoredAdamW, FactoredSGD
from prefixattn.testing.optim import loss, network, targets, twin


def losses(net: Any, step: Any, count: int = 4) -> list[float]:
    wanted, found = targets(net), []
    for _ in range(count):
        value = loss(net, wanted)
        found.append(float(value.detach()))
        net.zero_grad()
        value.backward()
        step()
    return found


FOREIGN = {
    "default": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, weight_decay=0.1),
}


@pytest.mark.filterwarnings("ignore:.* makes the whole gradient")
@pytest.mark.parametrize("name", FOREIGN)
def test_another_optimizer_on_a_network_that_is_owned(name: str) -> None:
    net = network()
    other = twin(net)
    keeper = FactoredAdamW(net, lr=0.05)
    found = losses(net, FOREIGN[name](net.parameters()).step)
    expected = losses(other, FOREIGN[name](other.parameters()).step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
    assert found[-1] < found[0] and keeper.networks


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:FactoredAdamW got parameters and no module")
def test_the_matrix_alone_is_ours(fused: bool) -> None:
    net = network()
    other = twin(net)
    first = FactoredAdamW([net.up.weight], lr=0.05)
    first.take_over(net)
    small = [p for p in net.parameters() if p is not net.up.weight]
    second = torch.optim.AdamW(small, lr=0.05, fused=fused)

    def step() -> None:
        first.step()
        second.step()

    plain = torch.optim.AdamW(other.parameters(), lr=0.05)
    torch.testing.assert_close(losses(net, step), losses(other, plain.step), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("share", ["simple", "deep", "none"])
@pytest.mark.parametrize("make", [FactoredAdamW, lambda p, lr: torch.optim.AdamW(p.parameters(), lr=lr, fused=True)])
@pytest.mark.parametrize("frozen", ["", "up.weight"])
def test_evaluation_sees_each_step(share: str, make: Any, frozen: str) -> None:
    from prefixattn.testing.models import tiny_gpt2, token_ids

    if frozen and share != "deep":
        pytest.skip("only deep share has a network")
    model, ids = tiny_gpt2(), token_ids()
    prefix = prefixattn.attach(model, prefixattn.PrefixConfig(length=5, share=share, hidden=16))
    if frozen:
        prefix.encoder.get_parameter(frozen).requires_grad_(False)
    optimizer = make(prefix, lr=0.1)

    @torch.no_grad()
    def evaluated() -> float:
        return float(model(ids, labels=ids).loss)

    model(ids, labels=ids).loss.backward()
    before = evaluated()
    optimizer.step()
    after = evaluated()
    prefix._cache = None
    assert after == evaluated() != before


def ready(lr: float = 0.1) -> tuple[Any, FactoredAdamW, list[Tensor]]:
    net = network()
    optimizer = FactoredAdamW(net, lr=lr)
    loss(net, targets(net)).backward()
    return net, optimizer, [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("change", [lambda g: g * 0.5, lambda g: g.clone()], ids=["scaled", "cloned"])
def test_gradients_that_were_replaced_are_stepped_with(change: Any) -> None:
    net, optimizer, _ = ready()
    other = twin(net)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1)
    loss(other, targets(other)).backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        p.grad, q.grad = change(p.grad), change(q.grad)
    optimizer.step()
    plain.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["embedding.weight", "down.weight", "up.weight"])
def test_a_parameter_changed_after_its_backward_is_refused_before_anything_changes(name: str) -> None:
    net, optimizer, _ = ready()
    with torch.no_grad():
        net.get_parameter(name).mul_(2)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="was changed between the backward pass"):
        optimizer.step()
    for p, q in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert not any(float(state["step"]) for state in optimizer.state.values() if "step" in state)


def test_a_sum_that_overflows_is_not_finite_either() -> None:
    net = network()
    optimizer = FactoredSGD(net, lr=1e-3)
    (net() * 1e38).sum().backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_network_of_another_type_takes_ordinary_steps() -> None:
    net = network()
    optimizer = FactoredAdamW(net, lr=0.1)
    net.to(torch.bfloat16)
    before = net.up.weight.detach().clone()
    net().float().square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.up.weight, before)


def test_states_of_another_type_load_for_every_shape() -> None:
    net, linear = network(), torch.nn.Linear(3, 2)
    optimizer = FactoredAdamW([net, linear], lr=0.1)
    (loss(net, targets(net)) + linear(torch.ones(3)).sum()).backward()
    optimizer.step()
    half = torch.nn.Linear(3, 2).to(torch.bfloat16)
    resumed = FactoredAdamW([twin(net), half], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    half(torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    resumed.step()
    assert float(resumed.state[half.bias]["step"]) == 2


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}])
def test_torchs_state_loads_however_it_was_computed(how: dict[str, bool]) -> None:
    net = network()
    plain = torch.optim.AdamW(net.parameters(), lr=0.1, **how)
    loss(net, targets(net)).backward()
    plain.step()
    ours = FactoredAdamW(net, lr=0.1)
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.state[net.up.weight]["exp_avg"], plain.state[net.up.weight]["exp_avg"])


def test_a_refused_group_leaves_no_trace() -> None:
    optimizer = FactoredAdamW(network(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        optimizer.add_param_group({"params": network().requires_grad_(False)})
    assert len(optimizer.param_groups) == 1


def test_importing_watches_no_optimizer() -> None:
    code = (
        "import torch.optim.optimizer as o; import prefixattn;"
        "assert not o._global_optimizer_pre_hooks and not o._global_optimizer_post_hooks"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
