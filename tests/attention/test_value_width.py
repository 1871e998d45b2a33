"""Values of another width than keys, on every backend: against float64, in each option, compiled, packed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import backends, prefix_attention
from prefixattn.attention import widths
from prefixattn.attention.call import Call, Given, Needs, Results, Wants
from prefixattn.attention.layout import empty_like_order
from prefixattn.testing.attention import (
    FEATURES,
    Inputs,
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    objections,
    ours,
    same_dtype,
)
from prefixattn.testing.varlen import packed_sequences
from tests.grids import DTYPES, FEWER_TYPES, in_turn, turns
from tests.support import accepted

SHAPES = {  # the last number is D
    "ragged": Shape(1, 3, 3, 19, 19, 5, 24),
    "grouped": Shape(2, 2, 1, 7, 20, 9, 16),
    "decoding": Shape(2, 2, 1, 1, 33, 6, 24),
}
VALUES = {"narrow": 8, "wide": 40}  # Dv
OF = (
    "causal",
    "packed",
    "expanded",
    "transposed_prefix",
    "bank_lengths",
    "bias",
    "memory_bank",
    "memory_gelu",
    "softcap",
    "sinks_memory",
    "window_prefix",
)


def case(shape: str, values: str, feature: str, dtype: str = "fp32", **options: Any) -> Inputs:
    return make_inputs(SHAPES[shape], DTYPES[dtype], value_width=VALUES[values], **FEATURES[feature], **options)


# each feature with one of the shapes and both widths, in the backend's types in turn
CASES = [(list(SHAPES)[i % 3], values, feature) for i, feature in enumerate(OF) for values in VALUES]


@pytest.mark.parametrize("backend, dtype, shape, values, feature", in_turn(FEWER_TYPES, CASES))
def test_is_as_accurate_as_plain_pytorch(backend: str, dtype: str, shape: str, values: str, feature: str) -> None:
    inputs = accepted(backend, case(shape, values, feature, dtype))
    found = ours(inputs, backend)
    assert found["out"].shape[3] == VALUES[values]
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs))


def test_the_heads_of_deepseek(backend: str) -> None:
    """192 and 128: in bfloat16 where the backend has kernels of its own for that."""
    dtype = torch.float32 if backend == "triton" else torch.bfloat16
    inputs = accepted(backend, make_inputs(Shape(1, 2, 2, 9, 9, 3, 192), dtype, value_width=128, causal=True))
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize(
    "values, dropped", [("narrow", {"prefix_dropout_p": 0.4}), ("wide", {"prefix_dropout_p": 0.4, "dropout_p": 0.3})]
)
def test_dropout_draws_what_it_draws_of_one_width(backend: str, values: str, dropped: dict[str, float]) -> None:
    inputs = accepted(backend, case("grouped", values, "causal"))
    torch.manual_seed(5)
    found = ours(inputs, backend, **dropped)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    inputs.options |= dropped
    assert_all_as_accurate(found, same_dtype(inputs, seed), exact(inputs, seed))


def test_all_weights_dropped_leave_the_memory(backend: str) -> None:
    inputs = accepted(backend, case("ragged", "narrow", "memory"))
    memory = inputs.tensors["memory"]
    out = inputs.call(backend, dropout_p=1.0)
    torch.testing.assert_close(out, torch.nn.functional.elu(inputs.q) @ memory, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "values, wanted", turns(list(VALUES), ["q", "v", "prefix_k", "prefix_v", "memory", "lse alone"])
)
def test_some_gradients_are_those_that_all_have(backend: str, values: str, wanted: str) -> None:
    inputs = accepted(backend, case("decoding", values, "memory"))
    if wanted == "lse alone":
        lse = inputs.call(backend, return_lse=True)[1]
        right = inputs.call("reference", return_lse=True)[1]
        found, expected = (torch.autograd.grad(t.sum(), (inputs.q, inputs.tensors["v"])) for t in (lse, right))
        assert found[0].any() and not found[1].any()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return
    every = ours(inputs, backend)
    for name, t in inputs.tensors.items():
        t.requires_grad_(name == wanted)
    some = ours(inputs, backend)
    assert set(some) == {"out", "lse", "mass", f"d{wanted}"}
    torch.testing.assert_close(some[f"d{wanted}"], every[f"d{wanted}"])


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in inputs.tensors.items()}


@pytest.mark.parametrize("values, feature", turns(list(VALUES), ["memory", "memory_gelu"]))
def test_opcheck_and_the_order_in_memory(backend: str, values: str, feature: str) -> None:
    """Fakes have the strides of what is made, in both orders of the heads."""
    inputs = accepted(backend, case("ragged", values, feature))  # dense, and [B, L, H, D] in memory
    q, k, v, prefix_k, prefix_v, memory = (t.detach() for t in inputs.tensors.values())
    call = Call(q, k, v, prefix_k[None], prefix_v[None], memory=memory[None], is_causal=True, scale=0.2, phi="gelu")
    asked = (*call, True, True, backend)
    torch.library.opcheck(torch.ops.prefixattn.fwd, asked, test_utils=("test_schema", "test_faketensor"))
    out, lse, _, attended = torch.ops.prefixattn.fwd(*asked)
    assert out.stride() == attended.stride() == empty_like_order(q, VALUES[values]).stride()
    given = Given(torch.ones(()).expand(out.shape), lse, attended, lse)
    asked = (*given, *call, list(Needs(*[True] * 5, memory=True)), backend)
    torch.library.opcheck(torch.ops.prefixattn.bwd, asked, test_utils=("test_schema", "test_faketensor"))


def test_compiles_with_its_backward(backend: str) -> None:
    inputs = accepted(backend, case("grouped", "narrow", "bank_lengths"))
    call = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, prefix_attention):
        tensors = _leaves(inputs)
        out, lse = function(**tensors, **inputs.options, return_lse=True, backend=backend)
        grads = torch.autograd.grad((out.sin().sum(), lse.sum()), list(tensors.values()))
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("feature", ["causal", "memory_bank", "window_prefix"])
def test_packed_sequences(feature: str, values: str) -> None:
    for backend in [name for name in ("cpu", "reference") if not backends.here()[name]]:
        shape = Shape(0, 4, 2, 0, 0, 7, 16)
        inputs = packed_sequences("ragged", torch.float32, shape, value_width=VALUES[values], **FEATURES[feature])
        found = ours(inputs, backend)
        assert found["out"].shape[2] == VALUES[values]
        assert_all_as_accurate(found, same_dtype(inputs), exact(inputs))


def test_limits_are_those_of_the_wider() -> None:
    inputs = make_inputs(Shape(1, 1, 1, 3, 3, 2, 16), value_width=264, grad=False)
    assert "head_dim=264; needs a multiple of 8 up to 256" in objections("cpu", inputs)
    assert "head_dim=264; needs 1 to 256" in objections("triton", inputs)
    assert "head_dim=264; needs 64 or 128" in objections("cuda", inputs)
    assert inputs.call().shape == (1, 1, 3, 264)  # by the reference
    odd = make_inputs(Shape(1, 1, 1, 3, 3, 2, 20), value_width=24, grad=False)  # padded to a multiple of 8
    assert not objections("cpu", odd) or backends.here()["cpu"]


def test_without_a_batch_and_under_autocast() -> None:
    inputs = make_inputs(SHAPES["ragged"], value_width=8, grad=False, causal=True)
    one: dict[str, Any] = {n: t[0] if n in "qkv" else t for n, t in inputs.tensors.items()}
    torch.testing.assert_close(prefix_attention(**one, is_causal=True), inputs.call()[0])
    with torch.autocast("cpu", torch.bfloat16):
        low = inputs.call()
    assert low.dtype == torch.bfloat16 and low.shape == (1, 3, 19, 8)
    torch.testing.assert_close(low.float(), inputs.call(), rtol=0.05, atol=0.05)


def test_one_width_is_handed_on_as_it_is() -> None:
    """No copy, and `into` as it came; of two widths the gradients arrive there."""
    seen: list[Any] = []

    def fwd(call: Call, wants: Wants) -> Results:
        seen.append(call)
        return Results(call.q, call.q, call.q, call.q)

    def bwd(call: Call, given: Given, needs: Needs, into: Any = None) -> Any:
        seen.append((call, given, into))
        return backends.module("reference").bwd(call, given, needs, into)

    q, k, v, prefix = (t.detach() for t in torch.randn(4, 2, 1, 3, 8).unbind())
    call = Call(q, k, v, prefix, prefix)
    widths.around_fwd(fwd)(call, Wants())
    given = Given(q, None, q, q[..., 0])
    into = torch.empty(3, 2, 1, 3, 8).unbind()
    widths.around_bwd(bwd)(call, given, Needs(q=True), into)
    assert seen[0] is call and seen[1][0] is call and seen[1][1] is given and seen[1][2] is into

    narrow = call._replace(v=v[..., :5], prefix_v=prefix[..., :5])
    into = (*into[:2], torch.full((2, 1, 3, 5), torch.nan))
    needs = Needs(q=True, k=True, v=True)
    right = backends.module("reference").bwd(narrow, given._replace(dout=v[..., :5], out=v[..., :5]), needs)
    found = widths.around_bwd(bwd)(narrow, given._replace(dout=v[..., :5], out=v[..., :5]), needs, into)
    for buffer, grad, expected in zip(into, found, right[:3], strict=False):
        assert grad is buffer
        torch.testing.assert_close(buffer, expected)
