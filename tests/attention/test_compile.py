"""The op under opcheck, torch.compile, torch.export, autocast and torch.func."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from prefixattn import backends, prefix_attention
from prefixattn.attention.call import Call, Given, Needs
from prefixattn.testing.attention import FEATURES, Inputs, Shape, make_inputs, ours, suited

# torch's own: Dynamo makes an autograd.Function's context by calling the class; Inductor and jvp still use TorchScript
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),  # in 2.15 a FutureWarning
]

EVERYTHING = {"prefixes": "bank", "lengths": "T", "mask": "B11S", "causal": True, "memory": "as_prefix"}


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


FEW = Shape(2, 6, 2, 9, 9, 5, 24)  # numbers: what is compiled or checked runs often


def inputs_for(backend: str, shape: Shape = FEW, dtype: torch.dtype = torch.float32, **options: Any) -> Inputs:
    inputs, words = suited(backend, make_inputs(shape, dtype, **options))
    if words:
        pytest.skip(words)
    return inputs


def normal_form(inputs: Inputs, **more: Any) -> Call:
    """The op's own form of a bank's call."""
    tensors, options = {n: t.detach() for n, t in inputs.tensors.items()}, inputs.options
    ids = options["prefix_ids"]
    return Call(**{
        "attn_mask": options.get("attn_mask"), **tensors, "prefix_ids": ids,
        "prefix_lengths": options["prefix_lengths"][ids], "is_causal": True, "scale": 0.25, **more,
    })  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(backend: str, dropout_p: float) -> None:
    # strides that a fake could get wrong: views of a packed projection without dropout, stride 0 with it
    inputs = inputs_for(backend, layout="expanded" if dropout_p else "packed", **EVERYTHING)
    dropout = {"dropout_p": dropout_p, "prefix_dropout_p": dropout_p / 2}
    call = normal_form(inputs, seed=torch.tensor([7]) if dropout_p else None, **dropout)
    torch.library.opcheck(torch.ops.prefixattn.fwd, (*call, not dropout_p, not dropout_p, backend))
    out, lse, _, attended = torch.ops.prefixattn.fwd(*call, True, True, backend)
    needs = Needs(q=True, prefix_k=True) if dropout_p else Needs(*[True] * 5, memory=True)
    given = Given(torch.randn_like(out), None if dropout_p else lse, attended, lse)
    torch.library.opcheck(torch.ops.prefixattn.bwd, (*given, *call, list(needs), backend))


def test_opcheck_with_a_bias_that_learns() -> None:
    inputs = make_inputs(FEW, **{**EVERYTHING, "mask_dtype": "float"})
    call = normal_form(inputs, phi="gelu", softcap=3.0)
    out, lse, _, attended = torch.ops.prefixattn.fwd(*call, False, True, "reference")
    given = Given(torch.randn_like(out), None, attended, lse)
    torch.library.opcheck(torch.ops.prefixattn.bwd, (*given, *call, [True] * len(Needs._fields), "reference"))


def assert_same(compiled: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    assert compiled.keys() == eager.keys()
    for name, t in eager.items():
        assert t.stride() == compiled[name].stride(), f"{name}: stride {compiled[name].stride()}, eager {t.stride()}"
        torch.testing.assert_close(compiled[name], t, msg=lambda m, name=name: f"{name}: {m}")


def compiled(inputs: Inputs, call: Callable[..., Any], backend: str) -> dict[str, Tensor]:
    """`ours` of inputs with prefix_attention replaced by its compiled form."""
    from prefixattn.testing.attention import results

    options = {**inputs.options, "backend": backend, "return_lse": True, "return_prefix_mass": True}
    return results(inputs, *call(**inputs.tensors, **options))


@pytest.mark.parametrize(
    "feature", ["plain", "bias", "bank_sample_lengths", "packed", "transposed_prefix", "memory_bank"]
)
def test_compile_forward_and_backward(backend: str, feature: str) -> None:
    inputs = inputs_for(backend, **FEATURES[feature])
    call = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    assert_same(compiled(inputs, call, backend), ours(inputs, backend))


def test_compile_with_inductor(backend: str) -> None:
    inputs = inputs_for(backend, **EVERYTHING)

    def call(q: Tensor, **rest: Any) -> Any:
        out, *others = prefix_attention(q * 1.5, **rest)
        return out * 2, *others

    eager = compiled(inputs, call, backend)
    assert_same(compiled(inputs, torch.compile(call, fullgraph=True), backend), eager)


def test_dynamic_shapes_compile_once(backend: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(prefix_attention, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for B, N, P in ((3, 9, 5), (4, 20, 17), (5, 6, 7)):
        inputs = make_inputs(Shape(B, 2, 2, N, N, P, 16), causal=True)
        for t in inputs.tensors.values():
            torch._dynamo.mark_static(t, t.dim() - 1)  # the head's width is a property of the model
        assert_same(compiled(inputs, call, backend), ours(inputs, backend))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, f"compiled again for another batch, length or prefix: {counts}"


def test_a_compiled_backward_copies_no_gradient(backend: str) -> None:
    """Asking dout for its strides while Dynamo traces would make it contiguous first."""
    called: list[str] = []

    def read(graph: torch.fx.GraphModule, _: Any) -> Any:
        called[:] = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return make_boxed_func(graph.forward)

    inputs = inputs_for(backend, **FEATURES["packed"])
    compiler = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=read)
    compiled(inputs, torch.compile(prefix_attention, fullgraph=True, backend=compiler), backend)
    assert "prefixattn.bwd.default" in called and "aten.clone.default" not in called


def test_compiled_dropout_follows_the_seed(backend: str) -> None:
    inputs = inputs_for(backend)

    def call(**tensors: Tensor) -> Any:
        options = {"enable_gqa": True, "dropout_p": 0.2, "prefix_dropout_p": 0.2, "backend": backend}
        return prefix_attention(**tensors, **options)  # type: ignore[arg-type]

    fast = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    eager = call(**inputs.tensors)
    torch.manual_seed(2)
    first, second = fast(**inputs.tensors), fast(**inputs.tensors)
    torch.testing.assert_close(first, eager)
    assert not torch.equal(first, second)


def test_a_compiled_call_refuses_ids_out_of_range(backend: str) -> None:
    inputs = inputs_for(backend, **EVERYTHING)
    call = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    inputs.options["prefix_ids"] = torch.tensor([0, 3])
    with pytest.raises(RuntimeError, match="prefix_ids has a value outside 0 to 2"):
        call(**inputs.tensors, **inputs.options, backend=backend)


class Layer(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.prefix_k = torch.nn.Parameter(torch.randn(2, 5, 16))
        self.prefix_v = torch.nn.Parameter(torch.randn(2, 5, 16))
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_attention(q, k, v, self.prefix_k, self.prefix_v, is_causal=True, backend=self.backend)  # type: ignore[return-value]


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend: str, strict: bool) -> None:
    layer = Layer(backend)
    q, k, v = torch.randn(3, 2, 2, 9, 16)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (q, k, v), strict=strict, dynamic_shapes=({2: length},) * 3)
    q, k, v = torch.randn(3, 2, 2, 21, 16)
    out = program.module()(q, k, v)
    torch.testing.assert_close(out, layer(q, k, v))


def test_an_exported_program_has_gradients(backend: str) -> None:
    layer = Layer(backend)
    q, k, v = torch.randn(3, 2, 2, 9, 16).unbind()
    exported = torch.export.export(layer, (q, k, v)).module()
    found = []
    for module in (layer, exported):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)] + [module.prefix_k, module.prefix_v]
        found.append(torch.autograd.grad(module(*leaves[:3]).square().sum(), leaves))
    for grad, right in zip(*found, strict=True):
        torch.testing.assert_close(grad, right)
        assert right.any()


def test_an_exported_program_of_another_type_is_refused() -> None:
    if reasons := backends.here()["cpu"]:
        pytest.skip("; ".join(reasons))
    q, k, v = torch.randn(3, 2, 2, 9, 16).unbind()
    exported = torch.export.export(Layer("cpu"), (q, k, v)).module().to(torch.bfloat16)
    words = "called with prefix_k torch.bfloat16 on cpu, expected torch.float32 on cpu"
    with pytest.raises(NotImplementedError, match=words):
        exported(q, k, v)


@pytest.mark.parametrize("same", ["kv", "qk", "qkv", "prefixes", "all"])
def test_compiles_where_inputs_are_one_tensor(backend: str, same: str) -> None:
    q, k, v, *prefixes = torch.randn(5, 2, 2, 9, 16).unbind()
    one = prefixes[0]
    tensors = {
        "kv": (q, k, k, *prefixes),
        "qk": (q, q, k, *prefixes),
        "qkv": (q, q, q, *prefixes),
        "prefixes": (q, k, v, one, one),  # one per sample: no shared prefix's extra axis makes them two
        "all": (q, q, q, q, q),
    }[same]
    results = []
    for call in (prefix_attention, torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")):
        leaves = {id(t): t.detach().requires_grad_() for t in tensors}
        out = call(*(leaves[id(t)] for t in tensors), backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for fast, eager in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager)


def test_keys_that_were_filled_in_place_have_gradients(backend: str) -> None:
    """As DeepSeek makes them: an empty tensor, whose parts are copied into it."""
    inputs = inputs_for(backend)
    given = ("q", "v", "prefix_k", "prefix_v")

    def call(k: Tensor, *others: Tensor) -> Tensor:
        made = k.new_empty(k.shape)
        made[..., :8].copy_(k[..., :8])
        made[..., 8:].copy_(k[..., 8:])
        q, v, prefix_k, prefix_v = others
        out = prefix_attention(q, made, v, prefix_k, prefix_v, **inputs.options, backend=backend)
        assert isinstance(out, Tensor)
        return out

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [inputs.tensors[name].detach().requires_grad_() for name in ("k", *given)]
        results.append(torch.autograd.grad(function(*leaves).sin().sum(), leaves))
    torch.testing.assert_close(*results)
    assert results[0][0].any()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("mask", ["", "float32"])
def test_autocast_casts_as_sdpa_does(backend: str, mask: str, mode: str) -> None:
    options: dict[str, Any] = {"mask": "B11S", "mask_dtype": mask} if mask else {}
    inputs = inputs_for(backend, causal=True, **options)
    call: Callable[..., Any] = prefix_attention
    if mode == "compiled":
        call = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = call(**inputs.tensors, **inputs.options, backend=backend)
        plain = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.q, inputs.q)
        assert out.dtype == plain.dtype == torch.bfloat16
        # inside the region too: autocast must not reach into the backward pass
        out.float().sum().backward()
    halves = inputs.to(torch.bfloat16)
    if mask:
        mask = inputs.tensors["attn_mask"]
        halves.tensors["attn_mask"] = mask.detach().requires_grad_(mask.requires_grad)
    expected = halves.call(backend)
    torch.testing.assert_close(out, expected)
    expected.float().sum().backward()
    for name, t in inputs.tensors.items():
        if not t.requires_grad:
            continue
        assert t.grad is not None and t.grad.dtype == torch.float32
        torch.testing.assert_close(t.grad, halves.tensors[name].grad.float(), msg=name)


def test_autocast_leaves_float64_alone() -> None:
    inputs = make_inputs("even", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert inputs.call("reference").dtype == torch.float64


def test_vmap_is_refused_in_words(backend: str) -> None:
    inputs = inputs_for(backend, FEW._replace(H=2))
    tensors = [t.detach().expand(3, *t.shape) for t in inputs.tensors.values()]
    call = torch.func.vmap(lambda *t: prefix_attention(*t, backend=backend))
    for needs_grad in (False, True):
        tensors[0] = tensors[0].detach().requires_grad_(needs_grad)
        with pytest.raises(NotImplementedError, match=r"prefix_attention has no rule for torch\.func\.vmap"):
            call(*tensors)


def test_forward_mode_is_refused() -> None:
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: prefix_attention(q, q, q, q[0], q[0]), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        prefix_attention(forward_ad.make_dual(q, q), q, q, q[0], q[0])


def test_func_grad(backend: str) -> None:
    inputs = inputs_for(backend, FEW._replace(H=2))
    tensors = [t.detach() for t in inputs.tensors.values()]

    def loss(*tensors: Tensor) -> Tensor:
        return (prefix_attention(*tensors, backend=backend) * inputs.dout).sum()

    grads = torch.func.grad(loss, tuple(range(5)))(*tensors)
    expected = torch.autograd.grad((inputs.call(backend) * inputs.dout).sum(), list(inputs.tensors.values()))
    for name, grad, right in zip(inputs.tensors, grads, expected, strict=True):
        assert torch.equal(grad, right), name


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_func_grad_is_refused_and_never_zero(compiler: str) -> None:
    x, prefix = torch.randn(1, 1, 3, 8), torch.randn(1, 2, 8)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda q: prefix_attention(q, x, x, prefix, prefix).square().sum())(x)

    with pytest.raises(Exception, match=r"inside torch\.func's transforms does not compile"):
        torch.compile(gradient, fullgraph=True, backend=compiler)(x)


def test_meta_tensors_have_a_shape() -> None:
    q, prefix = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(3, 4, 8, device="meta")
    out, lse = prefix_attention(q, q, q, prefix, prefix, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 3, 5, 8), (2, 3, 5), "meta")
