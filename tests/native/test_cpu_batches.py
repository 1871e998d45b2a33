"""To the bit, with no switch: a sample's results of the CPU kernels in other batches, padded and packed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from prefixattn import backends
from prefixattn.testing.attention import Inputs, Shape, make_inputs, ours
from prefixattn.testing.batches import alone, differing, of_sequence, rows_of_samples, same_bits, samples, sequences
from prefixattn.testing.varlen import packed_sequences
from tests.support import isa, threads

if reasons := backends.here()["cpu"]:
    pytest.skip("cpu: " + "; ".join(reasons), allow_module_level=True)

from prefixattn import _C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# B is none of 3, the prefixes of a bank
CASES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "shared": (Shape(4, 4, 2, 37, 41, 33, 40), {"causal": True}),  # fused for one sample, with threads split for many
    "per_sample": (Shape(4, 2, 2, 70, 150, 140, 16), {"prefixes": "per_sample", "mask": "B11S", "memory": "as_prefix"}),
    "bank": (Shape(5, 2, 1, 20, 300, 65, 24), {"prefixes": "bank", "lengths": "B", "softcap": 0.7}),
    "decoding": (Shape(5, 4, 2, 1, 75, 70, 24), {"mask": "BHLS", "blind": True}),
    "window": (Shape(4, 2, 2, 150, 170, 40, 16), {"window": (9, 2), "mask": "B11S"}),
    "window_prefix": (Shape(4, 2, 1, 70, 290, 70, 16), {"window": (99, 0), "prefix_in_window": True}),
    "sinks": (Shape(5, 1, 1, 7, 9, 3, 8), {"sinks": "float", "prefixes": "per_sample"}),
    "dropout": (Shape(4, 2, 1, 37, 20, 33, 16), {"prefixes": "per_sample"}),
}


def seeded(inputs: Inputs) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return ours(inputs, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _C.isas())
def test_a_sample_has_the_same_bits_in_every_batch(name: str, dtype: str) -> None:
    with isa(name), threads(1):
        for case, (shape, options) in CASES.items():
            inputs = make_inputs(shape, DTYPES[dtype], **options)
            if case == "dropout":  # which numbers samples by their places
                inputs.options |= {"dropout_p": 0.3, "prefix_dropout_p": 0.2}
            whole, names = seeded(inputs), rows_of_samples(inputs)
            for keep in ([0], [0, 1]) if case == "dropout" else ([shape.B - 1], [2, 0]):
                assert not differing(whole, seeded(samples(inputs, keep)), names, keep), f"{case}, samples {keep}"


@pytest.mark.parametrize("case", ["shared", "per_sample", "window", "window_prefix", "decoding"])
@pytest.mark.parametrize("name", _C.isas())
def test_nor_do_threads_matter(name: str, case: str) -> None:
    """Which decide how work is cut: for many in a small batch, for one in a large batch."""
    shape, options = CASES[case]
    inputs = make_inputs(shape, torch.bfloat16, **options)
    with isa(name):
        with threads(3):
            part = ours(samples(inputs, [1]), "cpu")
        with threads(1):
            whole = ours(inputs, "cpu")
    assert not differing(whole, part, rows_of_samples(inputs), [1])


def test_where_in_memory_a_number_lies_does_not_matter_to_sinks() -> None:
    """Nor whether torch takes it with others, which it does not at the end of a tensor."""
    inputs = make_inputs(Shape(300, 1, 1, 1, 2, 1, 8), torch.bfloat16, sinks="float", grad=False)
    whole = ours(inputs, "cpu")
    for first in range(0, 300, 3):
        keep = [first, first + 1, first + 2]
        assert not differing(whole, ours(samples(inputs, keep), "cpu"), ["out", "lse", "mass"], keep)


def padded(inputs: Inputs, n: int, left: bool) -> Inputs:
    """With n more own keys, on one side, that a mask hides."""
    sides = (n, 0) if left else (0, n)
    tensors = dict(inputs.tensors)
    for name in "kv":
        tensors[name] = pad(tensors[name], (0, 0, *sides), value=3.0)
    mask = pad(torch.ones(1, 1, 1, inputs.tensors["k"].shape[2], dtype=torch.bool), sides, value=False)
    return replace(inputs, tensors=tensors, options={**inputs.options, "attn_mask": mask})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _C.isas())
def test_keys_that_padding_hides_change_no_bit_of_a_forward(name: str, dtype: str) -> None:
    with isa(name), threads(1):
        for shape in (Shape(1, 4, 2, 37, 150, 5, 40), Shape(1, 2, 1, 1, 75, 70, 24), Shape(1, 2, 1, 9, 20, 290, 16)):
            inputs = make_inputs(shape, DTYPES[dtype], grad=False)
            right = ours(inputs, "cpu")
            for n, left in ((3, False), (130, False), (3, True), (130, True)):
                found = ours(padded(inputs, n, left), "cpu")
                assert not [key for key in right if not same_bits(found[key], right[key])], f"{shape}, {n}, {left}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _C.isas())
def test_a_packed_sequence_has_the_bits_of_a_sample(name: str, dtype: str) -> None:
    """And so the same beside others as beside none."""
    sizes, shape = ([3, 300, 40, 6], [5, 310, 40, 9]), Shape(0, 2, 1, 0, 0, 37, 16)
    with isa(name), threads(1):
        for options in ({"causal": True}, {"window": (20, 4), "memory": "as_prefix"}):
            inputs = packed_sequences(sizes, DTYPES[dtype], shape, prefixes="per_sample", **options)
            whole = ours(inputs, "cpu")
            for i in range(4):
                one = of_sequence(ours(sequences(inputs, [i]), "cpu"), sequences(inputs, [i]), 0)
                sample = ours(alone(inputs, i), "cpu")
                for key, t in of_sequence(whole, inputs, i).items():
                    assert same_bits(t, one[key]), f"{key} of sequence {i}, packed alone, {options}"
                    assert same_bits(t, sample[key]), f"{key} of sequence {i}, as a sample, {options}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _C.isas())
def test_a_sequence_without_queries_changes_nothing(name: str, dtype: str) -> None:
    sizes, shape = ([3, 0, 40, 0], [5, 7, 40, 0]), Shape(0, 2, 1, 0, 0, 37, 16)
    with isa(name), threads(1):
        for options in ({"causal": True}, {"window": (20, 4)}, {}):
            inputs = packed_sequences(sizes, DTYPES[dtype], shape, prefixes="per_sample", **options)
            whole, others = ours(inputs, "cpu"), ours(sequences(inputs, [0, 2]), "cpu")
            for at, i in enumerate((0, 2)):
                mine, right = of_sequence(whole, inputs, i), of_sequence(others, sequences(inputs, [0, 2]), at)
                assert not [key for key, t in mine.items() if not same_bits(t, right[key])], f"sequence {i}, {options}"
            assert not whole["dprefix_k"][1::2].any()
