"""torch.set_float32_matmul_precision("high"): float32 on tiles is three products of bfloat16, elsewhere what it was.

A number is two of bfloat16, and a product errs by at most three times 2^-18 of it. float32 rounds it and its sum by
2^-24 each: what is asked is an error of at most 2^7 times plain PyTorch's in float32, against float64 (`BAR`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from prefixattn import backends, prefix_attention
from prefixattn.attention.precision import splits_float32
from prefixattn.testing.attention import (
    FEATURES,
    Inputs,
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    ours,
    results,
    rms,
    same_dtype,
    suited,
)
from prefixattn.testing.varlen import packed_sequences
from tests.support import isa, threads

if reasons := backends.here()["cpu"]:
    pytest.skip("cpu: " + "; ".join(reasons), allow_module_level=True)

from prefixattn import _C

TILES = [name for name in _C.isas() if name.startswith("amx")]
OTHERS = [name for name in _C.isas() if name not in TILES]
BAR = 2.0**7
# what has vectors as a set of plain tiles has, and no tiles for float32
BESIDE = {"amx_plain": "portable", "amx_plain_avx512": "avx512_bf16"}


@contextmanager
def precision(setting: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def at(setting: str, inputs: Inputs) -> dict[str, Tensor]:
    with precision(setting):
        return ours(inputs, "cpu")


def taken(shape: Shape, feature: str, dtype: torch.dtype = torch.float32) -> Inputs:
    inputs, words = suited("cpu", make_inputs(shape, dtype, **FEATURES[feature]))
    assert not words
    return inputs


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(t, expected[name]) for name, t in found.items())


# whole groups of prefix rows, which are packed once a call, and a rest
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", TILES)
def test_every_feature(name: str, feature: str) -> None:
    inputs = taken(Shape(3, 2, 2, 37, 37, 37, 40), feature)
    with isa(name):
        found, full = at("high", inputs), ours(inputs, "cpu")
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs), BAR)
    for key in ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v"):
        assert not torch.equal(found[key], full[key]), key


# several chunks of keys and blocks of queries; grouped heads; few queries; head sizes that end within a tile
CASES = {
    "diagonal": (Shape(2, 2, 1, 150, 150, 33, 64), "causal"),
    "chunks": (Shape(1, 4, 2, 70, 300, 140, 32), "bias"),
    "padding": (Shape(2, 2, 2, 70, 180, 17, 72), "key_padding"),
    "two_queries": (Shape(3, 4, 2, 2, 170, 40, 64), "bank_sample_lengths"),
    "wide": (Shape(2, 2, 1, 40, 70, 65, 256), "memory_gelu"),
    "narrow": (Shape(2, 4, 2, 40, 33, 5, 8), "softcap"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TILES)
def test_tails_and_chunks(name: str, case: str) -> None:
    shape, feature = CASES[case]
    layout = {"layout": "dense"} if shape.H != shape.Hkv or shape.L != shape.S else {}
    inputs, words = suited("cpu", make_inputs(shape, **FEATURES[feature] | layout))
    assert not words
    with isa(name):
        found = at("high", inputs)
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs), BAR)


@pytest.mark.parametrize("name", TILES)
def test_dropout(name: str) -> None:
    inputs = make_inputs(Shape(3, 4, 2, 70, 20, 140, 72), softcap=2.0)
    inputs.options |= {"dropout_p": 0.1, "prefix_dropout_p": 0.4}
    torch.manual_seed(11)
    seed = torch.randint(2**62, (1,))  # what prefix_attention draws
    torch.manual_seed(11)
    with isa(name):
        found = at("high", inputs)
    assert_all_as_accurate(found, same_dtype(inputs, seed), exact(inputs, seed), BAR)


@pytest.mark.parametrize("name", TILES)
def test_packed_sequences(name: str) -> None:
    inputs = packed_sequences(([40, 0, 3, 70], [70, 5, 3, 40]), shape=Shape(4, 4, 2, 0, 0, 40, 24), causal=True)
    with isa(name):
        found = at("high", inputs)
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs), BAR)


@pytest.mark.parametrize("name", TILES)
def test_bits_depend_on_neither_threads_nor_what_is_wanted(name: str) -> None:
    inputs = taken(Shape(9, 2, 2, 70, 150, 40, 16), "causal")
    with isa(name):
        with threads(1):
            every = at("high", inputs)
        for wanted in (tuple(inputs.tensors), ("prefix_k", "prefix_v"), ("q",)):
            for key, t in inputs.tensors.items():
                t.requires_grad_(key in wanted)
            with threads(4):
                found = at("high", inputs)
            for key, t in found.items():
                assert torch.equal(t, every[key]), f"{key}, gradients of {wanted}"


@pytest.mark.parametrize("name", _C.isas())
def test_where_there_are_no_tiles_or_no_float32_it_changes_nothing(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = taken(Shape(2, 4, 2, 37, 41, 40, 40), "bank_sample_lengths", dtype)
        with isa(name):
            same = equal(at("high", inputs), ours(inputs, "cpu"))
        assert same == (name in OTHERS or dtype != torch.float32), dtype


@pytest.mark.parametrize("name", [name for name in BESIDE if name in TILES])
def test_highest_is_what_vectors_alone_compute(name: str) -> None:
    if BESIDE[name] not in OTHERS:
        pytest.skip(f"{BESIDE[name]}: {_C.isa_objections()[BESIDE[name]]}")
    inputs = taken(Shape(2, 2, 2, 37, 37, 40, 40), "memory_gelu")
    with isa(BESIDE[name]):
        expected = ours(inputs, "cpu")
    with isa(name):
        assert equal(ours(inputs, "cpu"), expected) and equal(at("highest", inputs), expected)


@pytest.mark.parametrize("name", TILES)
def test_medium_is_high(name: str) -> None:
    inputs = taken(Shape(1, 2, 2, 37, 41, 40, 40), "causal")
    with isa(name):
        assert equal(at("medium", inputs), at("high", inputs))


@pytest.mark.parametrize("scale", [None, 1e4])
@pytest.mark.parametrize("first, second", [("high", "highest"), ("highest", "high")])
@pytest.mark.parametrize("name", TILES)
def test_a_call_keeps_the_arithmetic_that_it_began_with(
    name: str, first: str, second: str, scale: float | None
) -> None:
    """The backward computes scores again; of scores of 1e5 the other arithmetic's differ by more than 1."""
    inputs = make_inputs(Shape(2, 2, 2, 37, 41, 40, 64), causal=True, scale=scale)
    with isa(name):
        whole = at(first, inputs)
        with precision(first):
            made = inputs.call("cpu", return_lse=True, return_prefix_mass=True)
        with precision(second):
            mixed = results(inputs, *made)
    assert equal(mixed, whole)
    assert all(t.isfinite().all() for t in mixed.values())


@pytest.mark.parametrize("scale", [1e4, -0.3, 0.0])
@pytest.mark.parametrize("name", TILES)
def test_both_passes_find_the_same_scores(name: str, scale: float) -> None:
    """Of scores of 1e5 each is right to 1 at best; but weights of a query sum to one, and so do those found again."""
    inputs = make_inputs(Shape(2, 2, 2, 37, 41, 40, 64), causal=True, scale=scale)
    with torch.no_grad():  # dv and dprefix_v, summed over keys, are dout summed over queries
        inputs.tensors["v"].normal_(generator=torch.Generator("cpu").manual_seed(1))
    with isa(name):
        found = at("high", inputs)
    assert inputs.dout is not None
    summed = found["dv"].double().sum((0, 2)) + found["dprefix_v"].double().sum(1)
    expected = inputs.dout.double().sum((0, 2))
    assert rms(summed - expected) <= 2.0**-15 * rms(expected)


@pytest.mark.parametrize("name", TILES)
def test_one_query_a_head_stays_exact_in_its_forward(name: str) -> None:
    inputs = make_inputs(Shape(3, 6, 2, 1, 150, 70, 64))
    with isa(name):
        found, full = at("high", inputs), ours(inputs, "cpu")
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs), BAR)
    for key in ("out", "lse", "mass"):
        assert torch.equal(found[key], full[key]), key


@pytest.mark.parametrize("name", TILES)
def test_a_nan_reaches_its_own_queries_alone_and_not_the_next_call(name: str) -> None:
    inputs = make_inputs(Shape(2, 2, 2, 40, 41, 37, 40))
    with isa(name), threads(1):
        before = at("high", inputs)
        with torch.no_grad():
            kept = inputs.tensors["q"][1, 1, 7, 3].clone()
            inputs.tensors["q"][1, 1, 7, 3] = float("nan")
        spoilt = at("high", inputs)["out"]
        with torch.no_grad():
            inputs.tensors["q"][1, 1, 7, 3] = kept
        assert equal(at("high", inputs), before)
    assert spoilt[1, 1, 7].isnan().all()
    spoilt[1, 1, 7] = before["out"][1, 1, 7]
    assert torch.equal(spoilt, before["out"])


@pytest.mark.parametrize("name", TILES)
def test_a_product_with_an_infinity_is_nan(name: str) -> None:
    inputs = make_inputs(Shape(1, 2, 2, 40, 41, 37, 40), grad=False)
    for value in (float("inf"), 3.4e38):
        inputs.tensors["v"][0, 1, 7, 3] = value
        with isa(name):
            found, full = at("high", inputs)["out"], ours(inputs, "cpu")["out"]
        assert found[0, 1, :, 3].isnan().all() and not full[0, 1, :, 3].isnan().any()
        others = found.clone()
        others[0, 1, :, 3] = 0
        assert others.isfinite().all()


@pytest.mark.parametrize("name", TILES)
def test_an_exported_program_keeps_its_setting(name: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            out = prefix_attention(*tensors, backend="cpu")
            assert isinstance(out, Tensor)
            return out

    tensors = tuple(make_inputs(Shape(1, 2, 2, 37, 41, 40, 40), grad=False).tensors.values())
    with isa(name):
        for made in ("high", "highest"):
            with precision(made):
                program, expected = torch.export.export(Attention(), tensors).module(), Attention()(*tensors)
            with precision("highest" if made == "high" else "high"):
                assert torch.equal(program(*tensors), expected)


@pytest.mark.parametrize("name", TILES)
def test_a_compiled_call_follows_the_setting(name: str) -> None:
    inputs = make_inputs(Shape(1, 2, 2, 37, 41, 40, 40))
    torch.compiler.reset()
    call = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")

    def compiled(setting: str) -> dict[str, Tensor]:
        arguments = {**inputs.tensors, **inputs.options, "backend": "cpu"}
        with precision(setting):
            return results(inputs, *call(**arguments, return_lse=True, return_prefix_mass=True))

    with isa(name):
        for setting in ("highest", "high", "highest"):
            assert equal(compiled(setting), at(setting, inputs)), setting


def test_the_switch_is_that_of_torchs_products_on_a_cpu() -> None:
    for setting, splits in (("highest", False), ("high", True), ("medium", True)):
        with precision(setting):
            assert splits_float32() == splits
    assert not splits_float32()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert not splits_float32()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not splits_float32()
