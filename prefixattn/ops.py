"""prefixattn::fwd and prefixattn::bwd: one schema, one fake and one gradient rule for every backend.

prefixattn::bwd_qkvpacked is bwd for a packed projection: dq, dk and dv are written into one tensor. Its forward is fwd
on three views.

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
from prefixattn.layout import empty_like_order, lse_type, unit_stride, unpacked
from prefixattn.reference import Results

_SHARED = (
    "Tensor prefix_k, Tensor prefix_v, Tensor? attn_mask, Tensor? memory, Tensor? rows, Tensor? lengths, Tensor? seed"
)
_TENSORS = f"Tensor q, Tensor k, Tensor v, {_SHARED}"
_NUMBERS = "float dropout_p, float prefix_dropout_p, bool is_causal, float scale, str phi, float softcap"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_LIB = torch.library.Library("prefixattn", "DEF")
_LIB.define(
    f"fwd({_TENSORS}, {_NUMBERS}, bool want_mass, bool want_attended, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    f"bwd(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, {_NUMBERS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    f"bwd_qkvpacked(Tensor dout, Tensor? dlse, Tensor qkv, {_SHARED}, Tensor out, Tensor lse, {_NUMBERS}, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _fwd(*args: Any) -> Results:
    *inputs, backend = args
    result: Results = backends.module(backend).fwd(*inputs)
    return result


def _bwd(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, needs, backend = args
    _check_attended(dout, inputs[7], inputs[11], needs)
    return _wanted(backends.module(backend).bwd(unit_stride(dout), *inputs, needs), needs)


def _bwd_qkvpacked(dout: Tensor, dlse: Tensor | None, qkv: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, needs, backend = args
    need_qkv, *need_others = needs
    _check_attended(dout, inputs[3], inputs[7], needs)
    dqkv = qkv.new_empty(qkv.shape if need_qkv else 0)
    grads = backends.module(backend).bwd(
        unit_stride(dout),
        dlse,
        *unpacked(qkv),
        *inputs,
        (need_qkv, need_qkv, need_qkv, *need_others),
        into=unpacked(dqkv) if need_qkv else None,
    )
    return dqkv, *_wanted(grads[3:], need_others)


def _check_attended(dout: Tensor, memory: Tensor | None, attended: Tensor, needs: list[bool]) -> None:
    if memory is not None and attended.shape != dout.shape and any(needs[:-1]):
        raise NotImplementedError(
            "prefix_attention with a memory ran, or was exported, where no gradient but the memory's could be wanted; "
            "it did not keep what the others need"
        )


def _wanted(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    # what nobody wanted is a tensor of its own: outputs of an op may not alias
    return tuple([grad if need else grad.new_empty(0) for grad, need in zip(grads, needs, strict=True)])


def _fwd_fake(q: Tensor, *args: Any) -> Results:
    want_mass, want_attended = args[-3:-1]
    lse = q.new_empty(q.shape[:3], dtype=lse_type(q))
    mass = q.new_empty(q.shape[:3] if want_mass else 0, dtype=torch.float32)
    return empty_like_order(q), lse, mass, empty_like_order(q) if want_attended else q.new_empty(0)


def _bwd_fake(dout: Tensor, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    q, k, v, *others = args[:7]
    needs = args[-2]
    grads = [empty_like_order(t) if need else q.new_empty(0) for t, need in zip((q, k, v), needs[:3], strict=True)]
    return *grads, *_dense_fakes(others, needs[3:], q)


def _bwd_qkvpacked_fake(dout: Tensor, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_dense_fakes(args[:5], args[-2], args[0]))


def _dense_fakes(inputs: Sequence[Tensor | None], needs: list[bool], like: Tensor) -> list[Tensor]:
    """Gradients in their inputs' shapes, contiguous whatever their inputs' order."""
    return [
        t.new_empty(t.shape) if need and t is not None else like.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    ]


def _no_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        "prefix_attention has no rule for torch.func.vmap; fold the mapped axis into the batch, "
        "and mapped prefixes into a bank with prefix_ids"
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
    def forward(ctx: Any, *inputs: Any) -> Results:
        output: Results = _FWD(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(_BWD, 7, ctx, dout, dlse)

    vmap = staticmethod(_no_vmap)


class _QkvPacked(torch.autograd.Function):
    """The same for a packed projection: its first input is qkv, in the place of q, k and v."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Results:
        output = _fwd_qkvpacked(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(_BWD_QKVPACKED, 5, ctx, dout, dlse)

    vmap = staticmethod(_no_vmap)


def _fwd_qkvpacked(qkv: Tensor, *others: Any) -> Results:
    output: Results = _FWD(*unpacked(qkv), *others)
    return output


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, dropout_p, prefix_dropout_p, is_causal, scale, phi, softcap, _want_mass, _want_attended, backend = inputs
    out, lse, mass, attended = output
    memory = tensors[-4]
    ctx.mark_non_differentiable(mass, attended)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out if memory is None else attended, lse)
    ctx.numbers, ctx.backend = (dropout_p, prefix_dropout_p, is_causal, scale, phi, softcap), backend


def _gradients(op: Any, count: int, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each input: the first `count` may have one, and `op` makes those."""
    saved = ctx.saved_tensors
    if dout is None:  # only lse was used: its gradient alone has to go through
        dout = torch.zeros_like(saved[-2]) if saved[-2].dim() == 4 else _no_dout(*saved[-6:])
    # whoever asked for its strides here would make Dynamo copy it in every compiled backward pass; the op looks
    needs = ctx.needs_input_grad[:count]
    args = (dout, dlse, *saved, *ctx.numbers, needs, ctx.backend)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _Once.apply(op, *args)
    else:
        grads = op(*args)
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *grads, *(None,) * 12


def _no_dout(memory: Tensor, _rows: Any, _lengths: Any, _seed: Any, _out: Tensor, lse: Tensor) -> Tensor:
    """Zeros for dout, where only the memory's gradient is wanted and out was not kept."""
    return memory.new_zeros(*lse.shape, memory.shape[-1])


class _Transformed(_PrefixAttention):
    """The form that torch.func asks for; binding its arguments costs 10 us, so that it is not the usual one."""

    @staticmethod
    def forward(*inputs: Any) -> Results:
        output: Results = _FWD(*inputs)
        return output

    setup_context = staticmethod(_keep_for_backward)


class _QkvPackedTransformed(_QkvPacked):
    @staticmethod
    def forward(*inputs: Any) -> Results:
        return _fwd_qkvpacked(*inputs)

    setup_context = staticmethod(_keep_for_backward)


class _Once(torch.autograd.Function):
    """The backward pass when a graph of it is recorded: its values are right, and differentiating them is refused."""

    @staticmethod
    def forward(op: Any, *args: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = op(*args)
        return grads

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


def prefix_attn(*args: Any) -> Results:
    """prefixattn::fwd with its gradient rule."""
    return _apply(_FWD, _PrefixAttention, _Transformed, args)


def prefix_attn_qkvpacked(*args: Any) -> Results:
    """prefixattn::fwd on the three parts of its first argument, qkv, with a gradient rule that makes one tensor."""
    return _apply(_fwd_qkvpacked, _QkvPacked, _QkvPackedTransformed, args)


def _apply(forward: Any, usual: Any, for_transforms: Any, args: tuple[Any, ...]) -> Results:
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and torch.compiler.is_compiling():  # Dynamo would take the gradient of this call for zero
        raise NotImplementedError(
            "prefix_attention inside torch.func's transforms does not compile; compile a function that calls "
            "torch.autograd.grad or backward, or leave the transform uncompiled"
        )
    if not (transformed or torch.compiler.is_compiling() or _records(args)):
        with torch._C._AutoDispatchBelowAutograd():  # the gradient rule costs 30 us a call, a third of a small one
            return forward(*args)
    result: Results = (for_transforms if transformed else usual).apply(*args)
    return result


def _records(args: tuple[Any, ...]) -> bool:
    """Whether autograd has anything to note, or, of forward mode, to refuse."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any([isinstance(t, Tensor) and t.requires_grad for t in args])
