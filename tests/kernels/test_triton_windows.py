"""Sliding windows in the Triton kernels: many tiles, each other feature beside them, and tiles that are not visited."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prefixattn import backends
from prefixattn.attention import triton
from prefixattn.testing.attention import Inputs, Shape, assert_all_as_accurate, exact, make_inputs, ours, same_dtype
from tests.grids import DTYPES, covered, turns

if reasons := backends.here()["triton"]:
    pytest.skip("triton: " + "; ".join(reasons), allow_module_level=True)

from bench.static.triton_counts import Launched, intercepted
from prefixattn.attention.call import Given, Needs, Wants
from prefixattn.kernels import launch_bwd, launch_fwd, table
from prefixattn.kernels.arguments import Window
from prefixattn.kernels.call import Call
from prefixattn.kernels.table import Launch

KERNELS = "fwd", "fwd_medium", "fwd_short", "fwd_fold", "bwd_short", "bwd_keys", "bwd_prefix", "bwd_queries"


def check(inputs: Inputs, seed: torch.Tensor | None = None) -> None:
    assert_all_as_accurate(ours(inputs, "triton"), same_dtype(inputs, seed), exact(inputs, seed))


@pytest.fixture(params=["short", "long"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "long":
        monkeypatch.setattr(launch_fwd, "SHORT_KEYS", -1)
        monkeypatch.setattr(launch_bwd, "HEAD_KEYS", -1)
    name: str = request.param
    return name


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 16, so that small shapes have many of them."""
    table.trial = {name: Launch(16, 16, 4, 1) for name in KERNELS}
    yield
    table.trial = {}


WINDOWS = {
    "left": ((17, -1), False),
    "right": ((-1, 17), False),
    "both": ((20, 9), False),
    "narrow": ((0, 1), False),
    "prefix": ((12, -1), True),
    "prefix_right": ((50, 3), True),
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "layout": "packed"},
    "mask": {"mask": "BHLS", "blind": True, "prefixes": "bank", "lengths": "B"},
    "bias": {"mask": "1HLS", "mask_dtype": "float", "causal": True},
    "key_bias": {"mask": "B11S", "mask_dtype": "float", "prefixes": "per_sample", "lengths": "B"},
    "memory": {"memory": "as_prefix", "phi": "gelu", "prefixes": "bank", "causal": True, "lengths": "T"},
    "softcap": {"softcap": 0.7, "sinks": "float", "scale": -0.5},
}


TYPED = [(window, dtype) for window in WINDOWS for dtype in ("fp32", "fp16")]
# each feature in both kinds of kernels, and the windows and types in turn, well mixed
MANY = [
    pytest.param(*case.values[0], *case.values[1:], marks=case.marks)
    for case in turns([TYPED[5 * i % len(TYPED)] for i in range(len(TYPED))], ["short", "long"], OTHERS)
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window, dtype, kernels, other", MANY, indirect=["kernels"])
def test_many_tiles_with_each_feature(window: str, other: str, dtype: str, kernels: str) -> None:
    size, prefix_in_window = WINDOWS[window]
    options = {**OTHERS[other], "window": size, "prefix_in_window": prefix_in_window}
    inputs = make_inputs(Shape(2, 2, 1, 45, 45, 21, 16), DTYPES[dtype], **options)
    if kernels == "short" and "attn_mask" in inputs.tensors:  # whose gradient is for the long kernels
        inputs.tensors["attn_mask"].requires_grad_(False)
    check(inputs)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "kernels, sizes, window",
    covered(["short", "long"], [(21, 53), (53, 21), (1, 53)], WINDOWS),
    ids=str,
    indirect=["kernels"],
)
def test_other_numbers_of_queries_and_keys(sizes: tuple[int, int], window: str, kernels: str) -> None:
    L, S = sizes
    size, prefix_in_window = WINDOWS[window]
    check(make_inputs(Shape(1, 1, 1, L, S, 13, 16), window=size, prefix_in_window=prefix_in_window))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", ["both", "prefix_right"])
def test_both_dropouts(window: str, kernels: str) -> None:
    size, prefix_in_window = WINDOWS[window]
    options = {"prefixes": "bank", "lengths": "B", "window": size, "prefix_in_window": prefix_in_window}
    inputs = make_inputs(Shape(2, 1, 1, 37, 37, 21, 16), torch.float16, **options)  # type: ignore[arg-type]
    inputs.options |= {"dropout_p": 0.2, "prefix_dropout_p": 0.4}
    torch.manual_seed(7)
    seed = torch.randint(2**62, (1,))
    torch.manual_seed(7)
    check(inputs, seed)


FOLDED: dict[str, tuple[Shape, dict[str, Any]]] = {
    "own": (Shape(5, 2, 2, 1, 40, 300, 16), {"window": (9, -1), "causal": True}),
    "some": (Shape(5, 2, 2, 1, 40, 300, 16), {"window": (200, -1), "prefix_in_window": True}),
    "none": (Shape(5, 2, 2, 1, 40, 300, 16), {"window": (20, -1), "prefix_in_window": True}),
    "several": (Shape(4, 4, 2, 3, 20, 300, 16), {"window": (120, -1), "prefix_in_window": True, "causal": True}),
    "bank": (
        Shape(5, 2, 1, 2, 9, 300, 16),
        {"window": (150, -1), "prefix_in_window": True, "prefixes": "bank", "lengths": "B", "softcap": 1.0},
    ),
}


@pytest.mark.parametrize("dtype, case", turns(["fp32", "fp16"], FOLDED))
def test_folded_queries(dtype: str, case: str) -> None:
    shape, options = FOLDED[case]
    inputs = make_inputs(shape, DTYPES[dtype], **options)
    found: list[Launched] = []
    with intercepted(lambda launched, launch: (found.append(launched), launch()), processors=4):  # type: ignore[arg-type,func-returns-value]
        check(inputs)
    assert [launched.kernel for launched in found[:2]] == ["prefix_attn_fwd_fold", "prefix_attn_fwd"]


ALL_NAN = (
    "ignore:All-NaN slice encountered:RuntimeWarning"  # numpy, of the interpreter's largest score of a poisoned row
)
# a window of 20, tiles of 16 and the first one poisoned: from here on no tile is visited that holds a nan
FAR = 64


@pytest.mark.filterwarnings(ALL_NAN)
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_outside_is_not_read(kernels: str, causal: bool) -> None:
    """Not masked alone: zero times nan is nan."""
    inputs = make_inputs(
        Shape(1, 2, 1, 80, 80, 20, 16), causal=causal, window=(20, -1 if causal else 7), prefix_in_window=True
    )
    right = ours(inputs, "triton")
    with torch.no_grad():
        for t in (*(inputs.tensors[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")), inputs.dout):
            t[..., :16, :] = torch.nan  # type: ignore[index]
    found = ours(inputs, "triton")
    for name in ("out", "lse", "mass", "dq", "dk", "dv"):
        assert found[name][:, :, 0].isnan().all(), name
        assert torch.equal(found[name][:, :, FAR:], right[name][:, :, FAR:]), name


@pytest.mark.filterwarnings(ALL_NAN)
@pytest.mark.usefixtures("small_tiles")
def test_no_far_query_reaches_the_prefix_or_the_first_keys(kernels: str) -> None:
    inputs = make_inputs(Shape(1, 2, 1, 80, 80, 20, 16), window=(20, -1), causal=True, prefix_in_window=True)
    right = ours(inputs, "triton")
    with torch.no_grad():
        for t in (inputs.q, inputs.dout, inputs.dlse):
            t[:, :, FAR:] = torch.nan  # type: ignore[index]
    found = ours(inputs, "triton")
    for name in ("dprefix_k", "dprefix_v"):
        assert torch.equal(found[name], right[name]), name
    for name in ("dk", "dv"):
        assert torch.equal(found[name][:, :, :16], right[name][:, :, :16]), name
    assert found["dk"][:, :, -1].isnan().all()


def launches(call: Call) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Kernels, grids and what is no tensor of the arguments."""
    found: list[Launched] = []
    with intercepted(lambda launched, _: found.append(launched), processors=4):
        results = launch_fwd.forward(call, Wants())
        given = Given(torch.empty_like(results.out), None, results.out, results.lse)
        launch_bwd.backward(call, given, Needs(q=True, k=True, v=True, prefix_k=True, prefix_v=True), None)
    return [
        (one.kernel, one.grid, {n: a for n, a in vars(one.args).items() if not isinstance(a, torch.Tensor)})
        for one in found
    ]


def meta(L: int, S: int, P: int, **options: Any) -> Call:
    q, k, prefix = (torch.empty(n, 2, rows, 64, device="meta") for n, rows in ((2, L), (2, S), (1, P)))
    return Call(q, k, k, prefix, prefix, scale=0.125, **options)


@pytest.mark.parametrize("options", [{"window_left": 620}, {"window_left": 10**12, "prefix_in_window": True}])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_that_hides_nothing_launches_what_none_does(options: dict[str, Any], causal: bool) -> None:
    plain = launches(meta(577, 577, 50, is_causal=causal))
    assert all(arguments.get("window", Window()) == Window() for _, _, arguments in plain)
    assert not any(arguments.get("PREFIX_IN_WINDOW") for _, _, arguments in plain)
    assert [name.removeprefix("prefix_attn_") for name, _, _ in plain][:3] == ["fwd", "bwd_prefix", "bwd_reduce"]
    assert launches(meta(577, 577, 50, is_causal=causal, **options)) == plain


def test_bounds_that_hide_nothing_are_left_out() -> None:
    assert meta(9, 20, 5, window_left=18, window_right=8).window == Window(18, None, 11)
    assert meta(9, 20, 5, window_left=19, window_right=7).window == Window(None, 7, 11)
    assert meta(9, 20, 5, window_left=19, prefix_in_window=True).window == Window(19, None, 11)
    assert meta(9, 20, 5, window_left=24, prefix_in_window=True).window == Window()


def test_the_guard_tries_windows_apart() -> None:
    windowed, wide, plain = (meta(70, 70, 5, **options)[:] for options in ({"window_left": 3}, {"window_left": 69}, {}))
    kinds = [triton.kind_of_forward(triton.Call(*call)) for call in (windowed, wide, plain)]
    assert kinds == [kinds[2] + "_window", kinds[2], kinds[2]]
    assert triton.kind_of_backward(triton.Call(*windowed), Needs(q=True)) == "bwd_window"
