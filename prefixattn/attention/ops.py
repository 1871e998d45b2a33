"""prefixattn::fwd and prefixattn::bwd: one schema, one fake and one gradient rule for every backend.

prefixattn::bwd_qkvpacked is bwd for a packed projection: dq, dk and dv are written into one tensor. Its forward is fwd
on three views.

A torch operator has a flat list of arguments. It is that of the records' fields, and this file alone knows it: fwd has
those of Call and Wants, bwd those of Given and Call, both the backend's name last.

`Library.define` with an `autograd.Function` outside, because `custom_op` costs three times as much per call. The rule
is registered with the op as well, for graphs that hold nothing but the op: those of torch.export. They know fwd's own
rule only: from a packed projection, three gradients that the views' rules copy into one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefixattn import backends
from prefixattn.attention.call import NUMBERS, TENSORS, Call, Given, Grads, Needs, Results, Wants, schema
from prefixattn.attention.layout import empty_like_order, lse_type, unit_stride, unpacked
from prefixattn.differentiation import once, transformed, without_vmap

_QKV = 3  # fields of Call whose place a packed projection takes
_CALL, _GIVEN = len(Call._fields), len(Given._fields)
_MEMORY = TENSORS.index("memory") - len(TENSORS)  # from the end, as a packed call has fewer
_OTHERS = len(Call._fields) - len(Needs._fields) + len(Wants._fields) + 1  # arguments of fwd without a gradient
Flat = tuple[Tensor, ...]  # torch hands out the fields of Results as a plain tuple
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_LIB = torch.library.Library("prefixattn", "DEF")
for _signature in (
    f"fwd({schema(Call)}, {schema(Wants, 'want_')}, str backend) -> ({schema(Results)})",
    f"bwd({schema(Given)}, {schema(Call)}, bool[] needs, str backend) -> ({schema(Grads, 'd')})",
    f"bwd_qkvpacked({schema(Given)}, Tensor qkv, {schema(Call, first=_QKV)}, bool[] needs, str backend)"
    f" -> (Tensor dqkv, {schema(Grads, 'd', _QKV)})",
):
    _LIB.define(_signature, tags=_TAGS)


def _of_forward(args: Sequence[Any]) -> tuple[Call, Wants]:
    return Call._make(args[:_CALL]), Wants._make(args[_CALL:-1])  # takes less than half of Call(*args)


def _of_backward(args: Sequence[Any]) -> tuple[Given, Call, Needs]:
    return Given._make(args[:_GIVEN]), Call._make(args[_GIVEN:-2]), Needs._make(args[-2])


def _of_backward_qkvpacked(args: Sequence[Any]) -> tuple[Given, Tensor, Call, Needs]:
    """The same with the projection; its parts are the call's."""
    qkv, (need_qkv, *others) = args[_GIVEN], args[-2]
    call = Call(*unpacked(qkv), *args[_GIVEN + 1 : -2])
    return Given(*args[:_GIVEN]), qkv, call, Needs(need_qkv, need_qkv, need_qkv, *others)


def _fwd(*args: Any) -> Results:
    result: Results = backends.module(args[-1]).fwd(*_of_forward(args))
    return result


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    given, call, needs = _of_backward(args)
    _check_attended(given, call, needs)
    given = _read(given)
    return _wanted(backends.module(args[-1]).bwd(call, given, needs), needs)


def _bwd_qkvpacked(*args: Any) -> tuple[Tensor, ...]:
    given, qkv, call, needs = _of_backward_qkvpacked(args)
    _check_attended(given, call, needs)
    given = _read(given)
    dqkv = qkv.new_empty(qkv.shape if needs.q else 0)
    into = unpacked(dqkv) if needs.q else None
    grads = backends.module(args[-1]).bwd(call, given, needs, into)
    return dqkv, *_wanted(grads[_QKV:], needs[_QKV:])


def _read(given: Given) -> Given:
    dout = unit_stride(given.dout)
    return given if dout is given.dout else given._replace(dout=dout)


def _check_attended(given: Given, call: Call, needs: Needs) -> None:
    if call.memory is not None and given.out.shape != given.dout.shape and needs.softmax:
        raise NotImplementedError(
            "prefix_attention with a memory ran, or was exported, where no gradient but the memory's could be wanted; "
            "it did not keep what the others need"
        )


def _wanted(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    # what nobody wanted is a tensor of its own: outputs of an op may not alias
    return tuple([grad if need else grad.new_empty(0) for grad, need in zip(grads, needs, strict=True)])


def _fwd_fake(*args: Any) -> Results:
    call, wants = _of_forward(args)
    q, Dv = call.q, call.v.shape[3]
    lse = q.new_empty(q.shape[:3], dtype=lse_type(q))
    mass = q.new_empty(q.shape[:3] if wants.mass else 0, dtype=torch.float32)
    return Results(empty_like_order(q, Dv), lse, mass, empty_like_order(q, Dv) if wants.attended else q.new_empty(0))


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    _, call, needs = _of_backward(args)
    own = zip((call.q, call.k, call.v), needs[:_QKV], strict=True)
    grads = [empty_like_order(t) if need else t.new_empty(0) for t, need in own]
    return *grads, *_dense_fakes(call.differentiable[_QKV:], needs[_QKV:], call.q)


def _bwd_qkvpacked_fake(*args: Any) -> tuple[Tensor, ...]:
    _, qkv, call, needs = _of_backward_qkvpacked(args)
    return tuple(_dense_fakes((qkv, *call.differentiable[_QKV:]), needs[_QKV - 1 :], qkv))


def _dense_fakes(inputs: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Gradients in their inputs' shapes, contiguous whatever their inputs' order."""
    return [
        t.new_empty(t.shape) if need and t is not None else like.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    ]


_no_vmap = without_vmap(
    "prefix_attention has no rule for torch.func.vmap; fold the mapped axis into the batch, "
    "and mapped prefixes into a bank with prefix_ids"
)
_Once = once(
    "prefix_attention can be differentiated once; for second derivatives use "
    "scaled_dot_product_attention over concatenated keys and values",
    _no_vmap,
)

for _name, _impl, _fake in (
    ("fwd", _fwd, _fwd_fake),
    ("bwd", _bwd, _bwd_fake),
    ("bwd_qkvpacked", _bwd_qkvpacked, _bwd_qkvpacked_fake),
):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prefixattn::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"prefixattn::{_name}", _no_vmap, lib=_LIB)

_FWD, _BWD = torch.ops.prefixattn.fwd.default, torch.ops.prefixattn.bwd.default
_BWD_QKVPACKED = torch.ops.prefixattn.bwd_qkvpacked.default


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Flat:
        output: Flat = _FWD(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(_BWD, len(Needs._fields), ctx, dout, dlse)

    vmap = staticmethod(_no_vmap)


class _QkvPacked(torch.autograd.Function):
    """The same for a packed projection: its first input is qkv, in the place of q, k and v."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Flat:
        output = _fwd_qkvpacked(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(_BWD_QKVPACKED, len(Needs._fields) - _QKV + 1, ctx, dout, dlse)

    vmap = staticmethod(_no_vmap)


def _fwd_qkvpacked(qkv: Tensor, *others: Any) -> Flat:
    output: Flat = _FWD(*unpacked(qkv), *others)
    return output


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Flat) -> None:
    rest = len(Wants._fields) + 1
    tensors, numbers = inputs[: -len(NUMBERS) - rest], inputs[-len(NUMBERS) - rest : -rest]
    out, lse, mass, attended = output
    ctx.mark_non_differentiable(mass, attended)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out if tensors[_MEMORY] is None else attended, lse)
    ctx.numbers, ctx.backend = numbers, inputs[-1]


def _gradients(op: Any, count: int, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each input: the first `count` may have one, and `op` makes those."""
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:  # only lse was used: its gradient alone has to go through
        if out.dim() == 4:
            dout = torch.zeros_like(out)
        else:  # not kept, as only the memory's gradient is wanted
            memory = tensors[_MEMORY]
            dout = memory.new_zeros(*lse.shape, memory.shape[-1])
    # whoever asked for its strides here would make Dynamo copy it in every compiled backward pass; the op looks
    needs = ctx.needs_input_grad[:count]
    args = (dout, dlse, out, lse, *tensors, *ctx.numbers, needs, ctx.backend)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _Once.apply(op, *args)
    else:
        grads = op(*args)
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *grads, *(None,) * _OTHERS


class _Transformed(_PrefixAttention):
    """The form that torch.func asks for; binding its arguments costs 10 us, so that it is not the usual one."""

    @staticmethod
    def forward(*inputs: Any) -> Flat:
        output: Flat = _FWD(*inputs)
        return output

    setup_context = staticmethod(_keep_for_backward)


class _QkvPackedTransformed(_QkvPacked):
    @staticmethod
    def forward(*inputs: Any) -> Flat:
        return _fwd_qkvpacked(*inputs)

    setup_context = staticmethod(_keep_for_backward)


torch.library.register_autograd(
    "prefixattn::fwd", _PrefixAttention.backward, setup_context=_keep_for_backward, lib=_LIB
)


def prefix_attn(call: Call, wants: Wants, backend: str) -> Flat:
    """prefixattn::fwd with its gradient rule."""
    return _apply(_FWD, _PrefixAttention, _Transformed, (*call, *wants, backend))


def prefix_attn_qkvpacked(qkv: Tensor, call: Call, wants: Wants, backend: str) -> Flat:
    """The same for a call whose q, k and v are the parts of `qkv`, with a gradient rule that makes one tensor."""
    return _apply(_fwd_qkvpacked, _QkvPacked, _QkvPackedTransformed, (qkv, *call[_QKV:], *wants, backend))


def _apply(forward: Any, usual: Any, for_transforms: Any, args: tuple[Any, ...]) -> Flat:
    inside = transformed("prefix_attention")
    if not (inside or torch.compiler.is_compiling() or _records(args)):
        with torch._C._AutoDispatchBelowAutograd():  # the gradient rule costs 30 us a call, a third of a small one
            return forward(*args)
    result: Flat = (for_transforms if inside else usual).apply(*args)
    return result


def _records(args: tuple[Any, ...]) -> bool:
    """Whether autograd has anything to note, or, of forward mode, to refuse."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any([isinstance(t, Tensor) and t.requires_grad for t in args])
