"""Every backend of the reparameterization against float64, by the error that plain PyTorch makes in the same type."""

from functools import cache

import pytest
import torch
from torch import Tensor

from prefixattn import backends, reparameterize
from prefixattn.reparam import functional, reference
from prefixattn.reparam.call import Given, Needs
from prefixattn.testing.attention import assert_all_as_accurate, assert_as_accurate
from prefixattn.testing.reparam import (
    FEATURES,
    PARAMETERS,
    SHAPES,
    NetInputs,
    NetShape,
    detached,
    exact,
    from_module,
    make_inputs,
    ours,
    same_dtype,
)
from tests.grids import DTYPES, TYPES, by_backend
from tests.support import accepted_network as accepted


@pytest.fixture
def backend(reparam_backend: str) -> str:
    return reparam_backend


@cache
def case(shape: str, feature: str, dtype: str) -> tuple[NetInputs, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and the two answers to compare with: made once, used by every backend."""
    inputs = make_inputs(shape, DTYPES[dtype], **FEATURES[feature])
    return inputs, same_dtype(inputs), exact(inputs)


GRIDDED = "reparam_backend, dtype, shape, feature"


@pytest.mark.parametrize(GRIDDED, by_backend(TYPES, SHAPES, ["plain", "interleaved"]), indirect=["reparam_backend"])
def test_shapes(backend: str, shape: str, feature: str, dtype: str) -> None:
    inputs, same, right = case(shape, feature, dtype)
    assert_all_as_accurate(ours(accepted(backend, inputs), backend), same, right)


FEATURED = [f for f in FEATURES if f not in ("plain", "interleaved")]
CROWDED = ["five_rows", "tile_past", "three_networks", "per_layer"]


@pytest.mark.parametrize(GRIDDED, by_backend(TYPES, CROWDED, FEATURED), indirect=["reparam_backend"])
def test_features(backend: str, shape: str, feature: str, dtype: str) -> None:
    inputs, same, right = case(shape, feature, dtype)
    assert_all_as_accurate(ours(accepted(backend, inputs), backend), same, right)


def test_the_cpu_backend_takes_what_it_promises() -> None:
    """So that the skips above cannot hide a kernel that refuses too much."""
    if reasons := functional.here()["cpu"]:
        pytest.skip("; ".join(reasons))
    for shape in ("ten_rows", "long", "three_networks", "per_layer"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            make_inputs(shape, dtype).call("cpu")


def test_language_reads_the_rows_as_the_published_code_views_them(backend: str) -> None:
    """[P, layers * 2 * heads * D] viewed as [P, layers * 2, heads, D]; 2l is the key of layer l, 2l + 1 its value."""
    layers, heads, D, P = 3, 2, 16, 5
    inputs = accepted(backend, make_inputs(NetShape(1, P, 24, 40, layers, heads, D)))
    x, w1, b1, w2, b2 = (t[0].detach() for t in inputs.tensors.values())
    past = torch.tanh(x @ w1.T + b1) @ w2.T + b2
    past = past.view(P, layers * 2, heads, D).permute(1, 2, 0, 3)  # [layers * 2, heads, P, D]
    kv = inputs.call(backend)
    for layer, (key, value) in enumerate(zip(past[0::2], past[1::2], strict=True)):
        torch.testing.assert_close(kv[layer, 0], key)
        torch.testing.assert_close(kv[layer, 1], value)


def test_vision_reads_the_rows_as_the_published_code_does(backend: str) -> None:
    """A network a layer; its [P, 2 * width] is reshaped to [P, width, 2]: keys are the even numbers, values the odd."""
    layers, heads, D, P = 4, 3, 16, 5
    inputs = accepted(backend, make_inputs(NetShape(layers, P, heads * D, 8, 1, heads, D), interleaved=True))
    kv = inputs.call(backend)
    for layer in range(layers):
        x, w1, b1, w2, b2 = (t[layer].detach() for t in inputs.tensors.values())
        out = torch.tanh(x @ w1.T + b1) @ w2.T + b2
        key, value = out.reshape(P, heads * D, 2).permute(2, 0, 1)  # [P, width] each
        torch.testing.assert_close(kv[layer, 0], key.reshape(P, heads, D).transpose(0, 1))
        torch.testing.assert_close(kv[layer, 1], value.reshape(P, heads, D).transpose(0, 1))


def test_several_networks_are_each_of_them_alone(backend: str) -> None:
    inputs = accepted(backend, make_inputs("three_networks"))
    together, n = inputs.call(backend), inputs.form.layers
    for g in range(3):
        one = {name: t[g].detach() for name, t in inputs.tensors.items()}
        alone = reparameterize(**one, **inputs.form._asdict(), backend=backend)  # 2-D: one network
        torch.testing.assert_close(alone, together[g * n : (g + 1) * n])


def test_one_network_without_its_axis(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ten_rows"))
    every = ours(inputs, backend)
    flat = {name: t.detach()[0].requires_grad_() for name, t in inputs.tensors.items()}
    kv = reparameterize(**flat, **inputs.form._asdict(), backend=backend)
    assert torch.equal(kv, every["kv"])
    kv.backward(inputs.dkv)
    for name, t in flat.items():
        assert t.grad is not None and torch.equal(t.grad, every["d" + name][0]), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["ten_rows", "long_odd", "per_layer"])
def test_repeats_to_the_bit(backend: str, shape: str, dtype: str) -> None:
    inputs = accepted(backend, make_inputs(shape, DTYPES[dtype]))
    first = ours(inputs, backend)
    for _ in range(3):
        for name, again in ours(inputs, backend).items():
            assert torch.equal(again, first[name]), name


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("alone", [True, False])
def test_only_the_gradients_that_are_wanted(backend: str, name: str, alone: bool) -> None:
    inputs = accepted(backend, make_inputs("tile_past"))
    every = ours(inputs, backend)
    for other, t in inputs.tensors.items():
        t.requires_grad_((other == name) == alone)
    some = ours(inputs, backend)
    expected = {"kv", "d" + name} if alone else every.keys() - {"d" + name}
    assert some.keys() == expected
    for found, t in some.items():
        assert_as_accurate(found, t, every[found], every[found].double())


def test_a_backends_own_backward_leaves_the_unwanted_empty(backend: str) -> None:
    inputs = accepted(backend, make_inputs("five_rows"))
    module = backends.module(backend, "reparam")
    call = detached(inputs)
    z = module.fwd(call).z
    for wanted in PARAMETERS:
        grads = module.bwd(call._replace(b1=None, b2=None), Given(inputs.dkv, z), Needs(**{wanted: True}))
        shapes = {name: t.shape if name == wanted else (0,) for name, t in inputs.tensors.items()}
        assert {name: grad.shape for name, grad in grads._asdict().items()} == shapes


def test_the_small_half_of_the_backward_pass(backend: str) -> None:
    inputs = accepted(backend, make_inputs("three_networks", activation="gelu"))
    module = backends.module(backend, "reparam")
    call = detached(inputs)
    z = module.fwd(call).z
    dh = reference.rows_of(inputs.dkv, inputs.form, 3, torch.float32) @ call.w2
    same, right = same_dtype(inputs), exact(inputs)
    grads = module.hidden_bwd(dh, call.x, call.w1, z, inputs.form, Needs(x=True, w1=True, b1=True))
    for name, grad in zip(PARAMETERS, grads, strict=False):
        assert_as_accurate("d" + name, grad, same["d" + name], right["d" + name])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_of_kv_and_kv_of_rows_undo_each_other(interleaved: bool) -> None:
    inputs = make_inputs("three_networks", interleaved=interleaved)
    rows = reference.rows_of(inputs.dkv, inputs.form, 3, torch.float64)
    assert rows.is_contiguous() and rows.shape == (3, 10, SHAPES["three_networks"].O)
    assert torch.equal(reference.kv_of(rows, inputs.form, torch.float32), inputs.dkv)


@pytest.mark.parametrize("poisoned", PARAMETERS)
def test_a_nan_reaches_kv(backend: str, poisoned: str) -> None:
    inputs = accepted(backend, make_inputs("tile_past", grad=False, activation="relu"))
    inputs.tensors[poisoned][0, -1] = torch.nan
    assert inputs.call(backend).isnan().any()


def test_a_nan_in_the_gradient_reaches_the_gradients(backend: str) -> None:
    inputs = accepted(backend, make_inputs("tile_past"))
    inputs.dkv[0, 0, 0, -1, -1] = torch.nan
    found = ours(inputs, backend)
    for name in PARAMETERS:
        assert found["d" + name].isnan().any(), name


def test_a_gradient_in_any_layout(backend: str) -> None:
    inputs = accepted(backend, make_inputs("five_rows"))
    inputs.dkv = torch.randn(()).expand(inputs.dkv.shape)  # as sum() passes it on
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("parameters", ["fp64", "bf16", "fp16"])
def test_parameters_of_any_float_type(parameters: str) -> None:
    inputs = make_inputs("five_rows", torch.float32, parameters=DTYPES[parameters])
    found, right = ours(inputs), exact(inputs)
    assert found["kv"].dtype == torch.float32
    same = {"kv": right["kv"].float()}  # the arithmetic is float32, though what it reads and leaves is not
    for name in PARAMETERS:
        assert found["d" + name].dtype == DTYPES[parameters]
        same["d" + name] = right["d" + name].to(DTYPES[parameters])
    assert_all_as_accurate(found, same, right, factor=4.0)


def test_gradcheck() -> None:
    for feature in ("plain", "interleaved", "gelu", "none"):
        inputs = make_inputs(NetShape(2, 3, 4, 3, 2, 1, 2), torch.float64, **FEATURES[feature])

        def call(*tensors: Tensor, inputs: NetInputs = inputs) -> Tensor:
            return reparameterize(*tensors, **inputs.form._asdict(), backend="reference")

        assert torch.autograd.gradcheck(call, tuple(inputs.tensors.values()))


def test_autocast_changes_nothing(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ten_rows"))
    plain = ours(inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, t in ours(inputs, backend).items():
            assert torch.equal(t, plain[name]), name


def test_the_reference_is_right_without_the_op_around_it() -> None:
    inputs, same, right = case("tile_past", "interleaved", "fp32")
    assert_all_as_accurate(from_module(inputs, reference), same, right)
