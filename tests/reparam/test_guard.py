"""The guard before the Triton kernels of the reparameterization, with its device played by the interpreter."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixattn import backends
from prefixattn.reparam import functional, fused_step, guard, reference, triton
from prefixattn.reparam.call import Call, Form, Needs

CPU = torch.device("cpu")

if reasons := functional.here()["triton"]:
    pytest.skip("triton: " + "; ".join(reasons), allow_module_level=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(guard.trials, "verdicts", {})
    yield


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind, dtypes in guard.KINDS.items() for dtype in dtypes],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_the_kernels_agree(kind: str, dtype: torch.dtype) -> None:
    assert guard.trials.verdict((kind, CPU, dtype)) == ""


def shifted(function: Any) -> Any:
    """A function that is wrong in a way that no check of shapes sees."""

    def wrong(operand: Any, /, *args: Any, **kwargs: Any) -> Any:
        result = function(operand, *args, **kwargs)
        if isinstance(result, tuple):  # a record
            return type(result)._make(t.roll(1, -1) for t in result)
        operand.add_(0.1)  # a fused step's matrix
        return result

    return wrong


@pytest.mark.parametrize(
    ("kind", "function"), [("fwd", "fwd"), ("bwd", "bwd"), ("adamw", "fused_adamw"), ("sgd", "fused_sgd")]
)
def test_what_is_wrong_is_replaced_and_named(kind: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, function, shifted(getattr(triton, function)))
    with pytest.warns(RuntimeWarning, match=rf"reparameterization fail \({kind}\) for torch.float32 on cpu: .*differ"):
        assert guard.trials.verdict((kind, CPU, torch.float32))
    w, first, second = torch.randn(1, 8, 4), torch.zeros(1, 8, 4), torch.zeros(1, 8, 4)
    h, dy = torch.randn(1, 3, 4), torch.randn(1, 3, 8)
    numbers = {"lr": 0.1, "weight_decay": 0.0, "grad_scale": 1.0, "want_dh": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        if kind == "adamw":
            numbers |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 1}
            expected = w.clone()
            fused_step.fused_adamw(expected, first.clone(), second.clone(), h, dy, **numbers)
            guard.fused_adamw(w, first, second, h, dy, **numbers)
            assert torch.equal(w, expected)
        if kind == "sgd":
            numbers |= {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "first": True}
            expected = w.clone()
            fused_step.fused_sgd(expected, None, h, dy, **numbers)
            guard.fused_sgd(w, None, h, dy, **numbers)
            assert torch.equal(w, expected)
        if kind == "fwd":
            x, w1, w2 = torch.randn(1, 3, 5), torch.randn(1, 4, 5), torch.randn(1, 16, 4)
            call = Call(x, w1, None, w2, None, Form(1, 2, 4, False, "tanh"), torch.float32)
            assert torch.equal(guard.fwd(call).kv, reference.fwd(call).kv)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_kv_read_in_another_layout_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefixattn.kernels import launch_reparam

    monkeypatch.setattr(launch_reparam, "layout", lambda form: launch_reparam.BLOCKED)
    with pytest.warns(RuntimeWarning, match=rf"fail \({kind}\) for torch.float32 on cpu: w, .*differ"):
        assert guard.trials.verdict((kind, CPU, torch.float32))


def test_codes_rounded_by_other_coins_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "moments8", SimpleNamespace(salt=lambda step: step, BLOCK=guard.BLOCK))
    with pytest.warns(RuntimeWarning, match=r"fail \(adamw8\) for torch.float32 on cpu: m, v differ"):
        assert guard.trials.verdict(("adamw8", CPU, torch.float32))


@pytest.mark.parametrize("forms", [(True, True), (True, False), (False, True)])
def test_moments_of_8_bits_have_a_trial_of_their_own(forms: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(guard.trials, "tried", lambda case: tried.append(case) or "")
    w, h, dy = torch.randn(1, 8, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 8)
    m, v = (guard._eight(w.abs(), i == 0) if form else torch.zeros_like(w) for i, form in enumerate(forms))
    guard.fused_adamw(w, m, v, h, dy, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1)
    assert tried == [("adamw8", CPU, torch.float32)]


def test_each_case_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(guard.trials, "tried", lambda case: calls.append(case) or "")
    w, dy = torch.randn(1, 8, 4), torch.randn(1, 3, 8)
    for _ in range(2):
        guard.dh_only(w, dy)
    assert calls == [("dh", CPU, torch.float32)]


def test_on_a_cpu_auto_does_not_interpret() -> None:
    x, w1, w2 = torch.randn(1, 3, 5), torch.randn(1, 4, 5), torch.randn(1, 16, 4)
    call = Call(x, w1, None, w2, None, Form(1, 2, 4, False, "tanh"), torch.float32)
    assert guard.unsupported(call, Needs()) == ["Triton's interpreter is for tests"]
    assert backends.choose_reparam("auto", call, Needs()) in ("cpu", "reference")


def test_trying_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    guard.trials.verdict(("fwd", CPU, torch.float32))
    assert torch.equal(torch.randn(4), expected)
