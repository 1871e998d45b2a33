"""prefix_attention_qkvpacked under opcheck, torch.compile, torch.export and torch.func."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from prefixattn import prefix_attention_qkvpacked
from prefixattn.attention.call import Call, Given
from prefixattn.testing.attention import FEATURES, Inputs, Shape, make_inputs, ours_packed, packed, parts, suited

# torch's own, as in test_compile.py
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),
]

EVERYTHING = {"prefixes": "bank", "lengths": "T", "mask": "B11S", "causal": True, "memory": "as_prefix"}


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


FEW = Shape(2, 3, 3, 9, 9, 5, 32)  # numbers: what is compiled or checked runs often


def inputs_for(backend: str, **options: Any) -> Inputs:
    inputs, words = suited(backend, make_inputs(FEW, **options))
    if words:
        pytest.skip(words)
    return packed(inputs)


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, t in found.items():
        assert torch.equal(t, right[name]), name
        assert t.stride() == right[name].stride(), name


@pytest.mark.parametrize("needs", ["111001", "101000", "011000"], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(backend: str, dropout_p: float, needs: str) -> None:
    inputs = inputs_for(backend, grad=False, **EVERYTHING)
    qkv, prefix_k, prefix_v, memory = inputs.tensors.values()
    ids = inputs.options["prefix_ids"]
    call = Call(
        *parts(qkv).values(), prefix_k, prefix_v, inputs.options["attn_mask"], memory=memory, prefix_ids=ids,
        prefix_lengths=inputs.options["prefix_lengths"][ids], seed=torch.tensor([7]) if dropout_p else None,
        dropout_p=dropout_p, prefix_dropout_p=dropout_p / 2, is_causal=True, scale=0.25, phi="relu",
    )  # fmt: skip
    out, lse, _, attended = torch.ops.prefixattn.fwd(*call, False, True, backend)
    given = Given(torch.randn_like(out), None if dropout_p else lse, attended, lse)
    wanted = [need == "1" for need in needs]
    torch.library.opcheck(torch.ops.prefixattn.bwd_qkvpacked, (*given, qkv, *call[3:], wanted, backend))


def test_opcheck_with_a_bias_that_learns() -> None:
    tensors = [t.detach() for t in packed(make_inputs("ragged", **FEATURES["key_bias"])).tensors.values()]
    qkv, prefix_k, prefix_v, mask = tensors
    call = Call(*parts(qkv).values(), prefix_k[None], prefix_v[None], mask, is_causal=True, scale=0.25)
    out, lse, _, _ = torch.ops.prefixattn.fwd(*call, False, False, "reference")
    given = Given(torch.randn_like(out), None, out, lse)
    wanted = [True] * 4 + [False] * 2  # qkv, prefix_k, prefix_v, attn_mask, sinks, memory
    torch.library.opcheck(torch.ops.prefixattn.bwd_qkvpacked, (*given, qkv, *call[3:], wanted, "reference"))


@pytest.mark.parametrize("feature", ["plain", "bias", "bank_sample_lengths", "memory"])
def test_compile_forward_and_backward(backend: str, feature: str) -> None:
    inputs = inputs_for(backend, **FEATURES[feature])
    fast = torch.compile(prefix_attention_qkvpacked, fullgraph=True, backend="aot_eager")
    assert_equal(ours_packed(inputs, backend, fast), ours_packed(inputs, backend))


def test_a_compiled_backward_puts_nothing_together(backend: str) -> None:
    called = []

    def read(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        # lse's gradient in the type that the op keeps it in: a number a query and head
        called[:] = [
            str(n.target) for n in nodes if n.target is not torch.ops.aten._to_copy.default or n.meta["val"].ndim > 3
        ]
        return make_boxed_func(graph.forward)

    inputs = inputs_for(backend)
    compiler = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=read)
    fast = torch.compile(prefix_attention_qkvpacked, fullgraph=True, backend=compiler)
    assert_equal(ours_packed(inputs, backend, fast), ours_packed(inputs, backend))
    by_torch = {name for name in called if name.startswith("aten.")}
    assert "prefixattn.bwd_qkvpacked.default" in called
    assert by_torch <= {"aten.transpose.int", "aten.squeeze.dim", "aten.view.default"}  # views


def test_compile_with_inductor_between_projections(backend: str) -> None:
    inputs = inputs_for(backend, causal=True)
    B, N, _, H, D = inputs.tensors["qkv"].shape
    x, weight = torch.randn(B, N, H * D), torch.randn(3 * H * D, H * D) / 8

    def block(x: Tensor, weight: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        qkv = (x @ weight.T).view(B, N, 3, H, D)
        out = prefix_attention_qkvpacked(qkv, prefix_k, prefix_v, is_causal=True, backend=backend)
        return x + out.view(B, N, H * D)  # type: ignore[union-attr]

    leaves = [t.detach().requires_grad_() for t in (x, weight, *list(inputs.tensors.values())[1:])]
    found = []
    for call in (block, torch.compile(block, fullgraph=True)):
        out = call(*leaves)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_dynamic_shapes_compile_once(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(prefix_attention_qkvpacked, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for B, N, P in ((4, 9, 5), (5, 20, 17), (6, 7, 8)):  # not 3: torch gives axes of one size one symbol
        inputs = packed(make_inputs(Shape(B, 2, 2, N, N, P, 16), causal=True))
        for t in inputs.tensors.values():
            torch._dynamo.mark_static(t, t.dim() - 1)
        assert_equal(ours_packed(inputs, backend, fast), ours_packed(inputs, backend))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, f"compiled again for another batch, length or prefix: {counts}"


def test_compiles_where_both_prefixes_are_one_tensor(backend: str) -> None:
    qkv, prefix = torch.randn(2, 9, 3, 2, 16, requires_grad=True), torch.randn(2, 2, 5, 16, requires_grad=True)
    found = []
    fast = torch.compile(prefix_attention_qkvpacked, fullgraph=True, backend="aot_eager")
    for call in (prefix_attention_qkvpacked, fast):
        out = call(qkv, prefix, prefix, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), (qkv, prefix))))
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(compiled, eager)


class Layer(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.prefix_k = torch.nn.Parameter(torch.randn(2, 5, 16))
        self.prefix_v = torch.nn.Parameter(torch.randn(2, 5, 16))
        self.backend = backend

    def forward(self, qkv: Tensor) -> Any:
        return prefix_attention_qkvpacked(qkv, self.prefix_k, self.prefix_v, is_causal=True, backend=self.backend)


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend: str, strict: bool) -> None:
    layer, length = Layer(backend), torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(2, 9, 3, 2, 16),), strict=strict, dynamic_shapes=({1: length},))
    qkv = torch.randn(2, 21, 3, 2, 16)
    assert torch.equal(program.module()(qkv), layer(qkv))


def test_an_exported_program_has_gradients(backend: str) -> None:
    layer = Layer(backend)
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    exported = torch.export.export(layer, (qkv.detach(),)).module()
    found = []
    for module in (layer, exported):
        wanted = [qkv, module.prefix_k, module.prefix_v]
        found.append(torch.autograd.grad(module(qkv).square().sum(), wanted))
    for right, grad in zip(*found, strict=True):
        assert torch.equal(grad, right)
        assert right.any()


def test_func_grad(backend: str) -> None:
    inputs = inputs_for(backend)
    tensors = tuple(t.detach() for t in inputs.tensors.values())
    dout = torch.randn_like(tensors[0][:, :, 0])

    def loss(*tensors: Tensor) -> Tensor:
        return (prefix_attention_qkvpacked(*tensors, backend=backend) * dout).sum()

    grads = torch.func.grad(loss, (0, 1, 2))(*tensors)
    expected = torch.autograd.grad(loss(*inputs.tensors.values()), list(inputs.tensors.values()))
    for grad, right in zip(grads, expected, strict=True):
        assert torch.equal(grad, right)


def test_what_torch_func_cannot_do_is_refused() -> None:
    qkv, prefix = torch.randn(1, 4, 3, 2, 8), torch.randn(2, 3, 8)

    def call(qkv: Tensor) -> Any:
        return prefix_attention_qkvpacked(qkv, prefix, prefix)

    for needs_grad in (False, True):
        with pytest.raises(NotImplementedError, match=r"prefix_attention has no rule for torch\.func\.vmap"):
            torch.func.vmap(call)(qkv.expand(3, *qkv.shape).requires_grad_(needs_grad))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(call, (qkv,), (qkv,))
    gradient = torch.func.grad(lambda qkv: call(qkv).square().sum())
    with pytest.raises(Exception, match=r"inside torch\.func's transforms does not compile"):
        torch.compile(gradient, fullgraph=True, backend="eager")(qkv)


def test_meta_tensors_have_a_shape() -> None:
    qkv, prefix = torch.empty(2, 5, 3, 4, 8, device="meta"), torch.empty(4, 6, 8, device="meta")
    out, lse = prefix_attention_qkvpacked(qkv, prefix, prefix, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 5, 4, 8), (2, 4, 5), "meta")
