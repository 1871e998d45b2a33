"""Every backend against float64, by the error that plain PyTorch makes in the same type."""

from functools import cache

import pytest
import torch
from torch import Tensor

from prefixattn import backends, prefix_attention
from prefixattn.kernels.table import INTERPRETED
from prefixattn.testing.attention import (
    FEATURES,
    INF,
    SHAPES,
    Inputs,
    Shape,
    assert_all_as_accurate,
    exact,
    known_from_float32,
    make_inputs,
    objections,
    ours,
    same_dtype,
    suited,
)
from tests.grids import DTYPES, FEWER_TYPES, TYPES, by_backend, in_turn, turns, without
from tests.support import accepted


@cache
def case(shape: str, feature: str, dtype: str) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and the two answers to compare with: made once, used by every backend."""
    inputs = make_inputs(shape, DTYPES[dtype], **FEATURES[feature])
    return inputs, same_dtype(inputs), exact(inputs)


GRIDDED = "backend, dtype, shape, feature"


@pytest.mark.parametrize(GRIDDED, by_backend(TYPES, SHAPES, ["plain", "causal"]), indirect=["backend"])
def test_shapes(backend: str, shape: str, feature: str, dtype: str) -> None:
    inputs, same, right = case(shape, feature, dtype)
    inputs = accepted(backend, inputs)
    assert_all_as_accurate(ours(inputs, backend), same, right)


FEATURED = [f for f in FEATURES if f not in ("plain", "causal")]
CROWDED = ["ragged", "grouped", "tile_past", "few_queries", "no_keys"]
# the interpreter is slow: there each feature meets a type in one of the shapes
MEETINGS = by_backend(without(FEWER_TYPES, "triton"), CROWDED, FEATURED) + [
    pytest.param("triton", case.values[1], case.values[0], case.values[2], marks=case.marks)
    for case in turns(CROWDED, FEWER_TYPES["triton"], FEATURED)
]


@pytest.mark.parametrize(GRIDDED, MEETINGS, indirect=["backend"])
def test_features(backend: str, shape: str, feature: str, dtype: str) -> None:
    inputs, same, right = case(shape, feature, dtype)
    inputs = accepted(backend, inputs)
    if "attn_mask" in inputs.tensors and not inputs.tensors["attn_mask"].requires_grad:
        same, right = ({n: t for n, t in answer.items() if n != "dattn_mask"} for answer in (same, right))
    assert_all_as_accurate(ours(inputs, backend), same, right)


LONELY = [("no_prefix",), ("nothing",), ("single",), ("widest",)]


@pytest.mark.parametrize("backend, dtype, shape", in_turn(FEWER_TYPES, LONELY), indirect=["backend"])
def test_a_memory_in_every_kind_of_shape(backend: str, shape: str, dtype: str) -> None:
    inputs, same, right = case(shape, "memory", dtype)
    inputs = accepted(backend, inputs)
    assert_all_as_accurate(ours(inputs, backend), same, right)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("phi", ["elu", "gelu"])
def test_a_large_memory_costs_the_softmax_no_accuracy(backend: str, phi: str, dtype: str) -> None:
    """Its backward needs the softmax's own part of out, which the rounded sum has lost."""
    if words := known_from_float32(backend, DTYPES[dtype]):
        pytest.skip(words)
    inputs = accepted(backend, make_inputs(Shape(1, 2, 2, 70, 70, 10, 64), DTYPES[dtype], memory="shared", phi=phi))
    with torch.no_grad():
        inputs.tensors["memory"].mul_(32)
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


def test_a_memory_touches_the_output_alone(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", causal=True, memory="shared", phi="none"))
    tensors = {n: t.detach() for n, t in inputs.tensors.items()}
    memory = tensors.pop("memory")
    options = {**inputs.options, "return_lse": True, "return_prefix_mass": True, "backend": backend}
    options |= {"dropout_p": 0.3, "prefix_dropout_p": 0.2}
    found = []
    for more in ({"memory": memory}, {}):
        torch.manual_seed(3)
        found.append(prefix_attention(**tensors, **{**options, **more}))
    (out, lse, mass), (plain, *others) = found
    torch.testing.assert_close(out, plain + tensors["q"] @ memory, rtol=1e-5, atol=1e-5)
    assert torch.equal(lse, others[0]) and torch.equal(mass, others[1])


def test_a_memory_trained_alone_keeps_nothing_else(backend: str) -> None:
    inputs = accepted(backend, make_inputs("no_prefix", causal=True, memory="shared"))
    every = ours(inputs, backend)
    for name, t in inputs.tensors.items():
        t.requires_grad_(name == "memory")
    out, lse = inputs.call(backend, return_lse=True)
    assert [t.numel() for t in out.grad_fn.saved_tensors if t is not None][-2:] == [0, lse.numel()]
    memory = inputs.tensors["memory"]
    (grad,) = torch.autograd.grad(out, memory, inputs.dout, retain_graph=True)
    (nothing,) = torch.autograd.grad(lse.sum(), memory)
    assert torch.equal(grad, every["dmemory"])
    assert nothing.shape == grad.shape and not nothing.any()


@pytest.mark.parametrize("feature", ["plain", "causal", "bias", "bank_sample_lengths", "packed", "memory_bank"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_repeats_to_the_bit(backend: str, feature: str, dtype: str) -> None:
    shape = "tile_past" if backend == "triton" and INTERPRETED else "vit"  # the interpreter takes 10 s for a ViT's
    inputs = accepted(backend, make_inputs(shape, DTYPES[dtype], **FEATURES[feature]))
    first = ours(inputs, backend)
    for _ in range(1 if backend == "triton" and INTERPRETED else 3):
        for name, again in ours(inputs, backend).items():
            assert torch.equal(again, first[name]), name


@pytest.mark.parametrize("unwanted", ["q", "k", "v", "prefix_k", "prefix_v", "attn_mask", "memory"])
def test_a_gradient_nobody_wants_changes_no_other(backend: str, unwanted: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", **FEATURES["bias"], memory="shared"))
    every = ours(inputs, backend)
    inputs.tensors[unwanted].requires_grad_(False)
    some = ours(inputs, backend)
    assert some.keys() == every.keys() - {"d" + unwanted}
    for name, t in some.items():
        if backend == "triton":  # what is wanted chooses among kernels with other tiles
            torch.testing.assert_close(t, every[name], rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert torch.equal(t, every[name]), name


@pytest.mark.parametrize("wanted", ["q", "k", "v", "prefix_k", "prefix_v", "attn_mask", "memory"])
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    inputs = make_inputs("ragged", **FEATURES["bias"], memory="shared")
    if wanted == "attn_mask" and (words := objections(backend, inputs)):
        pytest.skip(words)
    inputs = accepted(backend, inputs)
    every = ours(inputs, backend)
    for name, t in inputs.tensors.items():
        t.requires_grad_(name == wanted)
    alone = ours(inputs, backend)
    assert torch.equal(alone["d" + wanted], every["d" + wanted])


def test_lse_alone_has_a_gradient(backend: str) -> None:
    inputs = accepted(backend, make_inputs("grouped", causal=True))
    wanted = list(inputs.tensors.values())
    _, lse = inputs.call(backend, return_lse=True)
    assert inputs.dout is not None
    inputs.dout.zero_()
    expected = exact(inputs)
    for (name, t), grad in zip(
        inputs.tensors.items(), torch.autograd.grad(lse, wanted, inputs.dlse, materialize_grads=True), strict=True
    ):
        assert grad.shape == t.shape
        torch.testing.assert_close(grad.double(), expected["d" + name], rtol=1e-4, atol=1e-6, msg=name)


def test_mass_carries_no_gradient() -> None:
    _, mass = make_inputs("even").call(return_prefix_mass=True)
    assert not mass.requires_grad


def test_returns_in_order(backend: str) -> None:
    inputs = accepted(backend, make_inputs("even"))
    out, lse, mass = inputs.call(backend, return_lse=True, return_prefix_mass=True)
    assert torch.equal(inputs.call(backend), out)
    for options, expected in (({"return_lse": True}, lse), ({"return_prefix_mass": True}, mass)):
        got = inputs.call(backend, **options)
        assert len(got) == 2 and torch.equal(got[0], out) and torch.equal(got[1], expected)
    assert (out.dtype, lse.dtype, mass.dtype) == (torch.float32,) * 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_a_prefix_equals_sdpa(backend: str, dtype: str) -> None:
    inputs = accepted(backend, make_inputs("no_prefix", DTYPES[dtype], causal=True))
    q, k, v = (inputs.tensors[n] for n in ("q", "k", "v"))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    tolerance = 1e-6 if dtype == "fp32" else 2**-8
    torch.testing.assert_close(inputs.call(backend), plain, rtol=tolerance, atol=tolerance)


def test_output_keeps_the_memory_order_of_q(backend: str) -> None:
    B, L, H, D = 2, 7, 3, 16
    q, k, v = torch.randn(B, L, 3, H, D).permute(2, 0, 3, 1, 4).unbind()
    prefix = torch.randn(H, 5, D)
    out = prefix_attention(q, k, v, prefix, prefix, backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    assert prefix_attention(q.contiguous(), k, v, prefix, prefix, backend=backend).is_contiguous()


def test_a_last_axis_with_a_stride_is_read_right(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged"))
    wide = {n: torch.stack([t.detach(), torch.full_like(t, torch.nan)], -1)[..., 0] for n, t in inputs.tensors.items()}
    assert all(t.stride(-1) == 2 for t in wide.values())
    assert torch.equal(prefix_attention(**wide, backend=backend), inputs.call(backend))


def test_what_lies_past_a_length_is_never_read(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", **FEATURES["bank_lengths"]))
    right = ours(inputs, backend)
    with torch.no_grad():
        for name in ("prefix_k", "prefix_v"):
            for row, length in enumerate(inputs.options["prefix_lengths"].tolist()):
                inputs.tensors[name][row, :, length:] = torch.nan
            inputs.tensors[name][1] = torch.nan  # the row that prefix_ids never names
    for name, t in ours(inputs, backend).items():
        assert torch.equal(t, right[name]), name


@pytest.mark.parametrize("mask", ["B11S", "BHLS"])
@pytest.mark.parametrize("shape", ["ragged", "no_prefix"])
def test_the_least_float_hides_as_false_does(backend: str, shape: str, mask: str) -> None:
    inputs = make_inputs(shape, mask=mask, blind=mask == "BHLS")
    hidden = inputs.options["attn_mask"].logical_not()
    right = ours(inputs, backend)
    for least in (torch.finfo(torch.float32).min, -INF):
        inputs.options["attn_mask"] = torch.zeros(hidden.shape).masked_fill(hidden, least)
        for name, t in ours(inputs, backend).items():
            torch.testing.assert_close(t, right[name], msg=name)


def test_a_nan_of_one_sample_stays_with_its_prefix(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", prefixes="bank"))
    with torch.no_grad():
        inputs.q[0, 0, 0, 0] = torch.nan
    found, used = ours(inputs, backend), inputs.options["prefix_ids"].tolist()
    for name in ("dprefix_k", "dprefix_v"):
        nan = [bool(row.isnan().any()) for row in found[name]]
        assert nan == [row == used[0] for row in range(3)], name


@pytest.mark.parametrize("L", [7, 16, 197])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_large_key_bias_stays_with_the_queries(backend: str, dtype: str, L: int) -> None:
    """What a bias makes of the lanes past the last query must not reach the sums over queries."""
    inputs = make_inputs(Shape(2, 2, 2, L, L, 10, 64), DTYPES[dtype])
    bias = torch.zeros(2, 1, 1, L, dtype=DTYPES[dtype])
    bias[..., : L // 2] = 100.0
    inputs.options["attn_mask"] = bias
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "prefix_k", "prefix_v", "memory"])
def test_a_nan_reaches_the_output(backend: str, poisoned: str) -> None:
    inputs = make_inputs("ragged", grad=False, memory="shared")
    inputs.tensors[poisoned][..., 0, 0] = torch.nan
    assert inputs.call(backend).isnan().any()


def test_unused_rows_get_no_gradient(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ragged", **FEATURES["bank_lengths"]))
    found = ours(inputs, backend)
    for name in ("dprefix_k", "dprefix_v"):
        assert not found[name][1].any()  # named by nobody
        assert not found[name][2].any()  # length 0
        assert found[name][0].any()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_cpu_backend_takes_what_it_promises(dtype: str) -> None:
    """So that the skips above cannot hide a kernel that refuses too much."""
    if reasons := backends.here()["cpu"]:
        pytest.skip("; ".join(reasons))
    asked = [(shape, "plain") for shape in SHAPES if shape != "odd_width"] + [("ragged", f) for f in FEATURES]
    for shape, feature in asked:
        words = suited("cpu", make_inputs(shape, DTYPES[dtype], **FEATURES[feature]))[1]
        assert not words, (shape, feature, words)


def test_the_reference_takes_everything() -> None:
    """The gradient of a mask too, which the tests above do without where a backend refuses it."""
    for shape in SHAPES:
        for feature in FEATURES:
            assert not objections("reference", make_inputs(shape, **FEATURES[feature])), (shape, feature)


# small sizes, because gradcheck calls once for each number
GRADCHECKED = {
    "plain": {},
    "causal_decoding": {"causal": True},
    "bias": {"mask": "1HLS", "mask_dtype": "float"},
    "key_bias": {"mask": "B11S", "mask_dtype": "float", "causal": True},
    "blind_rows": {"mask": "BHLS", "blind": True},
    "per_sample": {"prefixes": "per_sample"},
    "bank_lengths": {"prefixes": "bank", "lengths": "T", "mask": "S"},
    "memory": {"memory": "shared", "causal": True},
    "memory_gelu": {"memory": "as_prefix", "phi": "gelu", "prefixes": "bank"},
    "memory_none": {"memory": "as_prefix", "phi": "none", "prefixes": "per_sample"},
    "softcap": {"softcap": 1.5, "mask": "BHLS", "mask_dtype": "float"},
}


@pytest.mark.parametrize("feature", GRADCHECKED)
def test_gradcheck(feature: str) -> None:
    inputs = make_inputs(Shape(2, 4, 2, 3, 4, 2, 2), torch.float64, **GRADCHECKED[feature])

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs.tensors, tensors, strict=True))
        return prefix_attention(**named, **inputs.options, return_lse=True, backend="reference")  # type: ignore[return-value]

    assert torch.autograd.gradcheck(call, tuple(inputs.tensors.values()), fast_mode=feature != "plain")


def test_gradcheck_through_both_dropouts() -> None:
    inputs = make_inputs(Shape(2, 2, 1, 3, 4, 3, 2), torch.float64, causal=True)

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        options = {**inputs.options, "dropout_p": 0.3, "prefix_dropout_p": 0.4}
        return prefix_attention(**dict(zip(inputs.tensors, tensors, strict=True)), **options)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(call, tuple(inputs.tensors.values()))


def test_a_second_derivative_is_refused(backend: str) -> None:
    inputs = accepted(backend, make_inputs("single"))
    (grad,) = torch.autograd.grad(inputs.call(backend).square().sum(), inputs.q, create_graph=True)
    with pytest.raises(NotImplementedError, match="prefix_attention can be differentiated once"):
        torch.autograd.grad(grad.sum(), inputs.q)
