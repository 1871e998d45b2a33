"""The Triton kernels beyond what every backend is asked: each kernel and kind of tile, and what a call launches."""

from collections.abc import Iterator

import pytest
import torch

from prefixattn import backends
from prefixattn.attention import triton
from prefixattn.testing.attention import (
    FEATURES,
    Inputs,
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    ours,
    same_dtype,
)
from tests.grids import DTYPES, covered, turns

if reasons := backends.here()["triton"]:
    pytest.skip("triton: " + "; ".join(reasons), allow_module_level=True)

from prefixattn.attention.call import Needs
from prefixattn.kernels import launch_bwd, launch_fwd, table
from prefixattn.kernels.call import OWN, PREFIX, SPLIT, Call, tile_width
from prefixattn.kernels.table import Launch

KERNELS = "fwd", "fwd_medium", "fwd_short", "fwd_fold", "bwd_short", "bwd_keys", "bwd_prefix", "bwd_queries"


def check(inputs: Inputs, seed: torch.Tensor | None = None) -> None:
    assert_all_as_accurate(ours(inputs, "triton"), same_dtype(inputs, seed), exact(inputs, seed))


@pytest.fixture
def long_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence is short."""
    monkeypatch.setattr(launch_fwd, "SHORT_KEYS", -1)
    monkeypatch.setattr(launch_bwd, "HEAD_KEYS", -1)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 16, so that small shapes have many of them, whole ones among them."""
    table.trial = {name: Launch(16, 16, 4, 1) for name in KERNELS}
    yield
    table.trial = {}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run, in order."""
    names: list[str] = []

    class Recorded:
        def __init__(self, name: str, kernel: object) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            names.append(self.name.removeprefix("prefix_attn_"))
            return self.kernel[grid]  # type: ignore[index]

    for module in (launch_fwd, launch_bwd):
        for name, kernel in vars(module).copy().items():
            if name.startswith("prefix_attn_"):
                monkeypatch.setattr(module, name, Recorded(name, kernel))
    return names


LONG_SHAPES = {
    "ragged": Shape(2, 3, 3, 37, 37, 5, 32),
    "whole_tiles": Shape(1, 2, 2, 64, 64, 64, 32),
    "two_tiles": Shape(1, 1, 1, 130, 130, 70, 16),
    "grouped": Shape(2, 4, 2, 20, 70, 17, 24),
    "no_keys": Shape(2, 2, 2, 7, 0, 10, 32),
    "no_prefix": Shape(1, 2, 2, 33, 33, 0, 16),
    "more_queries": Shape(1, 2, 2, 40, 9, 5, 16),
    "one_query": Shape(2, 2, 1, 1, 70, 130, 16),
}


@pytest.mark.usefixtures("long_kernels")
@pytest.mark.parametrize("shape, order, dtype", covered(LONG_SHAPES, ["plain", "causal"], ["fp32", "fp16"]))
def test_long_kernels(shape: str, order: str, dtype: str, launches: list[str]) -> None:
    check(make_inputs(LONG_SHAPES[shape], DTYPES[dtype], causal=order == "causal"))
    assert "fwd" in launches and not {"fwd_short", "bwd_short"} & set(launches)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "S, P, kernels, order", covered([31, 32, 33], [1, 15, 16, 40], ["short", "long"], ["plain", "causal"])
)
def test_many_tiles(S: int, P: int, kernels: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles, a tail, a prefix that fits the tail's padding or goes past it."""
    if kernels == "long":
        monkeypatch.setattr(launch_fwd, "SHORT_KEYS", -1)
        monkeypatch.setattr(launch_bwd, "HEAD_KEYS", -1)
    check(make_inputs(Shape(2, 2, 2, S, S, P, 16), torch.float16, causal=order == "causal"))


@pytest.mark.usefixtures("long_kernels")
@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in ("plain", "causal")])
def test_long_kernels_take_every_feature(feature: str) -> None:
    check(make_inputs(Shape(2, 4, 2, 37, 70, 21, 32), torch.float32, **FEATURES[feature]))


FOLDED = {
    "decoding": (Shape(5, 2, 2, 1, 40, 300, 32), {}),
    "grouped": (Shape(3, 4, 2, 2, 33, 513, 16), {"causal": True}),
    "lengths": (Shape(4, 2, 2, 3, 20, 256, 16), {"lengths": "B", "causal": True}),
    "bank": (Shape(5, 2, 2, 1, 40, 300, 16), {"prefixes": "bank"}),
    "bank_lengths": (Shape(5, 2, 1, 2, 9, 300, 16), {"prefixes": "bank", "lengths": "T"}),
    "no_keys": (Shape(3, 2, 2, 2, 0, 300, 16), {}),
    "memory": (Shape(5, 2, 2, 1, 40, 300, 16), {"prefixes": "bank", "memory": "as_prefix", "phi": "gelu"}),
    "softcap": (Shape(5, 2, 2, 1, 40, 300, 32), {"softcap": 1.0, "memory": "shared"}),
    "softcap_bank": (
        Shape(4, 2, 1, 2, 9, 300, 16),
        {"softcap": 50.0, "prefixes": "bank", "lengths": "B", "causal": True},
    ),
}


@pytest.mark.parametrize("dtype, case", turns(["fp32", "fp16"], FOLDED))
def test_few_queries_read_a_long_prefix_once(dtype: str, case: str, launches: list[str]) -> None:
    shape, options = FOLDED[case]
    check(make_inputs(shape, DTYPES[dtype], **options))
    assert launches[:2] == ["fwd_fold", "fwd"]


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_folding_drops_as_the_reference_does(softcap: float | None) -> None:
    inputs = make_inputs(FOLDED["grouped"][0], causal=True, softcap=softcap)
    inputs.options["dropout_p"] = 0.3
    check(inputs, drawn(5))


def drawn(seed: int) -> torch.Tensor:
    """The number that prefix_attention draws after torch.manual_seed."""
    torch.manual_seed(seed)
    number = torch.randint(2**62, (1,))
    torch.manual_seed(seed)
    return number


CAPPED = {
    "far_below": {
        "softcap": 50.0,
        "causal": True,
        "layout": "packed",
    },  # scores keep their own last bits, not the cap's
    "far_above": {"softcap": 0.3, "scale": 3.0},
    "negative_scale": {"softcap": 1.0, "scale": -0.5, "causal": True},
    "blind_rows": {"softcap": 1.0, "mask": "BHLS", "blind": True, "causal": True},
    "bias": {"softcap": 1.0, "mask": "1HLS", "mask_dtype": "float", "causal": True},
    "key_bias": {"softcap": 1.0, "mask": "B11S", "mask_dtype": "float"},
    "bank": {"softcap": 1.0, "prefixes": "bank", "lengths": "T", "causal": True},
    "per_sample": {"softcap": 1.0, "prefixes": "per_sample", "lengths": "B", "mask": "B11S"},
    "memory": {"softcap": 1.0, "prefixes": "bank", "memory": "as_prefix", "phi": "gelu", "causal": True},
}


@pytest.fixture(params=["short", "long"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "long":
        request.getfixturevalue("long_kernels")
    name: str = request.param
    return name


@pytest.mark.parametrize(
    "kernels, dtype, case", covered(["short", "long"], ["fp32", "fp16"], CAPPED), indirect=["kernels"]
)
def test_a_softcap_with_each_feature(case: str, dtype: str, kernels: str, launches: list[str]) -> None:
    inputs = make_inputs(Shape(2, 4, 2, 37, 41, 21, 24), DTYPES[dtype], **CAPPED[case])
    if kernels == "short" and "attn_mask" in inputs.tensors:  # whose gradient is for the long kernels
        inputs.tensors["attn_mask"].requires_grad_(False)
    check(inputs)
    short = {"fwd_short", "bwd_short"}
    assert short <= set(launches) if kernels == "short" else not short & set(launches)


@pytest.mark.parametrize("features", [{"causal": True}, {"prefixes": "bank", "mask": "BHLS", "mask_dtype": "float"}])
def test_a_softcap_comes_after_prefix_dropout(features: dict[str, str | bool], kernels: str) -> None:
    inputs = make_inputs(Shape(2, 4, 2, 37, 41, 21, 24), softcap=1.0, **features)  # type: ignore[arg-type]
    inputs.options |= {"dropout_p": 0.2, "prefix_dropout_p": 0.4}
    if kernels == "short" and "attn_mask" in inputs.tensors:
        inputs.tensors["attn_mask"].requires_grad_(False)
    check(inputs, drawn(7))


@pytest.mark.parametrize("shape", [Shape(1, 2, 2, 9, 9, 5, 16), FOLDED["decoding"][0]], ids=["short", "folded"])
def test_a_nan_stays_one_under_a_softcap(shape: Shape) -> None:
    inputs = make_inputs(shape, grad=False, softcap=1.0)
    inputs.tensors["prefix_k"][..., 0, 0] = torch.nan
    assert inputs.call("triton").isnan().any()


def test_what_one_row_of_a_bank_holds_reaches_no_other(launches: list[str]) -> None:
    inputs = make_inputs(FOLDED["bank"][0], prefixes="bank", grad=False)
    right = inputs.call("triton")
    inputs.tensors["prefix_v"][2] = torch.nan
    nan = inputs.call("triton").isnan().flatten(1).any(1)
    assert launches == ["fwd_fold", "fwd"] * 2
    assert torch.equal(nan, inputs.options["prefix_ids"] == 2)
    assert torch.equal(inputs.call("triton")[~nan], right[~nan])


WANTED = {
    "all_short": (Shape(2, 2, 2, 37, 37, 5, 32), "q k v prefix_k prefix_v", ["bwd_short", "bwd_reduce"]),
    "all_long": (
        Shape(1, 2, 2, 37, 37, 5, 32),  # too few heads for a program each
        "q k v prefix_k prefix_v",
        ["bwd_prefix", "bwd_keys", "bwd_queries"],
    ),
    "prefix": (Shape(2, 2, 2, 37, 37, 5, 32), "prefix_k prefix_v", ["bwd_prefix"]),
    "prefix_values": (Shape(2, 2, 2, 37, 37, 5, 32), "prefix_v", ["bwd_prefix"]),
    "wide_prefix": (Shape(1, 2, 2, 7, 7, 70, 32), "prefix_k", ["bwd_delta", "bwd_prefix"]),
    "queries": (Shape(2, 2, 2, 37, 37, 5, 32), "q", ["bwd_delta", "bwd_queries"]),
    "values": (Shape(2, 2, 2, 37, 37, 5, 32), "v", ["bwd_delta", "bwd_keys"]),
    "plain_short": (Shape(2, 2, 2, 37, 37, 5, 32), "q k v", ["bwd_short"]),
    "memory": (Shape(2, 2, 2, 37, 37, 0, 32), "memory", ["bwd_memory"]),
    "memory_and_queries": (Shape(2, 2, 2, 37, 37, 0, 32), "q memory", ["bwd_memory", "bwd_delta", "bwd_queries"]),
    "memory_short": (Shape(2, 2, 2, 37, 37, 0, 32), "q k v memory", ["bwd_memory", "bwd_short"]),
}


@pytest.mark.parametrize("case", WANTED)
def test_only_wanted_gradients_launch_kernels(case: str, launches: list[str]) -> None:
    shape, wanted, expected = WANTED[case]
    inputs = make_inputs(shape, memory="shared" if "memory" in wanted else "")
    for name, t in inputs.tensors.items():
        t.requires_grad_(name in wanted.split())
    out = inputs.call("triton")
    launches.clear()
    out.backward(inputs.dout)
    assert launches == expected


def test_many_queries_share_out_the_gradient_of_the_prefix(launches: list[str]) -> None:
    inputs = make_inputs(Shape(2, 1, 1, 600, 2, 5, 16))
    check(inputs)
    assert launches == ["fwd_short", "bwd_prefix", "bwd_reduce", "bwd_keys", "bwd_queries"]


@pytest.mark.parametrize("memory", ["shared", "as_prefix"])
def test_many_queries_share_out_the_gradient_of_a_memory(memory: str, launches: list[str]) -> None:
    check(make_inputs(Shape(5, 1, 1, 300, 2, 0, 16), prefixes="bank", memory=memory))
    assert launches[1:3] == ["bwd_memory", "bwd_reduce"]


def call(S: int, P: int, causal: bool = False, dtype: torch.dtype = torch.bfloat16, lengths: bool = False) -> Call:
    q, prefix = torch.empty(2, 2, 8, 64, dtype=dtype), torch.empty(1, 2, P, 64, dtype=dtype)
    k = torch.empty(2, 2, S, 64, dtype=dtype)
    ragged = torch.zeros(2, dtype=torch.int64) if lengths else None
    return Call(q, k, k, prefix, prefix, prefix_lengths=ragged, is_causal=causal, scale=0.125)


@pytest.mark.parametrize(
    ("S", "P", "causal", "expected"),
    [
        (197, 10, False, (SPLIT, False, 16)),  # 197 + 10 = 3 * 64 + 15: the prefix adds no tile to 197's own
        (197, 0, False, (OWN, False, 16)),
        (197, 11, False, (SPLIT, False, 16)),
        (197, 12, False, (SPLIT, False, 32)),
        (192, 10, False, (PREFIX, False, 16)),
        (192, 20, False, (PREFIX, False, 32)),
        (577, 50, False, (SPLIT, False, 64)),
        (577, 200, False, (SPLIT, True, 16)),
        (1024, 200, True, (PREFIX, True, 16)),  # 3 * 64 + 8
        (1000, 10, True, (PREFIX, False, 16)),  # the diagonal's tiles are masked anyway
        (64, 0, False, (OWN, False, 0)),
        (64, 64, False, (PREFIX, False, 64)),
    ],
)
def test_the_last_tile_is_as_wide_as_it_must_be(S: int, P: int, causal: bool, expected: tuple[int, bool, int]) -> None:
    assert tuple(call(S, P, causal).rest(64).values()) == expected


def test_a_ragged_prefix_ends_where_only_the_kernel_knows() -> None:
    assert tuple(call(197, 10, lengths=True).rest(64).values()) == (SPLIT, False, 16)
    assert tuple(call(197, 200, lengths=True).rest(64).values()) == (SPLIT, True, 0)


@pytest.mark.parametrize(("n", "width"), [(0, 0), (1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128)])
def test_tile_width(n: int, width: int) -> None:
    assert tile_width(n) == width


def test_the_table_has_what_every_call_needs() -> None:
    """Every architecture, head size and type has the long kernels, in powers of two."""
    for arch in table.SHARED_KIB:
        for half in (True, False):
            for width in (16, 32, 64, 128, 256):
                for kernel in KERNELS:
                    plan = table.row(kernel, arch, width, half)
                    if plan is None:
                        assert kernel.endswith(("_short", "_medium")), (arch, half, width, kernel)
                        continue
                    assert all(n >= 16 and n & (n - 1) == 0 for n in plan[:2]), plan
                    assert plan.warps in (4, 8) and 1 <= plan.stages <= 4, plan


def test_float32_products_follow_torchs_own_switch() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert call(8, 5, dtype=torch.float32).numbers()["PRECISION"] == expected
            assert call(8, 5, dtype=torch.bfloat16).numbers()["PRECISION"] == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_a_scale_that_turns_the_order_of_scores_around(dtype: torch.dtype, scale: float) -> None:
    check(make_inputs(Shape(2, 2, 2, 37, 37, 5, 32), dtype, causal=True, scale=scale))


def test_one_query_needs_no_causality() -> None:
    first, second = (make_inputs("one_query", grad=False, causal=causal).call("triton") for causal in (False, True))
    assert torch.equal(first, second)


def test_rows_too_far_apart_are_refused() -> None:
    far = torch.empty_strided((1, 1, 3, 16), (0, 0, 2**30 + 1, 1), device="meta")
    near = torch.zeros(1, 1, 3, 16)
    [words] = triton.unsupported(Call(near, far, near, near, near), Needs())
    assert words == "k [1, 1, 3, 16] spans more than 2**31 elements between the rows of one head"


def test_more_rows_than_the_kernels_count_are_refused() -> None:
    q = torch.empty(16).expand(2**16, 2**8, 2**7, 16)
    with pytest.raises(NotImplementedError, match=r"q has 2147483648 rows; needs fewer than 2\*\*31"):
        Inputs({"q": q, "k": q, "v": q, "prefix_k": q[0], "prefix_v": q[0]}).call("triton")
