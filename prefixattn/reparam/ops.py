"""prefixattn::reparam_fwd and ::reparam_bwd: made as the ops of attention are, see prefixattn/attention/ops.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.attention.call import schema
from prefixattn.differentiation import once, transformed, without_vmap
from prefixattn.reparam.call import Call, Form, Given, Grads, Needs, Results

_TENSORS, _FORM, _GIVEN = len(Needs._fields), len(Form._fields), len(Given._fields)
_OTHERS = _FORM + 2  # arguments of reparam_fwd without a gradient: the form, dtype and backend
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIB = torch.library.Library("prefixattn", "FRAGMENT")
for _signature in (
    f"reparam_fwd({schema(Call)}, str backend) -> ({schema(Results)})",
    f"reparam_bwd({schema(Given)}, {schema(Call)}, bool[] needs, str backend) -> ({schema(Grads, 'd')})",
):
    _LIB.define(_signature, tags=_TAGS)


def _flat(call: Call) -> tuple[Any, ...]:
    """The call as the ops' arguments, which _call takes back."""
    return *call.tensors, *call.form, call.dtype


def _call(args: Sequence[Any]) -> Call:
    return Call._make((*args[:_TENSORS], Form._make(args[_TENSORS:-1]), args[-1]))


def _fwd(*args: Any) -> Results:
    result: Results = backends.module(args[-1], "reparam").fwd(_call(args[:-1]).each(Tensor.contiguous))
    return result


def _bwd(*args: Any) -> Grads:
    given, call, needs = _of_backward(args)
    given = Given(given.dkv.contiguous(), given.z.contiguous())  # also of kv that was taken apart into layers
    result: Grads = backends.module(args[-1], "reparam").bwd(call.each(Tensor.contiguous), given, needs)
    return result


def _of_backward(args: Sequence[Any]) -> tuple[Given, Call, Needs]:
    return Given(*args[:_GIVEN]), _call(args[_GIVEN:-2]), Needs(*args[-2])


def _fwd_fake(*args: Any) -> Results:
    call = _call(args[:-1])
    x, form = call.x, call.form
    shape = x.shape[0] * form.layers, 2, form.kv_heads, x.shape[1], form.head_dim
    kv = x.new_empty(shape, dtype=call.dtype)
    return Results(kv, x.new_empty((*x.shape[:2], call.w1.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32)))


def _bwd_fake(*args: Any) -> Grads:
    _, call, needs = _of_backward(args)
    x, w1, w2 = call.x, call.w1, call.w2
    shapes = (x.shape, w1.shape, w1.shape[:2], w2.shape, w2.shape[:2])
    return Grads(*[x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)])


_no_vmap = without_vmap(
    "reparameterize has no rule for torch.func.vmap; stack the mapped networks along the first axis of x, w1 and w2"
)
_Once = once(
    "reparameterize can be differentiated once; for second derivatives use two linear layers "
    "(DeepShare(..., fused=False))",
    _no_vmap,
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
    def backward(ctx: Any, dkv: Tensor | None, _dz: None) -> tuple[Tensor | None, ...]:
        if dkv is None:
            return (None,) * (_TENSORS + _OTHERS)
        x, w1, w2, z = ctx.saved_tensors
        needs = ctx.needs_input_grad[:_TENSORS]
        args = (dkv, z, x, w1, None, w2, None, *ctx.rest, needs, ctx.backend)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Once.apply(_BWD, *args)
        else:
            grads = _BWD(*args)
        return *[grad if need else None for grad, need in zip(grads, needs, strict=True)], *(None,) * _OTHERS

    vmap = staticmethod(_no_vmap)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, _, *rest, backend = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, z)
    ctx.rest, ctx.backend = tuple(rest), backend


class _Transformed(_Reparameterize):
    """The form that torch.func asks for."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = _FWD(*inputs)
        return output

    setup_context = staticmethod(_keep_for_backward)


torch.library.register_autograd(
    "prefixattn::reparam_fwd", _Reparameterize.backward, setup_context=_keep_for_backward, lib=_LIB
)


def reparam_fwd(call: Call, backend: str) -> Results:
    """prefixattn::reparam_fwd, for who wants no gradient of it."""
    return Results(*_FWD(*_flat(call), backend))


def reparam(call: Call, backend: str) -> Tensor:
    """kv by prefixattn::reparam_fwd, with its gradient rule."""
    kv: Tensor = (_Transformed if transformed("reparameterize") else _Reparameterize).apply(*_flat(call), backend)[0]
    return kv


class _Onto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, *inputs: Any) -> Tensor:
        ctx.inputs = len(inputs)
        kv: Tensor = _FWD(*inputs)[0]
        return kv

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Tensor | None, ...]:
        return dkv, *(None,) * ctx.inputs


def reparam_onto(stand_in: Tensor, call: Call, backend: str) -> Tensor:
    """kv by prefixattn::reparam_fwd, with its gradient for that of a tensor that it does not depend on."""
    kv: Tensor = _Onto.apply(stand_in, *_flat(call), backend)
    return kv
