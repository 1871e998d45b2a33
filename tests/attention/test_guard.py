"""What "auto" does with the Triton kernels: it trusts them after one comparison, and says loudly where it does not."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from prefixattn import __main__, backends, prefix_attention
from prefixattn.attention import guard, reference, triton
from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants
from prefixattn.kernels import table
from prefixattn.reparam import guard as reparam_guard
from prefixattn.testing.attention import Shape, make_inputs, ours
from tests.grids import turns

if reasons := backends.here()["triton"]:
    pytest.skip("triton: " + "; ".join(reasons), allow_module_level=True)

from prefixattn.kernels import launch_bwd, launch_fwd

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    guard.trials.verdicts.clear()
    yield
    guard.trials.verdicts.clear()


@pytest.fixture
def auto_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the guarded row is the first without an objection."""
    monkeypatch.setattr(guard, "unsupported", triton.unsupported)
    rows = sorted(backends.TABLE, key=lambda row: row.name != "guarded triton")
    monkeypatch.setattr(backends, "TABLE", tuple(rows))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which functions of which backend ran."""
    names: list[str] = []

    def recorded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            names.append(name)
            return run(*args, **options)

        return call

    for module in (triton, reference):
        for kind in ("fwd", "bwd"):
            name = f"{module.__name__.rpartition('.')[2]}.{kind}"
            monkeypatch.setattr(module, kind, recorded(name, getattr(module, kind)))
    return names


@pytest.mark.parametrize("dtype, kind", turns([torch.float32, torch.float16, torch.bfloat16], guard.TRIALS))
def test_the_kernels_agree(kind: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert guard.trials.verdict((kind, CPU, dtype, 16)) == ""


@pytest.mark.parametrize("processors", [4, 7])
def test_a_trial_asks_for_the_kernel_that_it_is_for(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the GPU. What the kernels then compute is the test's above."""
    for module in (launch_fwd, launch_bwd, table):
        monkeypatch.setattr(module, "processors", lambda device: processors)
    asked: list[str] = []

    def noting_fwd(call: Call, wants: Wants) -> Results:
        asked.append(triton.kind_of_forward(call))
        return reference.fwd(call, wants)

    def noting_bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
        asked.append(triton.kind_of_backward(call, needs))
        return reference.bwd(call, given, needs, into)

    monkeypatch.setattr(triton, "fwd", noting_fwd)
    monkeypatch.setattr(triton, "bwd", noting_bwd)
    for kind in guard.TRIALS:
        asked.clear()
        assert guard.trials.verdict((kind, CPU, torch.bfloat16, 16)) == ""
        assert asked == [kind]


@pytest.mark.usefixtures("auto_takes_triton")
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_features_that_do_not_compile_are_left_to_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = getattr(triton, kind)

    def fails_with_dropout(call: Call, *rest: Any) -> Any:
        if call.dropout_p == 0.3:
            raise RuntimeError("PassManager::run failed")
        return run(call, *rest)

    monkeypatch.setattr(triton, kind, fails_with_dropout)
    inputs = make_inputs("ragged")
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=rf"fail \({kind}_?\w*\).*PassManager"):
        found = ours(inputs, dropout_p=0.3)
    torch.manual_seed(1)
    for name, t in ours(inputs, "reference", dropout_p=0.3).items():
        torch.testing.assert_close(found[name], t, msg=name)


@pytest.mark.usefixtures("auto_takes_triton")
def test_what_is_no_fault_of_the_compiler_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("ragged", grad=False)
    inputs.call()

    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(triton, "fwd", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        inputs.call()


def off_by_little(t: torch.Tensor) -> torch.Tensor:
    return t * 1.05


def not_a_number(t: torch.Tensor) -> torch.Tensor:
    return t * torch.nan


def does_not_compile(t: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("ptxas gave up")


WRONG = {
    "off_by_little": (off_by_little, "out differ"),
    "nan": (not_a_number, "out differ"),
    "raises": (does_not_compile, "RuntimeError: ptxas gave up"),
}


@pytest.mark.usefixtures("auto_takes_triton")
@pytest.mark.parametrize("way", WRONG)
def test_a_wrong_forward_is_replaced_and_named(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, words = WRONG[way]
    run = triton.fwd

    def broken(*args: Any) -> Results:
        results = run(*args)
        return results._replace(out=wrong(results.out))

    monkeypatch.setattr(triton, "fwd", broken)
    inputs = make_inputs("ragged", torch.bfloat16, grad=False)
    with pytest.warns(RuntimeWarning, match=rf"fwd_short\) for torch.bfloat16, head size 32 on cpu: {words}"):
        out = inputs.call()
    assert torch.equal(out, inputs.call("reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        inputs.call()  # it is said once
    if way != "raises":
        assert not torch.equal(inputs.call("triton"), out)  # who names the backend gets it


@pytest.mark.usefixtures("auto_takes_triton")
def test_a_wrong_backward_is_replaced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = triton.bwd

    def broken(*args: Any) -> Grads:
        grads = run(*args)
        return grads._replace(prefix_v=grads.prefix_v * 0.9)

    monkeypatch.setattr(triton, "bwd", broken)
    inputs = make_inputs("ragged")
    with pytest.warns(RuntimeWarning, match=r"\(bwd_short\).*dprefix_v differ from the reference"):
        found = ours(inputs)
    right = ours(inputs, "reference")
    for name in right:
        torch.testing.assert_close(found[name], right[name], msg=name)


@pytest.mark.usefixtures("auto_takes_triton")
def test_each_case_is_tried_once(calls: list[str]) -> None:
    for dtype in (torch.float32, torch.float32, torch.float16):
        ours(make_inputs("ragged", dtype))
    ran = [name for name in calls if name.startswith("triton")]
    assert (
        ran
        == ["triton.fwd"] * 2
        + ["triton.bwd"] * 2
        + ["triton.fwd", "triton.bwd"]
        + ["triton.fwd"] * 2
        + ["triton.bwd"] * 2
    )
    assert set(guard.trials.verdicts) == {
        (kind, CPU, dtype, 32) for kind in ("fwd_short", "bwd_short") for dtype in (torch.float32, torch.float16)
    }


@pytest.mark.usefixtures("auto_takes_triton")
def test_trying_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    ours(make_inputs("ragged"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("auto_takes_triton")
def test_a_compiled_call_is_guarded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run = triton.fwd
    monkeypatch.setattr(triton, "fwd", lambda *args: Results(*(t * 2 for t in run(*args))))
    inputs = make_inputs("ragged", grad=False)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="triton kernels fail"):
        out = compiled(**inputs.tensors)
    torch.testing.assert_close(out, inputs.call("reference"))


def test_on_a_cpu_auto_does_not_interpret() -> None:
    inputs = make_inputs("single", torch.float64, grad=False)
    assert backends.choose("auto", call_of(inputs), Needs()) == "reference"
    assert "Triton's interpreter is for tests" in guard.unsupported(call_of(make_inputs("single", grad=False)), Needs())


def call_of(inputs: Any) -> Call:
    q, k, v, prefix_k, prefix_v = inputs.tensors.values()
    return Call(q, k, v, prefix_k[None], prefix_v[None])


def test_the_command_prints_verdicts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        guard.trials,
        "tried",
        lambda case: "out differ from the reference" if case[0].startswith("bwd") and case[3] == 128 else "",
    )
    monkeypatch.setattr(reparam_guard.trials, "tried", lambda case: "w differs" if case[0] == "sgd" else "")
    monkeypatch.setattr(reparam_guard.trials, "verdicts", {})
    with pytest.warns(RuntimeWarning):
        __main__.print_verdicts(CPU)
    said = capsys.readouterr().out
    assert "bfloat16  head size  64  agrees" in said
    assert "float16   reparameterization  agrees" in said
    assert "float32   reparameterization  sgd: w differs" in said
    assert "float32   head size 128  bwd_short: out differ from the reference; bwd: out differ" in said


@pytest.mark.usefixtures("auto_takes_triton")
def test_two_widths_are_tried_as_the_wider(calls: list[str]) -> None:
    inputs = make_inputs(Shape(1, 1, 1, 5, 5, 2, 8), value_width=16)
    found = ours(inputs)
    assert {D for _, _, _, D in guard.trials.verdicts} == {16} and not any(guard.trials.verdicts.values())
    assert calls[-1] == "triton.bwd"
    guard.trials.verdicts.update(dict.fromkeys(guard.trials.verdicts, "lost"))
    by_reference = ours(inputs)
    assert calls[-1] == "reference.bwd"
    for name, t in ours(inputs, "reference").items():
        torch.testing.assert_close(found[name], t, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(by_reference[name], t, rtol=1e-5, atol=1e-5)
