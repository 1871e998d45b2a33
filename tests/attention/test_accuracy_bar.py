"""The bar of accuracy, on any machine: it lets pass what plain PyTorch does, and not three times as much."""

from functools import cache

import pytest
import torch
from torch import Tensor

from prefixattn.testing import reparam as reparam_testing
from prefixattn.testing.attention import (
    FEATURES,
    Shape,
    allowed_error,
    assert_as_accurate,
    exact,
    make_inputs,
    ours,
    rms,
    same_dtype,
    suited,
)
from prefixattn.testing.plain import Roundings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CALLS = [
    ("ragged", "causal"),
    ("vit", "plain"),
    ("grouped", "memory_gelu"),
    ("tile_past", "bank_sample_lengths"),
    ("more_queries", "bias"),
    ("tile_full", "softcap"),
    ("even", "scaled"),
]
NETWORKS = [("five_rows", "relu"), ("tile_past", "plain"), ("three_networks", "interleaved"), ("long_odd", "gelu")]


@cache
def attention(shape: str, feature: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs = make_inputs(shape, DTYPES[dtype], **FEATURES[feature])
    return same_dtype(inputs), exact(inputs)


def network(shape: str, feature: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs = reparam_testing.make_inputs(shape, DTYPES[dtype], **reparam_testing.FEATURES[feature])
    return reparam_testing.same_dtype(inputs), reparam_testing.exact(inputs)


def off(right: Tensor, dtype: torch.dtype, error: float) -> Tensor:
    """The right answer with random errors of that rms, in a type."""
    noise = torch.randn(right.shape, generator=torch.Generator("cpu").manual_seed(7), dtype=torch.float64, device="cpu")
    return (right + error * noise.to(right.device)).to(dtype)


def usual(same: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """Plain PyTorch's error: the rms of its own two answers, or the last bit where that is more."""
    last_bit = allowed_error(right, right, dtype) / 2 / (1 + 3 / right.numel() ** 0.5)
    return max(rms(same[:2] - right), last_bit)


def check(same: dict[str, Tensor], right: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, t in right.items():
        kinds = {"mass": torch.float32, "lse": torch.promote_types(dtype, torch.float32)}
        wide = kinds.get(name, dtype)
        plain = usual(same[name], t, wide)
        if rms(t) == 0:
            continue
        assert_as_accurate(name, off(t, wide, plain), same[name], t)
        if t.numel() < 256:  # the rms of a few numbers may be anything up to some times the usual one
            continue
        with pytest.raises(AssertionError, match=f"^{name}: rms error"):
            assert_as_accurate(name, off(t, wide, 3 * plain), same[name], t)


@pytest.mark.parametrize("dtype", DTYPES)  # not float64, which has no better to be compared with
@pytest.mark.parametrize("shape, feature", CALLS)
def test_three_times_plain_pytorchs_error_is_seen_and_its_own_is_not(shape: str, feature: str, dtype: str) -> None:
    check(*attention(shape, feature, dtype), DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape, feature", NETWORKS)
def test_so_it_is_for_the_reparameterization(shape: str, feature: str, dtype: str) -> None:
    same, right = network(shape, feature, dtype)
    check({"kv": same.pop("kv")}, {"kv": right.pop("kv")}, DTYPES[dtype])
    check(same, right, torch.float32)  # the parameters'


@pytest.mark.parametrize("seed", range(6))
def test_a_gradient_of_one_number_is_held_to_no_lucky_draw(backend: str, seed: int) -> None:
    inputs = make_inputs("grouped", seed=seed, **FEATURES["number_bias"])
    inputs, words = suited(backend, inputs)
    if words:
        pytest.skip(words)
    same, right = same_dtype(inputs), exact(inputs)
    for name, t in ours(inputs, backend).items():
        assert_as_accurate(name, t, same[name], right[name])


def test_a_weight_of_exactly_one_allows_the_last_bit_of_its_terms(backend: str) -> None:
    """Its gradient is the difference of two equal sums: zero for plain PyTorch, but not for who adds them apart."""
    inputs = make_inputs(Shape(2, 3, 3, 8, 1, 0, 64), **FEATURES["bias"])
    assert inputs.dlse is not None
    inputs.dlse.zero_()
    inputs, words = suited(backend, inputs)
    if words:
        pytest.skip(words)
    same, right = same_dtype(inputs), exact(inputs)
    found = ours(inputs, backend)
    terms = rms(inputs.dout) * rms(inputs.tensors["v"].detach()) * 64**0.5  # of one sum
    for name in ("dq", "dk"):
        assert rms(right[name]) < 1e-12
        allowed = allowed_error(same[name], right[name], torch.float32)
        assert 0 < allowed < 1e-5 * terms
        assert_as_accurate(name, found[name], same[name], right[name])


def test_the_order_of_plain_pytorchs_sums_changes_its_rounding_alone() -> None:
    for shape, feature in CALLS:
        same, right = attention(shape, feature, "fp32")
        assert len(same["dq"]) == 5
        for one, other in zip(same["dq"], same["dq"][1:], strict=False):
            assert not torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(same["dq"][0], right["dq"], rtol=1e-3, atol=1e-4)


def test_roundings_are_one_unit_of_the_type_on_the_way_there_and_back() -> None:
    roundings = Roundings(torch.float32, 0)
    x = torch.full((20_000,), 3.0, dtype=torch.float64, requires_grad=True)
    y = roundings(x)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(x, 5.0))
    for relative in (y.detach() / 3 - 1, grad / 5 - 1):
        assert 0.95 < rms(relative) * 2**24 < 1.05
    assert torch.equal(roundings.gradient(x), x)
