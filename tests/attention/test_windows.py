"""Windows beside what the op's cases ask of every backend: bad input, bounds, keys outside, compiled calls."""

from typing import Any

import pytest
import torch

from prefixattn import prefix_attention_qkvpacked
from prefixattn.attention import reference
from prefixattn.attention.call import Call, Wants
from prefixattn.attention.windows import bounds
from prefixattn.kernels.table import INTERPRETED
from prefixattn.testing.attention import (
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    ours,
    packed,
    parts,
    same_dtype,
    suited,
)
from tests.support import accepted

BAD = {
    "below": ((-2, 0), r"window_size is \(-2, 0\), expected numbers of keys, or -1"),
    "one number": (5, "window_size is 5, expected two integers"),
    "three": ((1, 2, 3), r"window_size is \(1, 2, 3\), expected two integers"),
    "fractions": ((1.0, 0), r"window_size is \(1.0, 0\), expected two integers"),
    "flags": ((True, 0), "window_size is .True, 0., expected two integers"),
    "a tensor": (torch.tensor([1, 2]), "window_size is tensor"),
    "nothing": (None, "window_size is None"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_windows_are_refused_in_words(what: str) -> None:
    window, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        make_inputs("ragged").call(window_size=window)


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix_in_window is 1, expected True or False"):
        make_inputs("ragged").call(window_size=(3, 0), prefix_in_window=1)


@pytest.mark.parametrize(
    ("window", "in_window", "causal", "found"),
    [
        ((-1, -1), True, False, (False, -1, -1, False)),
        ((9, -1), False, False, (False, -1, -1, False)),  # the last query's distance from the first key
        ((8, -1), False, False, (False, 8, -1, False)),
        ((13, -1), True, False, (False, 13, -1, True)),  # and from the first row of the prefix
        ((14, -1), True, False, (False, -1, -1, False)),
        ((-1, 6), False, False, (False, -1, -1, False)),  # the first query's distance from the last key
        ((-1, 5), False, False, (False, -1, 5, False)),
        ((3, 5), False, True, (True, 3, -1, False)),
        ((3, 0), True, False, (True, 3, -1, True)),
    ],
)
def test_what_hides_nothing_is_left_out(
    window: tuple[int, int], in_window: bool, causal: bool, found: tuple[bool, int, int, bool]
) -> None:
    assert bounds(window, in_window, causal, L=7, S=10, P=5) == found
    inputs = make_inputs(Shape(1, 1, 1, 7, 10, 5, 8), torch.float64)
    options = {"window_size": window, "prefix_in_window": in_window, "is_causal": causal}
    short = ours(inputs, "reference", **options)
    tensors = [inputs.tensors[name].detach() for name in ("q", "k", "v", "prefix_k", "prefix_v")]
    for t in tensors[3:]:
        t.unsqueeze_(0)
    # the same bounds, spelled out
    call = Call(*tensors, is_causal=causal, scale=8**-0.5, window_left=window[0], window_right=window[1])
    out = reference.fwd(call._replace(prefix_in_window=in_window), Wants()).out
    torch.testing.assert_close(out, short["out"])


FAR = Shape(2, 4, 2, 300, 300, 70, 16)
FEWER = Shape(1, 2, 1, 150, 150, 40, 16)  # the interpreter takes its time


def on_tiles() -> bool:
    from prefixattn import _C

    return bool(_C.isa().startswith("amx"))


@pytest.mark.parametrize("in_window", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_outside_are_not_read(backend: str, dtype: torch.dtype, in_window: bool) -> None:
    """Not hidden, which would make nan of nan times a weight of zero."""
    if backend == "reference":
        pytest.skip("the reference hides them with a mask")
    slow = backend == "triton" and INTERPRETED
    shape, window = (FEWER, (20, 4)) if slow else (FAR, (30, 10))
    inputs, words = suited(backend, make_inputs(shape, dtype, window=window, prefix_in_window=in_window))
    if words:
        pytest.skip(words)
    right = ours(inputs, backend)
    late = shape.L - 8  # queries from here on alone have gradients, and what they do not see is nan
    first = late - window[0] - 130  # more than the widest tile away
    # AMX's products take whole tiles, of which one holds the prefix's end and the first own keys
    behind = 32 if backend == "cpu" and on_tiles() else 0
    with torch.no_grad():
        for name in ("k", "v"):
            inputs.tensors[name][:, :, behind : max(first, behind)] = torch.nan
        if in_window and not slow:
            inputs.tensors["prefix_k"].fill_(torch.nan)
    found = ours(inputs, backend)
    for name in ("out", "lse", "dq"):
        assert torch.equal(found[name][:, :, late:], right[name][:, :, late:]), name
    seen_prefix = in_window and not slow and behind == 0
    assert found["out"][:, :, behind].isnan().any() == (first > behind or seen_prefix)


@pytest.mark.parametrize("window", [(40, -1), (-1, 9), (17, 30)])
@pytest.mark.parametrize("shape", [Shape(1, 4, 2, 190, 190, 20, 64), Shape(2, 2, 2, 33, 200, 150, 32)])
def test_many_tiles(backend: str, window: tuple[int, int], shape: Shape) -> None:
    if backend == "triton" and INTERPRETED:
        shape = shape._replace(B=1, H=1, Hkv=1, D=16)
    inputs = accepted(backend, make_inputs(shape, window=window, prefix_in_window=window[0] == 17))
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("options", [{"scale": -0.3}, {"scale": 0.0}, {"softcap": 0.5}])
def test_what_a_window_hides_of_a_prefix_stays_hidden(backend: str, options: dict[str, Any]) -> None:
    inputs = accepted(backend, make_inputs("ragged", window=(9, 2), prefix_in_window=True, **options))
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


def test_a_sink_beside_a_window(backend: str) -> None:
    """In float32: that of 16 bits has a rounded out, and is asked of sinks alone."""
    options = {"window": (3, 4), "prefix_in_window": True, "sinks": "float", "memory": "shared"}
    for shape in ("ragged", "tile_past", "few_queries"):
        inputs = accepted(backend, make_inputs(shape, **options))
        assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


def test_dropout_drops_what_it_drops_without_a_window(backend: str) -> None:
    inputs = accepted(backend, make_inputs("tile_past", causal=True, window=(30, -1), prefix_in_window=True))
    options = {"dropout_p": 0.3, "prefix_dropout_p": 0.2}
    torch.manual_seed(3)
    found = ours(inputs, backend, **options)
    torch.manual_seed(3)
    right = ours(inputs.to(torch.float64), "reference", **options)
    for name, t in right.items():
        torch.testing.assert_close(found[name].double(), t.double(), rtol=2e-4, atol=2e-4)


def test_a_packed_projection(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", window=(6, 1), prefix_in_window=True))
    right, whole = ours(inputs, backend), packed(inputs)
    out = prefix_attention_qkvpacked(**whole.tensors, **whole.options, backend=backend)
    (dqkv,) = torch.autograd.grad(out, whole.tensors["qkv"], inputs.dout.transpose(1, 2))
    torch.testing.assert_close(out.transpose(1, 2), right["out"])
    alone = ours_without_lse(inputs, backend)
    for name, t in parts(dqkv).items():
        torch.testing.assert_close(t, alone[name])


def ours_without_lse(inputs: Any, backend: str) -> dict[str, torch.Tensor]:
    out = inputs.call(backend)
    wanted = [inputs.tensors[name] for name in "qkv"]
    return dict(zip("qkv", torch.autograd.grad(out, wanted, inputs.dout), strict=True))


def test_one_query_sees_the_end_of_a_cache(backend: str) -> None:
    inputs = accepted(backend, make_inputs("one_query", causal=True, window=(15, -1), grad=False))
    out = inputs.call(backend)
    tensors = {**inputs.tensors, "k": inputs.tensors["k"][:, :, -16:], "v": inputs.tensors["v"][:, :, -16:]}
    torch.testing.assert_close(out, inputs.call(backend, **tensors, window_size=(-1, -1)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", window=(5, 3), prefix_in_window=True))
    right = ours(inputs, backend)["out"]
    compiled = torch.compile(lambda: inputs.call(backend), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), right)
    torch.compiler.reset()
