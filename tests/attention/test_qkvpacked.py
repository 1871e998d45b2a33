"""prefix_attention_qkvpacked: prefix_attention on three views, with one gradient that nobody has to put together."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefixattn import backends, prefix_attention, prefix_attention_qkvpacked
from prefixattn.attention.call import Call, Given, Needs
from prefixattn.testing.attention import (
    FEATURES,
    SHAPES,
    Inputs,
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    ours_packed,
    packed,
    parts,
    results,
    same_dtype,
)
from tests.grids import DTYPES, FEWER_TYPES, in_turn, without
from tests.support import accepted

# a projection makes as many queries as keys, and as many heads of both
PACKABLE = [name for name, s in SHAPES.items() if s.L == s.S and s.H == s.Hkv]
# these two say how q, k and v lie, which is what is packed here
APPLICABLE = [f for f in FEATURES if f not in ("packed", "expanded")]


def ours_by_views(inputs: Inputs, backend: str, **more: Any) -> dict[str, Tensor]:
    """The same by prefix_attention on three views, whose gradients autograd puts together."""
    options = {"backend": backend, "return_lse": True, "return_prefix_mass": True, **inputs.options, **more}
    rest = {n: t for n, t in inputs.tensors.items() if n != "qkv"}
    return results(inputs, *prefix_attention(**parts(inputs.tensors["qkv"]), **rest, **options))


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, t in found.items():
        assert torch.equal(t, right[name]), name


CASES = [(s, "causal") for s in PACKABLE] + [("ragged", f) for f in APPLICABLE]
# the rest follows from the equality below and from test_prefix_attn
SENTINELS = [
    ("vit", "plain"),
    ("tile_past", "causal"),
    ("ragged", "bias"),
    ("ragged", "bank_sample_lengths"),
    ("ragged", "memory_gelu"),
    ("ragged", "softcap"),
]
# the interpreter takes seconds for a case; how views become one tensor is no matter of a backend
FEW = [("ragged", "plain"), *SENTINELS[1:]]


def gridded(cases: list[tuple[str, str]]) -> list[Any]:
    return in_turn(without(FEWER_TYPES, "triton"), cases) + in_turn({"triton": FEWER_TYPES["triton"]}, FEW)


@pytest.mark.parametrize("backend, dtype, shape, feature", gridded(CASES), indirect=["backend"])
def test_equals_prefix_attention_on_the_views(backend: str, shape: str, feature: str, dtype: str) -> None:
    inputs = packed(accepted(backend, make_inputs(shape, DTYPES[dtype], **FEATURES[feature])))
    assert_equal(ours_packed(inputs, backend), ours_by_views(inputs, backend))


@pytest.mark.parametrize("backend, dtype, shape, feature", gridded(SENTINELS), indirect=["backend"])
def test_against_float64(backend: str, shape: str, feature: str, dtype: str) -> None:
    inputs = accepted(backend, make_inputs(shape, DTYPES[dtype], **FEATURES[feature]))
    found = ours_packed(packed(inputs), backend)
    found |= {"d" + name: grad for name, grad in parts(found.pop("dqkv")).items()}
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("dropout_p, prefix_dropout_p", [(0.3, 0.0), (0.0, 0.4), (0.3, 0.4)])
def test_dropout_follows_the_seed(backend: str, dropout_p: float, prefix_dropout_p: float) -> None:
    inputs = packed(accepted(backend, make_inputs("ragged", causal=True)))
    found = []
    for call in (ours_packed, ours_by_views):
        torch.manual_seed(5)
        found.append(call(inputs, backend, dropout_p=dropout_p, prefix_dropout_p=prefix_dropout_p))
    assert_equal(*found)
    assert not torch.equal(found[0]["out"], ours_packed(inputs, backend)["out"])


@pytest.mark.parametrize("wanted", [("qkv",), ("prefix_k",), ("prefix_k", "prefix_v"), ("qkv", "prefix_v")])
def test_a_gradient_nobody_wants_changes_no_other(backend: str, wanted: tuple[str, ...]) -> None:
    inputs = packed(accepted(backend, make_inputs("ragged", causal=True)))
    every = ours_packed(inputs, backend)
    for name, t in inputs.tensors.items():
        t.requires_grad_(name in wanted)
    some = ours_packed(inputs, backend)
    assert {n for n in some if n.startswith("d")} == {"d" + n for n in wanted}
    if backend == "triton":  # what is wanted chooses among kernels with other tiles
        for name, t in some.items():
            torch.testing.assert_close(t, every[name], rtol=1e-5, atol=1e-6, msg=name)
    else:
        assert_equal(some, {n: every[n] for n in some})


def test_prefixes_alone_compute_nothing_for_qkv(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = packed(accepted(backend, make_inputs("ragged")))
    inputs.tensors["qkv"].requires_grad_(False)
    module, asked = backends.module(backend), []
    right = module.bwd

    def bwd(call: Call, given: Given, needs: Needs, into: Any) -> Any:
        asked.append((needs, into))
        return right(call, given, needs, into)

    monkeypatch.setattr(module, "bwd", bwd)
    with Recorder() as recorder:
        ours_packed(inputs, backend)
    assert asked == [(Needs(prefix_k=True, prefix_v=True), None)]
    dqkv, *_ = [made for made in recorder.made if made.by == "prefixattn::bwd_qkvpacked"]
    assert dqkv.shape == (0,)


@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_output_alone_has_a_gradient(backend: str, used: str) -> None:
    inputs = packed(accepted(backend, make_inputs("ragged", causal=True)))
    qkv, prefix_k, prefix_v = inputs.tensors.values()
    wanted = [qkv, prefix_k]
    options = {**inputs.options, "return_lse": True, "backend": backend}
    out, lse = prefix_attention_qkvpacked(**inputs.tensors, **options)
    right, right_lse = prefix_attention(**parts(qkv), prefix_k=prefix_k, prefix_v=prefix_v, **options)
    made = (out.transpose(1, 2), right, inputs.dout) if used == "out" else (lse, right_lse, inputs.dlse)
    found, expected = (torch.autograd.grad(t, wanted, made[2]) for t in made[:2])
    for grad, other in zip(found, expected, strict=True):
        assert torch.equal(grad, other)
        assert grad.any()


def test_returns_in_order(backend: str) -> None:
    inputs = packed(accepted(backend, make_inputs("even")))

    def call(**options: Any) -> Any:
        return prefix_attention_qkvpacked(**inputs.tensors, backend=backend, **options)

    out, lse, mass = call(return_lse=True, return_prefix_mass=True)
    B, N, _, H, D = inputs.tensors["qkv"].shape
    assert (out.shape, lse.shape, mass.shape) == ((B, N, H, D), (B, H, N), (B, H, N))
    assert not mass.requires_grad
    assert torch.equal(call(), out)
    for options, expected in (({"return_lse": True}, lse), ({"return_prefix_mass": True}, mass)):
        got = call(**options)
        assert len(got) == 2 and torch.equal(got[0], out) and torch.equal(got[1], expected)


class Made(NamedTuple):
    by: str
    shape: torch.Size
    contiguous: bool


class Recorder(TorchDispatchMode):
    """Each tensor that an operation returned, also inside prefixattn's own; the tensors themselves are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prefixattn":
            with self:
                result = func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        self.made += [Made(func._schema.name, t.shape, t.is_contiguous()) for t in tree_leaves(result)]
        return result

    def of_size(self, least: int) -> list[str]:
        """What torch made of `least` elements or more, and did not merely view."""
        views = ("permute", "transpose", "unbind", "detach")
        big = [made.by.removeprefix("aten::") for made in self.made if made.shape.numel() >= least]
        return sorted(name for name in big if name not in views and not name.startswith("prefixattn"))


def test_backward_writes_one_tensor_once() -> None:
    if reasons := backends.here()["cpu"]:
        pytest.skip("; ".join(reasons))
    inputs = packed(make_inputs("vit", causal=True))
    qkv, rest = inputs.tensors["qkv"], {n: t for n, t in inputs.tensors.items() if n != "qkv"}
    dout = torch.randn_like(qkv[:, :, 0])
    out = prefix_attention_qkvpacked(qkv, **rest, **inputs.options, backend="cpu")
    with Recorder() as recorder:
        out.backward(dout)
    assert recorder.of_size(dout.numel()) == ["new_empty"]
    [dqkv] = [made for made in recorder.made if made.shape == qkv.shape and made.by == "prefixattn::bwd_qkvpacked"]
    assert dqkv.contiguous

    out = prefix_attention(**parts(qkv), **rest, **inputs.options, backend="cpu")
    with Recorder() as recorder:
        torch.autograd.grad(out, qkv, dout.transpose(1, 2))
    # what the packed form does without, so that its short list can be trusted
    made = recorder.of_size(dout.numel())
    assert made.count("empty") == 3 and made.count("select_backward") == 3


def test_autocast_gives_one_gradient_in_the_type_of_qkv(backend: str) -> None:
    inputs = packed(accepted(backend, make_inputs("ragged", causal=True)))
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention_qkvpacked(**inputs.tensors, **inputs.options, backend=backend)
        assert out.dtype == torch.bfloat16
        with Recorder() as recorder:
            out.float().sum().backward()
    assert not {made.by for made in recorder.made} & {"aten::stack", "aten::select_backward"}
    halves = inputs.to(torch.bfloat16)
    expected = prefix_attention_qkvpacked(**halves.tensors, **inputs.options, backend=backend)
    assert torch.equal(out, expected)
    expected.float().sum().backward()
    for name, t in inputs.tensors.items():
        assert t.grad.dtype == torch.float32
        assert torch.equal(t.grad, halves.tensors[name].grad.float()), name


@pytest.mark.parametrize("order", ["B3HND", "wide", "expanded"])
def test_any_order_in_memory(backend: str, order: str) -> None:
    inputs = packed(accepted(backend, make_inputs("ragged", causal=True)))
    qkv = inputs.tensors["qkv"].detach()
    if order == "B3HND":
        qkv = qkv.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    elif order == "wide":
        qkv = torch.stack([qkv, torch.full_like(qkv, torch.nan)], -1)[..., 0]
    else:
        qkv = qkv[:, :1].expand_as(qkv)
    assert not qkv.is_contiguous()
    inputs.tensors["qkv"] = qkv.detach().requires_grad_()
    found = ours_packed(inputs, backend)
    inputs.tensors["qkv"] = qkv.contiguous().requires_grad_()
    for name, right in ours_packed(inputs, backend).items():
        torch.testing.assert_close(found[name], right, msg=name)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "prefix_dropout_p": 0.4}], ids=["plain", "dropouts"])
def test_gradcheck(options: dict[str, float]) -> None:
    inputs = packed(make_inputs(Shape(2, 2, 2, 3, 3, 2, 2), torch.float64, mask="1HLS", mask_dtype="float"))

    def call(*tensors: Tensor) -> Any:
        torch.manual_seed(3)
        named = dict(zip(inputs.tensors, tensors, strict=True))
        return prefix_attention_qkvpacked(**named, **options, return_lse=True, backend="reference")  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(call, tuple(inputs.tensors.values()))


def test_a_second_derivative_is_refused(backend: str) -> None:
    inputs = packed(accepted(backend, make_inputs("single")))
    out = prefix_attention_qkvpacked(**inputs.tensors, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs.tensors["qkv"], create_graph=True)
    with pytest.raises(NotImplementedError, match="prefix_attention can be differentiated once"):
        torch.autograd.grad(grad.sum(), inputs.tensors["qkv"])


B, N, H, P, D = 2, 5, 4, 6, 8
REFUSED = {
    "no_tensor": ({"qkv": [1.0]}, ValueError, "qkv is a list, expected a tensor"),
    "sparse": (
        {"qkv": torch.ones(B, N, 3, H, D).to_sparse()},
        NotImplementedError,
        "qkv is a nested or sparse tensor, expected a dense one",
    ),
    "axes": ({"qkv": torch.ones(B, N, 3 * H * D)}, ValueError, "qkv has shape [2, 5, 96], expected [B, N, 3, H, D]"),
    "parts": (
        {"qkv": torch.ones(B, 3, N, H, D)},
        ValueError,
        "qkv has shape [2, 3, 5, 4, 8], expected [B, N, 3, H, D]",
    ),
    "type": (
        {"qkv": torch.ones(B, N, 3, H, D).long()},
        ValueError,
        "qkv is torch.int64, expected float32, bfloat16, float16 or float64",
    ),
    "prefix_heads": (
        {"prefix_k": torch.ones(2, P, D)},
        ValueError,
        "prefix_k has shape [2, 6, 8], expected [Hkv=4, P=6, D=8]",
    ),
    "mask": (
        {"attn_mask": torch.ones(N, P + N).bool()},
        ValueError,
        "attn_mask has shape [5, 11], expected one that broadcasts to [B=2, H=4, L=5, S=5]",
    ),
    "scale": ({"scale": torch.tensor(0.5)}, ValueError, "scale is 'Tensor', expected a number"),
    "dropout_p": ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; expected a probability in [0, 1]"),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case: str, autocast: bool) -> None:
    changed, kind, words = REFUSED[case]
    prefix = torch.randn(H, P, D)
    good = {"qkv": torch.randn(B, N, 3, H, D), "prefix_k": prefix, "prefix_v": prefix}
    with torch.autocast("cpu", enabled=autocast):
        assert prefix_attention_qkvpacked(**good).shape == (B, N, H, D)
        with pytest.raises(kind, match=f"^{re.escape(words)}$"):
            prefix_attention_qkvpacked(**{**good, **changed})
