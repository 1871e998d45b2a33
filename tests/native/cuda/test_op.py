"""The CUDA kernels against float64: on a GPU with PREFIXATTN_TEST_DEVICE=cuda, and else on the host machine.

That machine runs the same sources thread by thread. It stops at a race, at a copy that was not waited for and at an
access outside the tensors, and draws the order of warps and blocks from a seed.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.testing.attention import (
    FEATURES,
    INF,
    Inputs,
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    objections,
    ours,
    ours_packed,
    packed,
    parts,
    same_dtype,
    suited,
)
from prefixattn.testing.batches import differing, rows_of_samples, samples
from tests.attention.test_dropout import drawn
from tests.conftest import DEVICE
from tests.cuda_machine import Watched, host_machine
from tests.grids import DTYPES, covered

SHAPES = {  # B, H, Hkv, L, S, P, and the head size beside
    "ragged": (2, 3, 3, 37, 37, 5),
    "no_prefix": (1, 2, 2, 33, 33, 0),
    "prefix_of_one": (2, 2, 2, 17, 17, 1),
    "single": (1, 1, 1, 1, 1, 1),
    "no_keys": (2, 2, 2, 7, 0, 10),
    "more_queries": (1, 2, 2, 40, 9, 5),
    "grouped": (2, 6, 2, 20, 20, 64),
    "tile_full": (1, 2, 2, 47, 47, 17),
    "tile_past": (1, 1, 1, 64, 64, 65),
    "several_runs": (9, 1, 1, 18, 18, 4),
    "few_queries": (1, 4, 1, 3, 130, 257),  # longer than 256 from here on
    "one_query": (2, 2, 2, 1, 70, 200),
    "long": (1, 2, 1, 150, 150, 130),
    "long_prefix": (1, 1, 1, 18, 18, 300),
}
OF_KEYS = {  # masks of keys, beside those of FEATURES
    "one_padding": {"mask": "111S"},
    "padding_by_head": {"mask": "1H1S", "causal": True},
    "bias_by_head": {"mask": "BH1S", "mask_dtype": "float32", "lengths": "B"},
}
ASKED = FEATURES | OF_KEYS
WITHOUT = "memory", "softcap", "window"  # what the kernels have not
TAKEN = [
    name
    for name, options in ASKED.items()
    if not any(word in options for word in WITHOUT) and options.get("mask", "1")[-2:-1] in ("", "1")
]
HEAD_DIMS = 64, 128
SIXTEEN = "bf16", "fp16"
SEEDS = 1, 2, 3


@pytest.fixture(autouse=True)
def machine() -> Iterator[Watched | None]:
    if DEVICE == "cuda":
        if reasons := backends.here()["cuda"]:
            pytest.skip("; ".join(reasons))
        yield None
        return
    with host_machine() as watched:
        watched.set_seed(SEEDS[0])
        yield watched


def test_where_it_works_it_is_said_to() -> None:
    assert backends.here()["cuda"] == []


def shaped(shape: str, D: int) -> Shape:
    return Shape(*SHAPES[shape], D)


@cache
def case(shape: str, D: int, feature: str, dtype: str) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and the two answers to compare with; a mask that wants a gradient is another backend's."""
    inputs = suited("cuda", make_inputs(shaped(shape, D), DTYPES[dtype], **ASKED[feature]))[0]
    return inputs, same_dtype(inputs), exact(inputs)


def accepted(inputs: Inputs, **options: Any) -> Inputs:
    words = objections("cuda", inputs, **options)
    assert not words, words
    return inputs


@pytest.mark.parametrize("dtype, D, shape, feature", covered(SIXTEEN, HEAD_DIMS, SHAPES, ["plain", "causal"]))
def test_shapes(dtype: str, D: int, shape: str, feature: str) -> None:
    inputs, same, right = case(shape, D, feature, dtype)
    assert_all_as_accurate(ours(accepted(inputs), "cuda"), same, right)


CROWDED = ["ragged", "grouped", "few_queries", "long"]
FEATURED = [f for f in TAKEN if f not in ("plain", "causal")]


@pytest.mark.parametrize("dtype, D, shape, feature", covered(SIXTEEN, HEAD_DIMS, CROWDED, FEATURED))
def test_features(dtype: str, D: int, shape: str, feature: str) -> None:
    inputs, same, right = case(shape, D, feature, dtype)
    assert_all_as_accurate(ours(accepted(inputs), "cuda"), same, right)


@pytest.mark.parametrize("D, Dv, feature", [(64, 40, "sinks"), (24, 64, "bank_lengths")])
def test_values_of_another_width(D: int, Dv: int, feature: str) -> None:
    inputs = accepted(make_inputs(shaped("prefix_of_one", D), torch.float16, value_width=Dv, **FEATURES[feature]))
    assert_all_as_accurate(ours(inputs, "cuda"), same_dtype(inputs), exact(inputs))


DROPPED = {
    "plain": {},
    "causal": {"causal": True},
    "bank": {"prefixes": "bank", "lengths": "T", "causal": True, "mask": "B11S"},
}


@pytest.mark.parametrize("dtype, D, shape, feature", covered(SIXTEEN, HEAD_DIMS, CROWDED, DROPPED))
def test_prefix_dropout(dtype: str, D: int, shape: str, feature: str) -> None:
    inputs = make_inputs(shaped(shape, D), DTYPES[dtype], **DROPPED[feature])
    inputs.options["prefix_dropout_p"] = 0.3
    accepted(inputs)  # which draws a seed
    seed = drawn(11)
    assert_all_as_accurate(ours(inputs, "cuda"), same_dtype(inputs, seed), exact(inputs, seed))


@pytest.mark.parametrize("shape, feature", [("ragged", "causal"), ("grouped", "plain"), ("long", "causal")])
def test_a_packed_projection(shape: str, feature: str) -> None:
    B, _, Hkv, L, _, P = SHAPES[shape]
    inputs = accepted(make_inputs(Shape(B, Hkv, Hkv, L, L, P, 64), torch.bfloat16, **FEATURES[feature]))
    found = ours_packed(packed(inputs), "cuda")
    found |= {"d" + name: grad for name, grad in parts(found.pop("dqkv")).items()}
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs))


def test_without_a_key_out_is_zero() -> None:
    found = ours(accepted(make_inputs(Shape(1, 2, 2, 5, 0, 0, 64), torch.bfloat16)), "cuda")
    assert not found["out"].any() and (found["lse"] == -INF).all() and not found["dq"].any()


REPEATED = [("ragged", "plain"), ("several_runs", "bank_lengths"), ("grouped", "causal"), ("long", "key_padding")]


@pytest.mark.parametrize("shape, feature", REPEATED)
def test_repeats_to_the_bit(shape: str, feature: str, machine: Watched | None) -> None:
    """On the host machine in other orders of blocks, warps and lanes."""
    inputs = accepted(case(shape, 64, feature, "bf16")[0])
    first = ours(inputs, "cuda")
    for seed in SEEDS[1:]:
        if machine is not None:
            machine.set_seed(seed)
        for name, t in ours(inputs, "cuda").items():
            assert torch.equal(t, first[name]), name


@pytest.mark.parametrize("feature", ["causal", "per_sample", "bank_sample_lengths", "sinks"])
@pytest.mark.parametrize("S", [18, 250])
def test_a_sample_has_the_same_bits_in_every_batch(S: int, feature: str) -> None:
    """With no switch; of kernels for long axes all but the gradients of prefixes per sample."""
    inputs = accepted(make_inputs(Shape(4, 2, 1, 18, S, 9, 64), torch.bfloat16, **FEATURES[feature]))
    names = [name for name in rows_of_samples(inputs) if S == 18 or "prefix" not in name]
    assert not differing(ours(inputs, "cuda"), ours(samples(inputs, [3]), "cuda"), names, [3])


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("shape", ["ragged", "long"])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "prefix_k", "prefix_v", "q k v", "prefix_k prefix_v"])
def test_gradients_that_are_wanted_alone(shape: str, wanted: str, D: int) -> None:
    inputs, same, right = case(shape, D, "causal", "bf16")
    tensors = {n: t.detach().requires_grad_(n in wanted.split()) for n, t in inputs.tensors.items()}
    some = ours(Inputs(tensors, inputs.options, inputs.dout, inputs.dlse), "cuda")
    assert {name[1:] for name in some if name[0] == "d"} == set(wanted.split())
    assert_all_as_accurate(some, *({n: answer[n] for n in some} for answer in (same, right)))


@pytest.mark.parametrize("shape", ["ragged", "long"])
def test_what_lies_past_a_length_is_never_read(shape: str) -> None:
    inputs = accepted(make_inputs(shaped(shape, 64), torch.bfloat16, **FEATURES["bank_lengths"]))
    right = ours(inputs, "cuda")
    with torch.no_grad():
        for name in ("prefix_k", "prefix_v"):
            for row, length in enumerate(inputs.options["prefix_lengths"].tolist()):
                inputs.tensors[name][row, :, length:] = torch.nan
            inputs.tensors[name][1] = torch.nan  # the row that prefix_ids never names
    for name, t in ours(inputs, "cuda").items():
        assert torch.equal(t, right[name]), name


@pytest.mark.parametrize("shape", ["ragged", "long"])
def test_what_padding_hides_reaches_nothing(shape: str) -> None:
    """Neither out nor a gradient, whatever is there: these kernels fill hidden rows with zeros."""
    inputs = accepted(make_inputs(shaped(shape, 64), torch.bfloat16, **FEATURES["key_padding"]))
    right = ours(inputs, "cuda")
    hidden = ~inputs.options["attn_mask"][:, 0, 0, :, None]
    with torch.no_grad():
        for name in ("k", "v"):
            inputs.tensors[name].masked_fill_(hidden[:, None], torch.nan)
    for name, t in ours(inputs, "cuda").items():
        assert torch.equal(t, right[name]), name


def test_rows_that_do_not_lie_as_they_should_are_copied() -> None:
    inputs = accepted(make_inputs(shaped("ragged", 64), torch.bfloat16))
    right = ours(inputs, "cuda")
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        t = inputs.tensors[name].detach()
        moved = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
        assert moved.data_ptr() % 16 and torch.equal(moved, t)
        inputs.tensors[name] = moved.requires_grad_()
    for name, t in ours(inputs, "cuda").items():
        assert torch.equal(t, right[name]), name
