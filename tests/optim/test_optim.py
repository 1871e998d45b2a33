"""FactoredAdamW and FactoredSGD against torch's: equal within rounding, with fewer runs and no large gradient."""

import copy
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixattn import backends
from prefixattn.attach import attach
from prefixattn.optim import FactoredAdamW, FactoredGradient, FactoredSGD
from prefixattn.optim.dispatch import choose
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.reparam import fused_step
from prefixattn.testing.models import tiny_gpt2, token_ids
from prefixattn.testing.optim import NETWORKS, Largest, assert_as_close, loss, network, parameters, targets, train, twin
from tests.support import ROOT

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}
SGD = [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.5, "dampening": 0.1}]


@pytest.fixture(params=[row.name for row in backends.REPARAM if row.named])
def stepping(request: pytest.FixtureRequest) -> str:
    """The name of each backend that has a fused step here."""
    w, h, dy = torch.zeros(1, 64, 8), torch.zeros(1, 2, 8), torch.zeros(1, 2, 64)
    try:
        choose(request.param, w, w, w, h, dy)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return str(request.param)


def few(stepping: str) -> bool:
    return stepping == "triton" and not torch.cuda.is_available()  # interpreted


@functools.cache
def trained(name: str, optimizer: Any, steps: int, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    """Networks that torch trained, in float32 and float64."""
    made = twin(network(name)), twin(network(name), torch.float64)
    for other in made:
        train(other, optimizer(other.parameters(), **dict(options)), targets(network(name)), steps)
    return made


@pytest.mark.parametrize("name", NETWORKS)
def test_adamw_is_torchs_over_1000_steps(stepping: str, name: str) -> None:
    steps = 20 if few(stepping) else 1000 if name == "language" else 100
    net = network(name)
    train(net, FactoredAdamW(net, **ADAMW, backend=stepping), targets(net), steps)
    assert isinstance(net.up.weight.grad, FactoredGradient)
    assert_as_close(net, *trained(name, torch.optim.AdamW, steps, tuple(ADAMW.items())))


@pytest.mark.parametrize("options", SGD, ids=["plain", "momentum", "nesterov", "dampening"])
def test_sgd_is_torchs_over_300_steps(stepping: str, options: dict[str, Any]) -> None:
    steps, name = 10 if few(stepping) else 300, "vision"
    net = network(name)
    options = {"lr": 1e-3, "weight_decay": 0.05, **options}
    train(net, FactoredSGD(net, **options, backend=stepping), targets(net), steps)
    assert isinstance(net.up.weight.grad, FactoredGradient)
    assert_as_close(net, *trained(name, torch.optim.SGD, steps, tuple(options.items())))


def test_float64_is_exact_and_the_reference_steps_it() -> None:
    net = network(dtype=torch.float64)
    exact, wanted = twin(net, torch.float64), targets(net)
    train(net, FactoredAdamW(net, **ADAMW), wanted, 50)
    train(exact, torch.optim.AdamW(exact.parameters(), **ADAMW), wanted, 50)
    assert net.up.weight.dtype == torch.float64
    for a, b in zip(net.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_groups_and_a_schedule() -> None:
    net = network()
    theirs, exact, wanted = twin(net), twin(net, torch.float64), targets(net)

    def groups(of: Any, parts: list[Any]) -> list[dict[str, Any]]:
        return [
            {"params": parts[0], "lr": 3e-2, "weight_decay": 0.0},
            {"params": parts[1], "betas": (0.5, 0.9)},
        ]

    head = torch.nn.Linear(3, 2)
    heads = [copy.deepcopy(head).to(t) for t in (torch.float32, torch.float64)]
    ours = FactoredAdamW(groups(net, [net, head]), **ADAMW)
    made = [ours]
    for other, beside in zip((theirs, exact), heads, strict=True):
        pair = groups(other, [other.parameters(), beside.parameters()])
        made.append(torch.optim.AdamW(pair, **ADAMW, fused=True))
    for one, optimizer, beside in zip((net, theirs, exact), made, (head, *heads), strict=True):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (i % 7 + 1) / 5)
        for _ in range(60):
            optimizer.zero_grad()
            (loss(one, wanted) + beside(torch.ones(2, 3, dtype=beside.weight.dtype)).square().sum()).backward()
            optimizer.step()
            schedule.step()
    assert_as_close(net, theirs, exact)
    assert torch.equal(head.weight, heads[0].weight)  # torch's own step


def test_micro_batches_run_the_network_once() -> None:
    net, whole = network(), network()
    wanted = targets(net, 6)
    ours, theirs = FactoredAdamW(net, **ADAMW), FactoredAdamW(whole, **ADAMW)
    runs = _count_runs(net)
    for step in range(3):
        ours.zero_grad()
        for part in wanted.split(2):
            (loss(net, part) / 3).backward()
        ours.step()
        assert runs() == step + 1
        theirs.zero_grad()
        loss(whole, wanted).backward()
        theirs.step()
    for a, b in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _count_runs(net: Any) -> Any:
    leaves: list[int] = []
    leaf = net.leaf

    def counted(dtype: torch.dtype) -> Any:
        kv = leaf(dtype)
        if not leaves or leaves[-1] != id(kv):
            leaves.append(id(kv))
            kept.append(kv)  # so that no id comes twice
        return kv

    kept: list[Any] = []
    net.leaf = counted
    return lambda: len(leaves)


def test_gradients_kept_over_a_step_add_up() -> None:
    """Without zero_grad torch goes on adding, to what was made with other parameters."""
    net = network()
    theirs, exact, wanted = twin(net), twin(net, torch.float64), targets(net)
    ours = FactoredAdamW(net, **ADAMW)
    for one, optimizer in ((net, ours), *((t, torch.optim.AdamW(t.parameters(), **ADAMW)) for t in (theirs, exact))):
        for i in range(8):
            if i % 3 == 0:
                optimizer.zero_grad(set_to_none=i % 2 == 0)
            loss(one, wanted).backward()
            optimizer.step()
    assert_as_close(net, theirs, exact)


def test_leaves_of_two_types_in_a_step() -> None:
    net = network()
    theirs, exact, wanted = twin(net), twin(net, torch.float64), targets(net)[0]
    made = [FactoredAdamW(net, **ADAMW), *(torch.optim.AdamW(t.parameters(), **ADAMW) for t in (theirs, exact))]
    for one, optimizer in zip((net, theirs, exact), made, strict=True):
        for _ in range(10):
            optimizer.zero_grad()
            dtype = one.up.weight.dtype
            (one(dtype) * one(torch.float64) * wanted.to(dtype)).sum().backward()
            optimizer.step()
    assert_as_close(net, theirs, exact)


def test_parts_of_a_network_frozen_or_with_others() -> None:
    for frozen in (["embedding.weight"], ["up.bias", "down.weight"], ["embedding.weight", "down.weight", "down.bias"]):
        net = network()
        theirs, exact = twin(net), twin(net, torch.float64)
        for one in (net, theirs, exact):
            for name in frozen:
                one.get_parameter(name).requires_grad_(False)
        wanted = targets(net)
        before = parameters(net)
        train(net, FactoredAdamW(net, **ADAMW), wanted, 20)
        for other in (theirs, exact):
            train(other, torch.optim.AdamW(other.parameters(), **ADAMW), wanted, 20)
        assert_as_close(net, theirs, exact)
        assert all(torch.equal(before[name], net.get_parameter(name)) for name in frozen)


def test_a_penalty_on_the_matrix_makes_an_ordinary_gradient() -> None:
    net = network()
    theirs, exact, wanted = twin(net), twin(net, torch.float64), targets(net)
    made = [FactoredAdamW(net, **ADAMW), *(torch.optim.AdamW(t.parameters(), **ADAMW) for t in (theirs, exact))]
    for one, optimizer in zip((net, theirs, exact), made, strict=True):
        for i in range(10):
            optimizer.zero_grad()
            penalty = 0.1 * one.up.weight.square().sum() if i % 3 else 0.0
            (loss(one, wanted) + penalty).backward()
            optimizer.step()
    assert_as_close(net, theirs, exact)


def test_others_get_ordinary_gradients() -> None:
    net, wanted = network(), targets(network())
    loss(net, wanted).backward()
    dense = {name: p.grad for name, p in net.named_parameters()}
    assert all(type(g) is torch.Tensor for g in dense.values())
    net.zero_grad()
    optimizer = FactoredAdamW(net)
    loss(net, wanted).backward()
    assert type(net.up.weight.grad) is FactoredGradient
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad.to_dense(), dense[name], rtol=1e-4, atol=1e-6)
    net.zero_grad()
    del optimizer
    loss(net, wanted).backward()
    for name, p in net.named_parameters():
        assert type(p.grad) is torch.Tensor and torch.equal(p.grad, dense[name])


def test_another_optimizer_reads_what_this_one_owns() -> None:
    """The numbers are made for whoever asks, the old ones also after the step that took dy @ w2 along."""
    net, wanted = network(), targets(network())
    dense = twin(net)
    loss(dense, wanted).backward()
    owner = FactoredAdamW(net.up)  # the weight is here, but the network is not: nothing is owned
    assert not net.factored
    owner = FactoredAdamW(net, **ADAMW)
    loss(net, wanted).backward()
    owner.step()
    for p, q in zip(net.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad, rtol=1e-4, atol=1e-6)


def test_no_large_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(length=2, layers=8, hidden=64)
    wanted = targets(net, 1)
    monkeypatch.setattr(fused_step, "TILE", 1024)
    ours = FactoredAdamW(net, max_norm=1.0, backend="reference")
    train(net, ours, wanted, 1)  # moments
    with Largest() as seen:
        train(net, ours, wanted, 2)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert 0 < seen.numbers < net.up.weight.numel() / 4, f"{seen.by} made {seen.numbers} numbers"


PEAK = """
import pathlib, torch
from prefixattn.optim import FactoredAdamW
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import DeepShare
torch.set_num_threads(1)
net = DeepShare(24, 10, 256, Geometry("test", 24, 16, 64, 64))  # half of GPT-2 medium's matrix, 50 MB
def kilobytes(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
for backend in ("reference", "auto"):
    optimizer = FactoredAdamW(net, max_norm=1.0, backend=backend)
    for _ in range(2):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is this step's
        before = kilobytes("VmRSS")
        optimizer.zero_grad()
        net().square().sum().backward()
        optimizer.step()
    print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's VmHWM")
def test_memory_of_a_step() -> None:
    """Beyond parameters and moments: kv, its gradient and that as the reference's rows, 2 MB each, and tiles."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kilobytes in done.stdout.split():
        assert int(kilobytes) < 9_000, f"{kilobytes} kB, the matrix is 50 MB"


def test_in_a_model() -> None:
    """A toy GPT-2 with an attached prefix, with a head trained beside it."""
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    prefixes = [attach(model, PrefixConfig(length=4, share="deep", hidden=8)) for model in (ours, theirs)]
    prefixes[1].load_state_dict(prefixes[0].state_dict())
    made = [FactoredAdamW(prefixes[0], **ADAMW), torch.optim.AdamW(prefixes[1].parameters(), **ADAMW)]
    ids = token_ids()
    for model, optimizer in zip((ours, theirs), made, strict=True):
        for _ in range(5):
            optimizer.zero_grad()
            for part in ids.split(1):
                model(input_ids=part, labels=part).loss.backward()
            optimizer.step()
    assert isinstance(prefixes[0].encoder.up.weight.grad, FactoredGradient)
    assert type(prefixes[1].encoder.up.weight.grad) is torch.Tensor
    for a, b in zip(prefixes[0].parameters(), prefixes[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
