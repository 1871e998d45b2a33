"""prefixattn::fwd and prefixattn::bwd: one schema, one fake and one gradient rule for every backend.

`Library.define` with an `autograd.Function` outside, because `custom_op` costs three times as much per call. The rule
is registered with the op as well, for graphs that hold nothing but the op: those of torch.export.
"""

from typing import Any

import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.layout import empty_like_order, unit_stride

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor? attn_mask, Tensor? rows, Tensor? lengths, Tensor? seed"
)
_NUMBERS = "float dropout_p, float prefix_dropout_p, bool is_causal, float scale"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_LIB = torch.library.Library("prefixattn", "DEF")
_LIB.define(f"fwd({_TENSORS}, {_NUMBERS}, bool want_mass, str backend) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_LIB.define(
    f"bwd(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, {_NUMBERS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = args
    result: tuple[Tensor, Tensor, Tensor] = backends.module(backend).fwd(*inputs)
    return result


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *inputs, needs, backend = args
    grads = backends.module(backend).bwd(*inputs, needs)
    # what nobody wanted is a tensor of its own: outputs of an op may not alias
    return tuple([grad if need else grad.new_empty(0) for grad, need in zip(grads, needs, strict=True)])


def _fwd_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    want_mass = args[-2]
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return empty_like_order(q), lse, q.new_empty(q.shape[:3] if want_mass else 0, dtype=torch.float32)


def _bwd_fake(dout: Tensor, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    q, k, v, prefix_k, prefix_v, attn_mask = args[:6]
    needs = args[-2]
    grads = [empty_like_order(t) if need else q.new_empty(0) for t, need in zip((q, k, v), needs[:3], strict=True)]
    for t, need in zip((prefix_k, prefix_v, attn_mask), needs[3:], strict=True):
        grads.append(t.new_empty(t.shape) if need and t is not None else q.new_empty(0))
    return tuple(grads)


def _no_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        "prefix_attention has no rule for torch.func.vmap; fold the mapped axis into the batch, "
        "and mapped prefixes into a bank with prefix_ids"
    )


for _name, _impl, _fake in (("fwd", _fwd, _fwd_fake), ("bwd", _bwd, _bwd_fake)):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prefixattn::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"prefixattn::{_name}", _no_vmap, lib=_LIB)

_FWD, _BWD = torch.ops.prefixattn.fwd.default, torch.ops.prefixattn.bwd.default


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output: tuple[Tensor, Tensor, Tensor] = _FWD(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _dmass: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # only lse was used: its gradient alone has to go through
        dout = torch.zeros_like(saved[-2]) if dout is None else unit_stride(dout)
        needs = ctx.needs_input_grad[:6]
        args = (dout, dlse, *saved, *ctx.numbers, needs, ctx.backend)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Once.apply(*args)
        else:
            grads = _BWD(*args)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *grads, None, None, None, None, None, None, None, None, None

    vmap = staticmethod(_no_vmap)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, mass = output
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], out, lse)
    ctx.numbers, ctx.backend = inputs[9:13], inputs[14]


class _Transformed(_PrefixAttention):
    """The form that torch.func asks for; binding its arguments costs 10 us, so that it is not the usual one."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output: tuple[Tensor, Tensor, Tensor] = _FWD(*inputs)
        return output

    setup_context = staticmethod(_keep_for_backward)


class _Once(torch.autograd.Function):
    """The backward pass when a graph of it is recorded: its values are right, and differentiating them is refused."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _BWD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "prefix_attention can be differentiated once; for second derivatives use "
            "scaled_dot_product_attention over concatenated keys and values"
        )

    vmap = staticmethod(_no_vmap)


torch.library.register_autograd(
    "prefixattn::fwd", _PrefixAttention.backward, setup_context=_keep_for_backward, lib=_LIB
)


def prefix_attn(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """prefixattn::fwd with its gradient rule."""
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and torch.compiler.is_compiling():  # Dynamo would take the gradient of this call for zero
        raise NotImplementedError(
            "prefix_attention inside torch.func's transforms does not compile; compile a function that calls "
            "torch.autograd.grad or backward, or leave the transform uncompiled"
        )
    result: tuple[Tensor, Tensor, Tensor] = (_Transformed if transformed else _PrefixAttention).apply(*args)
    return result
