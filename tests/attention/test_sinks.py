"""Sinks beside what the op's cases ask of every backend: bad input, dropout, gradients of the sinks alone."""

from typing import Any

import pytest
import torch

from prefixattn import prefix_attention
from prefixattn.testing.attention import (
    FEATURES,
    INF,
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    ours,
    results,
    same_dtype,
)
from tests.support import accepted

BAD = {
    "shape": (lambda H: torch.zeros(H + 1), r"sinks has shape \[4\], expected \[H=3\]"),
    "axes": (lambda H: torch.zeros(1, H), r"sinks has shape \[1, 3\]"),
    "type": (lambda H: torch.zeros(H, dtype=torch.float64), "sinks is torch.float64, expected float32"),
    "integers": (lambda H: torch.zeros(H, dtype=torch.int64), "sinks is torch.int64"),
    "device": (lambda H: torch.zeros(H, device="meta"), "sinks is on meta"),
    "no tensor": (lambda H: 0.5, "sinks is a float"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_sinks_are_refused_in_words(what: str) -> None:
    made, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        make_inputs("ragged").call(sinks=made(3))


def test_a_sink_that_nothing_reaches_changes_nothing(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", causal=True))
    without = ours(inputs, backend)
    far = ours(inputs, backend, sinks=torch.full((3,), -1e4))
    for name, t in without.items():
        torch.testing.assert_close(far[name], t, rtol=1e-6, atol=1e-6)


def test_queries_that_see_no_key_have_the_sink_alone(backend: str) -> None:
    inputs = accepted(backend, make_inputs("nothing", sinks="float"))
    found = ours(inputs, backend)
    assert not found["out"].any() and not found["mass"].any()
    sinks = inputs.tensors["sinks"].detach()
    torch.testing.assert_close(found["lse"], sinks[None, :, None].expand_as(found["lse"]).to(found["lse"].dtype))
    assert all(t.isfinite().all() for t in found.values())
    torch.testing.assert_close(found["dsinks"], inputs.dlse.sum((0, 2)).to(sinks.dtype))


@pytest.mark.parametrize("dropped", [{"dropout_p": 0.3}, {"prefix_dropout_p": 0.25}, {"dropout_p": 1.0}])
def test_dropout_leaves_the_sink_in_the_sum(backend: str, dropped: dict[str, float]) -> None:
    inputs = accepted(backend, make_inputs("ragged", **FEATURES["sinks"]))
    torch.manual_seed(5)
    found = results(inputs, *inputs.call(backend, return_lse=True, return_prefix_mass=True, **dropped))
    if dropped.get("dropout_p") == 1:
        kept = exact(inputs)
        assert not found["out"].any()
        torch.testing.assert_close(found["lse"].double(), kept["lse"], rtol=1e-5, atol=1e-5)
        return
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    inputs.options |= dropped
    assert_all_as_accurate(found, same_dtype(inputs, seed), exact(inputs, seed))


def test_sinks_trained_alone_have_the_gradient_that_they_have_beside_others(backend: str) -> None:
    inputs = accepted(backend, make_inputs("grouped", **FEATURES["sinks"]))
    every = ours(inputs, backend)
    for name, t in inputs.tensors.items():
        t.requires_grad_(name == "sinks")
    some = ours(inputs, backend)
    assert set(some) == {"out", "lse", "mass", "dsinks"}
    torch.testing.assert_close(some["dsinks"], every["dsinks"])


def test_without_a_batch_and_under_autocast() -> None:
    inputs = make_inputs(Shape(1, 3, 3, 9, 9, 4, 16), grad=False, **FEATURES["sinks"])
    one: dict[str, Any] = {n: t[0] if n in ("q", "k", "v") else t for n, t in inputs.tensors.items()}
    torch.testing.assert_close(prefix_attention(**one, is_causal=True), inputs.call()[0])
    with torch.autocast("cpu", torch.bfloat16):
        low = inputs.call()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), inputs.call(), rtol=0.05, atol=0.05)


def test_lse_of_an_unseen_key_never_reaches_a_gradient() -> None:
    inputs = make_inputs("ragged", **FEATURES["sinks_float32"])
    inputs.options["prefix_lengths"] = torch.zeros(3, dtype=torch.int64)  # blind rows then see nothing
    found = ours(inputs)
    assert not (found["lse"] == -INF).any() and all(t.isfinite().all() for t in found.values())
    assert not found["out"][..., ::3, :].any()
