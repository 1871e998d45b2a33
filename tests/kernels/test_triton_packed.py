"""Packed sequences in the Triton kernels: many tiles, some with rows of several of them, and what a call launches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prefixattn import backends
from prefixattn.attention import triton
from prefixattn.testing.attention import Shape, assert_all_as_accurate, exact, ours, same_dtype
from prefixattn.testing.varlen import packed_sequences
from tests.grids import DTYPES, turns

if reasons := backends.here()["triton"]:
    pytest.skip("triton: " + "; ".join(reasons), allow_module_level=True)

from bench.static.triton_counts import Launched, intercepted
from prefixattn.attention.call import Given, Needs, Wants
from prefixattn.kernels import launch_bwd, launch_fwd, table
from prefixattn.kernels.call import Call
from prefixattn.kernels.table import Launch

LONG = "fwd", "fwd_medium", "bwd_keys", "bwd_prefix", "bwd_queries"
ALL = Needs(q=True, k=True, v=True, prefix_k=True, prefix_v=True)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 16, so that small sequences have many of them, and one tile has rows of several."""
    table.trial = {name: Launch(16, 16, 4, 1) for name in LONG}
    yield
    table.trial = {}


SIZES: dict[str, tuple[list[int], list[int] | None]] = {
    "whole_tiles": ([32, 16], None),
    "ragged": ([0, 18, 3, 17], [5, 33, 0, 9]),
}
WAYS = {  # of P = 5 there is one tile, whose pass makes delta
    "two_tiles": ("fp32", 21, "ragged"),
    "half": ("fp16", 5, "ragged"),
    "one_tile": ("fp32", 5, "ragged"),
    "half_two_tiles": ("fp16", 21, "ragged"),
    "whole": ("fp32", 5, "whole_tiles"),
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {"layout": "packed"},
    "causal": {"causal": True},
    "bank": {"prefixes": "bank", "lengths": "T", "causal": True},
    "per_sequence": {"prefixes": "per_sample", "lengths": "B", "memory": "as_prefix"},
    "memory": {"memory": "as_prefix", "phi": "gelu", "prefixes": "bank", "causal": True, "lengths": "B"},
    "softcap": {"softcap": 0.7, "sinks": "float", "scale": -0.5},
    "window": {"window": (9, 4), "prefixes": "bank"},
    "window_prefix": {"window": (20, -1), "prefix_in_window": True, "causal": True},
    "window_lengths": {"window": (11, 3), "prefix_in_window": True, "prefixes": "bank", "lengths": "B"},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("way, other", turns(list(WAYS), OTHERS))
def test_many_tiles_with_each_feature(way: str, other: str) -> None:
    dtype, P, sizes = WAYS[way]
    inputs = packed_sequences(SIZES[sizes], DTYPES[dtype], Shape(0, 2, 1, 0, 0, P, 16), **OTHERS[other])
    assert_all_as_accurate(ours(inputs, "triton"), same_dtype(inputs), exact(inputs))


DROPPED: dict[str, tuple[tuple[int, int, int], dict[str, Any], dict[str, float]]] = {  # H, Hkv, P; features; dropout
    "weights": ((4, 2, 5), {"prefixes": "bank", "lengths": "B", "causal": True}, {"dropout_p": 0.3}),
    "both": (
        (2, 2, 17),
        {"window": (15, -1), "prefix_in_window": True, "prefixes": "bank", "lengths": "T"},
        {"dropout_p": 0.2, "prefix_dropout_p": 0.3},
    ),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", DROPPED)
def test_dropout_is_the_references(case: str) -> None:
    (H, Hkv, P), features, options = DROPPED[case]
    inputs = packed_sequences(([0, 17, 2], [5, 18, 3]), shape=Shape(0, H, Hkv, 0, 0, P, 16), **features)
    torch.manual_seed(3)
    found = ours(inputs, "triton", **options)
    torch.manual_seed(3)
    for name, t in ours(inputs.to(torch.float64), "reference", **options).items():
        torch.testing.assert_close(found[name].double(), t.double(), rtol=2e-4, atol=2e-4, msg=name)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.usefixtures("small_tiles")
def test_what_one_sequence_holds_reaches_no_other() -> None:
    """Not masked alone: zero times nan is nan."""
    inputs = packed_sequences(([5, 19, 7], [20, 3, 18]), shape=Shape(0, 2, 1, 0, 0, 5, 16), prefixes="per_sample")
    right = ours(inputs, "triton")
    with torch.no_grad():
        for name, rows in (("q", slice(5, 24)), ("k", slice(20, 23)), ("v", slice(20, 23))):
            inputs.tensors[name][rows] = torch.nan
        for name in ("prefix_k", "prefix_v"):
            inputs.tensors[name][1] = torch.nan
    found = ours(inputs, "triton")
    for name, t in found.items():
        axis = {"lse": 1, "mass": 1}.get(name, 0)
        middle = slice(1, 2) if "prefix" in name else slice(20, 23) if name in ("dk", "dv") else slice(5, 24)
        others = torch.tensor([i for i in range(t.shape[axis]) if not middle.start <= i < middle.stop])
        assert torch.equal(t.index_select(axis, others), right[name].index_select(axis, others)), name
        assert t.isnan().any(), name


def launches(call: Call) -> list[Launched]:
    """Of a forward and a backward, on tensors without memory."""
    found: list[Launched] = []
    with intercepted(lambda launched, _: found.append(launched), processors=4):
        results = launch_fwd.forward(call, Wants())
        given = Given(torch.empty_like(results.out), None, results.out, results.lse)
        launch_bwd.backward(call, given, ALL, None)
    return found


def call_of(n: int, L: int, P: int, **options: Any) -> Call:
    """Of n sequences of L tokens in a batch, or packed."""
    t, prefix = torch.empty(n, 2, L, 64, device="meta"), torch.empty(1, 2, P, 64, device="meta")
    return Call(t, t, t, prefix, prefix, scale=0.125, **options)


def packed_call(n: int, L: int, P: int) -> Call:
    offsets = torch.empty(n + 1, dtype=torch.int64, device="meta")
    packing = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": L, "max_seqlen_k": L}
    return call_of(1, n * L, P)._replace(**packing)  # type: ignore[arg-type]


@pytest.mark.parametrize("L, P", [(37, 5), (2, 300), (300, 70)])
def test_packed_sequences_have_the_kernels_of_long_samples(L: int, P: int) -> None:
    names = [one.kernel.removeprefix("prefix_attn_") for one in launches(packed_call(6, L, P))]
    prefix = ["bwd_delta", "bwd_prefix"] if P > 64 else ["bwd_prefix"]
    assert [name for name in names if name != "bwd_reduce"] == ["fwd", *prefix, "bwd_keys", "bwd_queries"]


def test_each_sequence_has_as_many_programs_as_the_longest() -> None:
    call = packed_call(6, 300, 50)
    short = call._replace(max_seqlen_q=90, max_seqlen_k=10**9)
    for launched, fewer in zip(launches(call), launches(short), strict=True):
        if launched.kernel.endswith(("fwd", "queries")):
            block = launched.args.BLOCK_M
            assert launched.grid == (-(-300 // block) * 6 * 2,) and fewer.grid == (-(-90 // block) * 6 * 2,)
    assert Call(*short).sizes[3:5] == (90, 1800)


def test_a_batch_launches_what_it_did() -> None:
    for options in ({}, {"is_causal": True}, {"window_left": 30}):
        for launched in launches(call_of(2, 577, 50, **options)):
            assert getattr(launched.args, "packed", None) is None


def test_the_guard_tries_them_apart() -> None:
    call = triton.Call(*packed_call(6, 37, 5))
    assert triton.kind_of_forward(call) == "fwd_packed"
    assert triton.kind_of_backward(call, ALL) == "bwd_packed"
    assert triton.kind_of_forward(call._replace(window_left=3)) == "fwd_window_packed"


def test_more_programs_than_a_grid_has_are_refused() -> None:
    call = packed_call(6, 37, 5)
    offsets = torch.empty(2**20 + 1, dtype=torch.int64, device="meta")
    long = call.q.new_empty(1, 2, 2**11, 16)
    many = call._replace(q=long, k=long, v=long, cu_seqlens_q=offsets, max_seqlen_q=2**10, max_seqlen_k=2**10)
    words = triton.unsupported(triton.Call(*many), ALL)
    assert "sequences as long as the longest have 2147483648 rows; needs fewer than 2**31" in words
    few = many._replace(max_seqlen_q=1, max_seqlen_k=1)
    assert not any("rows" in line for line in triton.unsupported(triton.Call(*few), ALL))
