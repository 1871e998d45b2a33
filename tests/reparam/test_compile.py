"""The op of the reparameterization under opcheck, torch.compile, torch.export and torch.func."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prefixattn import reparameterize
from prefixattn.testing.reparam import FEATURES, make_inputs, ours
from tests.support import accepted_network as accepted

# torch's own: Dynamo makes an autograd.Function's context by calling the class; Inductor and jvp still use TorchScript
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),
]


@pytest.fixture
def backend(reparam_backend: str) -> str:
    return reparam_backend


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_opcheck(backend: str) -> None:
    for feature, shape in (("plain", "ten_rows"), ("no_biases", "per_layer"), ("interleaved", "per_layer")):
        inputs = accepted(backend, make_inputs(shape, torch.bfloat16, grad=False, **FEATURES[feature]))
        args = (*inputs.parameters, *inputs.form, torch.bfloat16, backend)
        torch.library.opcheck(torch.ops.prefixattn.reparam_fwd, args)
        x, w1, _, w2, _ = inputs.parameters
        _, z = torch.ops.prefixattn.reparam_fwd(*args)
        for needs in ([t is not None for t in inputs.parameters], [True, False, False, True, False]):
            args = (inputs.dkv, z, x, w1, None, w2, None, *inputs.form, torch.bfloat16, needs, backend)
            torch.library.opcheck(torch.ops.prefixattn.reparam_bwd, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend: str, compiler: str) -> None:
    inputs = accepted(backend, make_inputs("three_networks", torch.bfloat16))
    eager = ours(inputs, backend)

    def call(**tensors: Tensor) -> Tensor:
        kv = reparameterize(**tensors, **inputs.form._asdict(), dtype=torch.bfloat16, backend=backend)
        return kv.flatten(0, 1) * 2

    kv = torch.compile(call, fullgraph=True, backend=compiler)(**inputs.tensors)
    torch.testing.assert_close(kv.detach().view_as(inputs.dkv), eager["kv"] * 2)
    grads = torch.autograd.grad(kv, list(inputs.tensors.values()), inputs.dkv.flatten(0, 1) / 2)
    for name, grad in zip(inputs.tensors, grads, strict=True):
        torch.testing.assert_close(grad, eager["d" + name], msg=name)


def test_export_keeps_the_op_and_its_gradient(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ten_rows"))

    class Network(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return reparameterize(*tensors, **inputs.form._asdict(), backend=backend)

    program = torch.export.export(Network(), tuple(t.detach() for t in inputs.tensors.values())).module()
    kv = program(*inputs.tensors.values())
    eager = ours(inputs, backend)
    assert torch.equal(kv, eager["kv"])
    grads = torch.autograd.grad(kv, list(inputs.tensors.values()), inputs.dkv)
    for name, grad in zip(inputs.tensors, grads, strict=True):
        assert torch.equal(grad, eager["d" + name]), name


def test_torch_func_grad_is_right_and_vmap_refused(backend: str) -> None:
    inputs = accepted(backend, make_inputs("ten_rows"))
    eager = ours(inputs, backend)
    tensors = tuple(t.detach() for t in inputs.tensors.values())

    def loss(*tensors: Tensor) -> Tensor:
        return (reparameterize(*tensors, **inputs.form._asdict(), backend=backend) * inputs.dkv).sum()

    grads = torch.func.grad(loss, argnums=tuple(range(5)))(*tensors)
    for name, grad in zip(inputs.tensors, grads, strict=True):
        assert torch.equal(grad, eager["d" + name]), name
    with pytest.raises(NotImplementedError, match=r"reparameterize has no rule for torch.func.vmap; stack the mapped"):
        torch.func.vmap(loss)(*(t[None] for t in tensors))


def test_a_compiled_func_grad_is_refused_and_never_zero() -> None:
    tensors = tuple(t.detach() for t in make_inputs("ten_rows").tensors.values())
    sizes = make_inputs("ten_rows").form._asdict()

    def gradient(*tensors: Tensor) -> Tensor:
        return torch.func.grad(lambda *t: reparameterize(*t, **sizes).square().sum())(*tensors)  # type: ignore[no-any-return]

    with pytest.raises(Exception, match=r"inside torch\.func's transforms does not compile"):
        torch.compile(gradient, fullgraph=True, backend="eager")(*tensors)


def test_meta_tensors_have_a_shape() -> None:
    inputs = make_inputs("three_networks", device="meta", grad=False)
    kv = inputs.call()
    assert (kv.shape, kv.device.type) == (inputs.dkv.shape, "meta")


def test_a_second_derivative_is_refused(backend: str) -> None:
    inputs = accepted(backend, make_inputs("five_rows"))
    (grad,) = torch.autograd.grad(inputs.call(backend).square().sum(), inputs.tensors["w2"], create_graph=True)
    with pytest.raises(NotImplementedError, match="reparameterize can be differentiated once"):
        torch.autograd.grad(grad.sum(), inputs.tensors["w1"])
