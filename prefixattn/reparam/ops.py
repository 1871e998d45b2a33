"""prefixattn::reparam_fwd and ::reparam_bwd: made as the ops of attention are, see prefixattn/ops.py."""

from typing import Any

import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.reparam.reference import Form

_FORM = "int layers, int kv_heads, int head_dim, bool interleaved, str activation"
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIB = torch.library.Library("prefixattn", "FRAGMENT")
_LIB.define(
    f"reparam_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, {_FORM}, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    f"reparam_bwd(Tensor dbank, Tensor x, Tensor w1, Tensor w2, Tensor z, {_FORM}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, layers, kv_heads, head_dim, interleaved, activation, dtype, backend = args
    form = Form(layers, kv_heads, head_dim, interleaved, activation)
    result: tuple[Tensor, Tensor] = backends.module(backend, "reparam").fwd(*_dense(tensors), form, dtype)
    return result


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *tensors, layers, kv_heads, head_dim, interleaved, activation, needs, backend = args
    form = Form(layers, kv_heads, head_dim, interleaved, activation)
    result: tuple[Tensor, ...] = backends.module(backend, "reparam").bwd(*_dense(tensors), form, tuple(needs))
    return result


def _dense(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Contiguous: parameters are, and so is the gradient of a bank that was taken apart into layers."""
    return [None if t is None else t.contiguous() for t in tensors]


def _fwd_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    layers, kv_heads, head_dim, _, _, dtype, _ = args
    bank = x.new_empty((x.shape[0] * layers, 2, kv_heads, x.shape[1], head_dim), dtype=dtype)
    z = x.new_empty((*x.shape[:2], w1.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return bank, z


def _bwd_fake(dbank: Tensor, x: Tensor, w1: Tensor, w2: Tensor, z: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs = args[-2]
    shapes = (x.shape, w1.shape, w1.shape[:2], w2.shape, w2.shape[:2])
    return tuple([x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)])


def _no_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        "reparameterize has no rule for torch.func.vmap; stack the mapped networks along the first axis of x, w1 and w2"
    )


for _name, _impl, _fake in (("reparam_fwd", _fwd, _fwd_fake), ("reparam_bwd", _bwd, _bwd_fake)):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prefixattn::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"prefixattn::{_name}", _no_vmap, lib=_LIB)

_FWD, _BWD = torch.ops.prefixattn.reparam_fwd.default, torch.ops.prefixattn.reparam_bwd.default


class _Reparameterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = _FWD(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dbank: Tensor | None, _dz: None) -> tuple[Tensor | None, ...]:
        if dbank is None:
            return (None,) * 12
        needs = ctx.needs_input_grad[:5]
        args = (dbank, *ctx.saved_tensors, *ctx.form, needs, ctx.backend)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Once.apply(*args)
        else:
            grads = _BWD(*args)
        return *[grad if need else None for grad, need in zip(grads, needs, strict=True)], *(None,) * 7

    vmap = staticmethod(_no_vmap)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, _, *form, _dtype, backend = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, z)
    ctx.form, ctx.backend = tuple(form), backend


class _Transformed(_Reparameterize):
    """The form that torch.func asks for."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = _FWD(*inputs)
        return output

    setup_context = staticmethod(_keep_for_backward)


class _Once(torch.autograd.Function):
    """The backward pass when a graph of it is recorded: its values are right, and differentiating them is refused."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = _BWD(*args)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "reparameterize can be differentiated once; for second derivatives use two linear layers "
            "(DeepShare(..., fused=False))"
        )

    vmap = staticmethod(_no_vmap)


torch.library.register_autograd(
    "prefixattn::reparam_fwd", _Reparameterize.backward, setup_context=_keep_for_backward, lib=_LIB
)


def reparam(*args: Any) -> Tensor:
    """The bank by prefixattn::reparam_fwd, with its gradient rule."""
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and torch.compiler.is_compiling():  # Dynamo would take the gradient of this call for zero
        raise NotImplementedError(
            "reparameterize inside torch.func's transforms does not compile; compile a function that calls "
            "torch.autograd.grad or backward, or leave the transform uncompiled"
        )
    bank: Tensor = (_Transformed if transformed else _Reparameterize).apply(*args)[0]
    return bank


class _Onto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, *inputs: Any) -> Tensor:
        ctx.inputs = len(inputs)
        bank: Tensor = _FWD(*inputs)[0]
        return bank

    @staticmethod
    def backward(ctx: Any, dbank: Tensor) -> tuple[Tensor | None, ...]:
        return dbank, *(None,) * ctx.inputs


def reparam_onto(stand_in: Tensor, *args: Any) -> Tensor:
    """The bank by prefixattn::reparam_fwd, with its gradient for that of a tensor that it does not depend on."""
    bank: Tensor = _Onto.apply(stand_in, *args)
    return bank
