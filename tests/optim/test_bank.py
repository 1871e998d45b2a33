"""The gradient of kv on its way through a step: in place, in its own layout, and kv itself gone."""

import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.reparam import peak_rss
from bench.reparam.cases import CASES
from prefixattn import backends
from prefixattn.optim import FactoredAdamW, FactoredSGD
from prefixattn.optim.dispatch import choose
from prefixattn.optim.network_grad import is_finite
from prefixattn.reparam import fused_step, reference
from prefixattn.reparam.call import Form
from prefixattn.reparam.functional import here
from prefixattn.testing.optim import NETWORKS, loss, network, parameters, targets, train

NO_KERNELS = here()["cpu"]
FORMS = {
    "blocked": Form(3, 2, 20, False, "tanh"),
    "interleaved": Form(2, 3, 24, True, "tanh"),
    "one_head": Form(1, 1, 8, False, "tanh"),
}


@pytest.fixture(params=[row.name for row in backends.REPARAM if row.named])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Each backend that has a fused step here."""
    w, h, dy = torch.zeros(1, 64, 8), torch.zeros(1, 2, 8), torch.zeros(1, 2, 64)
    try:
        return choose(request.param, w, w, w, h, dy)
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [3, 33])
def test_fused_steps_take_kv_or_its_rows(module: ModuleType, name: str, length: int) -> None:
    form, G, M = FORMS[name], 2, 40
    O = form.layers * 2 * form.kv_heads * form.head_dim
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    w, h = normal(G, O, M), normal(G, length, M)
    dkv = normal(G * form.layers, 2, form.kv_heads, length, form.head_dim)
    rows = reference.rows_of(dkv, form, G, torch.float32)
    numbers: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "grad_scale": 0.5, "want_dh": True}
    adamw = {**numbers, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 1}
    sgd = {**numbers, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "first": True}
    found = []
    for dy, its_form in ((dkv, form), (rows, None)):
        made = [w.clone(), torch.zeros_like(w), torch.zeros_like(w), w.clone(), torch.zeros_like(w)]
        made.append(module.fused_adamw(*made[:3], h, dy, form=its_form, **adamw))
        made.append(module.fused_sgd(*made[3:5], h, dy, form=its_form, **sgd))
        found.append(made)
        assert module.fused_step_unsupported(*made[:3], h, dy, its_form) == []
    of_kv, of_rows = found
    assert all(torch.equal(a, b) for a, b in zip(of_kv[:5], of_rows[:5], strict=True))
    # an interleaved kv's columns have an order of their own, and a sum over them its own roundings
    dh = [*of_kv[5:], module.dh_only(w, dkv, form)], [*of_rows[5:], module.dh_only(w, rows)]
    torch.testing.assert_close(*dh, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(bool(NO_KERNELS), reason="; ".join(NO_KERNELS))
@pytest.mark.parametrize("kind", [FactoredAdamW, FactoredSGD])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernels_get_no_rows(name: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the step nor clipping turns the gradient round; b2's, which is one row, may be."""
    turned: list[int] = []
    rows_of = reference.rows_of
    monkeypatch.setattr(reference, "rows_of", lambda kv, *args: (turned.append(kv.shape[3]), rows_of(kv, *args))[1])
    net = network(name, length=7)
    optimizer = kind(net, max_norm=0.1, backend="cpu")
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            loss(net, targets(net)).backward()
        optimizer.step()
    assert set(turned) <= {1}
    net.up.weight.grad.to_dense()
    assert 7 in turned, "nobody counted"


def test_a_gradient_is_taken_and_not_copied() -> None:
    net = network()
    optimizer = FactoredAdamW(net)
    left: list[int] = []
    kv = net()
    # before the optimizer's hook takes it away
    kv.register_hook(lambda grad: left.append(grad.data_ptr()))
    kv.square().sum().backward()
    [(source, _)] = net.up.weight.grad.value.parts
    assert left == [source.dkv.data_ptr()] and kv.grad is None
    kv.square().sum().backward()
    assert source.dkv.data_ptr() == left[0], "a micro-batch is added in place"
    torch.testing.assert_close(source.dkv, 4 * kv.detach())
    del optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_gradient_of_a_half_kv_stays_so_until_it_is_added_up(dtype: torch.dtype) -> None:
    """One micro-batch's is stepped in its own type, with what float32 copies of its numbers give; sums are float32."""
    wide, half = network(), network()
    optimizers = FactoredAdamW(wide, lr=1e-2), FactoredAdamW(half, lr=1e-2)
    for net in (wide, half):
        (net(dtype).float() - targets(net)[0]).square().sum().backward()
        [(source, _)] = net.up.weight.grad.value.parts
        assert source.dkv.dtype == dtype
        if net is wide:
            source.wide()
            assert source.dkv.dtype == torch.float32
    norms = [torch.linalg.vector_norm(net.up.weight.grad) for net in (wide, half)]
    assert torch.equal(*norms)
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(wide.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)
    half.zero_grad()
    for sample in targets(half)[:2]:
        (half(dtype).float() - sample).square().sum().backward()
    [(source, _)] = half.up.weight.grad.value.parts
    leaf = half(dtype).detach()
    parts = [(2 * (leaf.float() - sample)).to(dtype).float() for sample in targets(half)[:2]]
    assert torch.equal(source.dkv, parts[0] + parts[1])


@pytest.mark.parametrize("kind", [FactoredAdamW, FactoredSGD])
def test_kv_is_gone_while_its_matrix_is_stepped(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, wanted = network(), targets(network())
    optimizer = kind(net, backend="reference")
    alive: list[bool] = []
    for name in ("fused_adamw", "fused_sgd"):
        run = getattr(fused_step, name)
        monkeypatch.setattr(
            fused_step, name, lambda *a, run=run, **k: (alive.append(kv() is not None), run(*a, **k))[1]
        )
    kv = weakref.ref(net())
    train(net, optimizer, wanted, 1)
    assert alive == [False]
    stale = net()
    train(net, optimizer, wanted, 1)
    with pytest.raises(RuntimeError, match="changed between a forward pass and its backward pass"):
        stale.sum().backward()


def test_kv_stays_where_nothing_changes() -> None:
    """Of a network without gradients, and in a step that is skipped."""
    one, other = network(), network(seed=1)
    optimizer = FactoredAdamW([one, other])
    leaves = one(), other()
    leaves[0].sum().backward()
    optimizer.step()
    assert other() is leaves[1] and one() is not leaves[0]
    leaves[1].sum().backward()
    (one() * float("inf")).sum().backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert other() is leaves[1]


@pytest.mark.skipif(bool(NO_KERNELS), reason="; ".join(NO_KERNELS))
@pytest.mark.parametrize("kind", [FactoredAdamW, FactoredSGD])
def test_a_refused_network_stops_the_step_before_another_is_changed(kind: Any) -> None:
    nets = [network(), network(seed=1, dtype=torch.float64)]  # which the kernels refuse
    optimizer = kind(nets, lr=1e-2, backend="cpu")
    before = [parameters(net) for net in nets]
    for net in nets:
        loss(net, targets(net)).backward()
    with pytest.raises(NotImplementedError, match=r"no backend for w \[1, 96, 12\] torch.float64"):
        optimizer.step()
    for net, old in zip(nets, before, strict=True):
        assert all(torch.equal(old[name], p) for name, p in net.named_parameters())
    assert not any(t.any() for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    optimizer.backend = "auto"
    optimizer.step()
    alone = network()
    fresh = kind(alone, lr=1e-2)
    loss(alone, targets(alone)).backward()
    fresh.step()
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), alone.parameters(), strict=True))


FINITE = {
    "ordinary": (torch.ones(7), True),
    "empty": (torch.ones(0), True),
    "its sum overflows": (torch.full((2, 8), 3e38), True),
    "half": (torch.full((40, 40), 6e4, dtype=torch.float16), True),
    "nan": (torch.tensor([1.0, float("nan")]), False),
    "inf": (torch.tensor([float("inf"), 1.0]), False),
    "both": (torch.tensor([float("inf"), -float("inf")]), False),
}


@pytest.mark.parametrize("what", FINITE)
def test_finite(what: str) -> None:
    t, expected = FINITE[what]
    found = is_finite(t)
    assert found.shape == () and bool(found) == expected


def test_large_numbers_are_no_reason_to_skip() -> None:
    net = network()
    optimizer = FactoredSGD(net, lr=1e-38, backend="reference")
    (net() * 1e37).sum().backward()
    ((source, _),) = net.up.weight.grad.value.parts
    assert source.dkv.sum().isinf()
    optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.skipif(bool(NO_KERNELS), reason="; ".join(NO_KERNELS))
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's VmHWM")
def test_a_step_needs_less_than_a_twentieth_of_the_matrix() -> None:
    """GPT-2 medium with ten rows: 96 MiB, beside which kv and its gradient have 2 MiB each, as has w1's."""
    case = "gpt2-medium P10"
    found = peak_rss.of("ours", case)["step_mib"]
    assert found < 0.05 * CASES[case].matrix_bytes / 2**20
