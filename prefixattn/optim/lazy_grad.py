"""Gradients that are not made until somebody needs their numbers: what `.grad` of a network's parameters is.

Both classes are torch.Tensors of their parameter's shape and type. They know norms, scaling, the check of
torch.amp.GradScaler, addition and zeroing; any other operation makes the numbers, and is right.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixattn.optim.network_grad import W2, Parameters, ProjectedSource, Pull, Scale, Source, Value
from prefixattn.prefixes.ownership import Hidden
from prefixattn.reparam.call import Form

CHUNK = 4096  # outputs whose products are summed in float64 at a time
_warned = False


class LazyGradient(Tensor):
    """What FactoredGradient and DeferredGradient share: all but how the numbers are made."""

    value: Value
    which: int  # of the network's parameters: W2, B2, or from 0
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, value: Value, which: int) -> "LazyGradient":
        made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made.value, made.which = value, which
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The numbers, as a new ordinary tensor."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            dense = None if self.value.dense is None else self.value.dense.clone()
            for source, scale in self.value.parts:
                part = (self._of(source) * scale).to(self.dtype).reshape(self.shape)
                dense = part if dense is None else dense.add_(part)
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device) if dense is None else dense

    def to_read(self) -> Tensor:
        """The numbers, not to be written to: no copy where they are there."""
        parts, dense = self.value.parts, self.value.dense
        if dense is not None and not parts:
            return dense
        if dense is None and len(parts) == 1 and _is_one(parts[0][1]):
            with torch.autocast(self.device.type, enabled=False):
                return self._of(parts[0][0]).to(self.dtype).reshape(self.shape)
        return self.to_dense()

    def kept(self) -> Tensor:
        """The numbers, made once and for all: writing to them changes the gradient."""
        if self.value.dense is None or self.value.parts:
            self.value.dense, self.value.parts = self.to_dense(), []
        return self.value.dense

    def norm_exact(self) -> Tensor:
        """The Euclidean norm, in the gradient's type."""
        return torch.linalg.vector_norm(self.to_dense())

    def _of(self, source: Source) -> Tensor:
        raise NotImplementedError

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        ranks = [source.h.shape[1] for source, _ in self.value.parts]
        return f"{type(self).__name__}(shape={list(self.shape)}, ranks={ranks}, dense={self.value.dense is not None})"

    def __deepcopy__(self, memo: Any) -> "LazyGradient":
        return type(self)(self, self.value.copy(), self.which)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_dense().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        done = NotImplemented if rule is None else rule(*args, **kwargs)
        return _on_numbers(func, args, kwargs) if done is NotImplemented else done


class FactoredGradient(LazyGradient):
    """The gradient of w2: scale * dy.mT @ h, of rank P, as its factors."""

    def _of(self, source: Source) -> Tensor:
        return source.rows().mT @ source.h

    def factors(self) -> tuple[Tensor, Tensor, Form]:
        """h [G, P, M] and the gradient of a kv of this form: rows of all sources one after another, with scales."""
        parts = self.value.parts
        form = parts[0][0].form
        if len(parts) == 1 and _is_one(parts[0][1]):
            source = parts[0][0].ready()
            return source.h, source.dkv, form
        dkvs = [source.dkv_in(form) * scale for source, scale in parts]
        return torch.cat([source.h for source, _ in parts], 1), torch.cat(dkvs, 3), form

    def norm_exact(self) -> Tensor:
        """The Euclidean norm from Gram matrices: |dy.mT @ h|^2 = <h @ h.mT, dy @ dy.mT>, in float64."""
        if self.value.dense is not None or not self.value.parts:
            return super().norm_exact()
        with torch.autocast(self.device.type, enabled=False):
            scale: Scale
            if len(self.value.parts) == 1:
                source, scale = self.value.parts[0]
                h, dkv = source.h, source.ready().dkv
            else:
                scale, (h, dkv, _) = 1.0, self.factors()
            square = torch.zeros((), dtype=torch.float64, device=h.device)
            P, D = dkv.shape[3:]
            for rows, heads in zip(h, dkv.view(len(h), -1, P, D), strict=True):  # a network each
                products = square.new_zeros(P, P)  # dy @ dy.mT
                for part in heads.split(max(1, CHUNK // D)):
                    wide = square.new_empty(P, len(part), D).copy_(part.transpose(0, 1)).flatten(1)
                    products.addmm_(wide, wide.mT)
                wide = rows.double()
                square += (products * (wide @ wide.mT)).sum()
            return square.clamp(min=0).sqrt().mul(scale).abs().to(self.dtype)  # a sum near zero may round below it


class DeferredGradient(LazyGradient):
    """The gradient of what is ahead of w2, which needs dy @ w2 and gets that from the fused step; or of b2."""

    def _of(self, source: Source) -> Tensor:
        return source.small(self.which)


def _is_one(scale: Scale) -> bool:
    return isinstance(scale, float) and scale == 1  # a tensor is not asked: that would stop a GPU


def lazy(like: Tensor, value: Value, which: int) -> LazyGradient:
    return (FactoredGradient if which == W2 else DeferredGradient)(like, value, which)


def _on_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the numbers, which are kept where it writes to them or returns a view of them."""
    global _warned
    keep = any(a.alias_info is not None for a in (*func._schema.arguments, *func._schema.returns))
    found: dict[int, LazyGradient] = {}

    def numbers(t: Any) -> Any:
        if not isinstance(t, LazyGradient):
            return t
        dense = t.kept() if keep else t.to_dense()
        found[id(dense)] = t
        return dense

    args, kwargs = torch.utils._pytree.tree_map(numbers, (args, kwargs))
    if not _warned and any(isinstance(t, FactoredGradient) for t in found.values()):
        _warned = True
        warnings.warn(
            f"{func} makes the whole gradient of a prefix network's large matrix; norms, scaling and addition do not",
            stacklevel=2,
        )
    out = func(*args, **kwargs)
    return found.get(id(out), out)  # what worked in place returns the gradient, not its numbers


def _is_number(t: Any) -> bool:
    return not isinstance(t, Tensor) or (t.dim() == 0 and not isinstance(t, LazyGradient))


def _detach(g: LazyGradient) -> Any:
    return lazy(g, g.value, g.which)


def _clone(g: LazyGradient, memory_format: Any = None) -> Any:
    return lazy(g, g.value.copy(), g.which)


def _mul_(g: Any, factor: Any) -> Any:
    if not isinstance(g, LazyGradient) or not _is_number(factor):
        return NotImplemented
    g.value.scale(factor)
    return g


def _mul(g: Any, factor: Any) -> Any:
    return _mul_(_clone(g), factor) if isinstance(g, LazyGradient) and _is_number(factor) else NotImplemented


def _inverse(factor: Scale) -> Scale:
    on_host = isinstance(factor, Tensor) and factor.device.type == "cpu"
    return 1 / (float(factor) if on_host else factor)


def _div_(g: Any, factor: Any) -> Any:
    return _mul_(g, _inverse(factor)) if _is_number(factor) else NotImplemented


def _div(g: Any, factor: Any) -> Any:
    return _mul(g, _inverse(factor)) if _is_number(factor) else NotImplemented


def _add_(g: Any, other: Any, alpha: float = 1) -> Any:
    if not isinstance(g, LazyGradient) or not isinstance(other, Tensor) or other.shape != g.shape:
        return NotImplemented
    if isinstance(other, LazyGradient):
        if other.which != g.which or other.value is g.value:
            return NotImplemented
        added = other.value.copy()
        added.scale(float(alpha))
        g.value.parts, dense = g.value.parts + added.parts, added.dense
    else:
        dense = other.to(g.dtype) * alpha
    if dense is not None:
        g.value.dense = dense if g.value.dense is None else g.value.dense.add_(dense)
    return g


def _add(g: Any, other: Any, alpha: float = 1) -> Any:
    if isinstance(g, LazyGradient):
        return _add_(_clone(g), other, alpha)
    return _add_(_clone(other), g) if alpha == 1 else NotImplemented


def _zero_(g: LazyGradient) -> Any:
    g.value.parts, g.value.dense = [], None
    return g


def _norm(g: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if ord != 2 or dim is not None or keepdim:
        return NotImplemented
    return g.norm_exact() if dtype is None else g.norm_exact().to(dtype)


def _each(one: Callable[..., Any], plain: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
    """A foreach operation: `one` on gradients of these classes, `plain` on others and where `one` cannot."""

    def rule(grads: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        out = []
        for i, g in enumerate(grads):
            own = [a[i] if isinstance(a, (list, tuple)) else a for a in args]
            done = one(g, *own, **kwargs) if isinstance(g, LazyGradient) else NotImplemented
            if done is NotImplemented:
                if isinstance(g, LazyGradient):
                    g = g.kept() if in_place else g.to_dense()
                done = plain(g, *own, **kwargs)
            out.append(done)
        return None if in_place else out

    return rule


def _unscale(grads: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    plain = []
    for g in grads:
        if not isinstance(g, LazyGradient):
            plain.append(g)
            continue
        for source, _ in g.value.parts:
            found_inf.masked_fill_(~source.finite(), 1.0)
        dense, g.value.dense = g.value.dense, None
        g.value.scale(inv_scale)
        if dense is not None:
            plain.append(dense)
            g.value.dense = dense
    torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inv_scale)


aten = torch.ops.aten
RULES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.clone.default: _clone,
    aten.mul_.Tensor: _mul_,
    aten.mul_.Scalar: _mul_,
    aten.div_.Tensor: _div_,
    aten.div_.Scalar: _div_,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.add_.Tensor: _add_,
    aten.add.Tensor: _add,
    aten.zero_.default: _zero_,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_norm.Scalar: _each(_norm, torch.linalg.vector_norm, in_place=False),
    aten._foreach_mul_.Scalar: _each(_mul_, Tensor.mul_, in_place=True),
    aten._foreach_mul_.ScalarList: _each(_mul_, Tensor.mul_, in_place=True),
    aten._foreach_mul_.Tensor: _each(_mul_, Tensor.mul_, in_place=True),
    aten._foreach_div_.Scalar: _each(_div_, Tensor.div_, in_place=True),
    aten._foreach_div_.Tensor: _each(_div_, Tensor.div_, in_place=True),
    aten._foreach_zero_.default: _each(_zero_, Tensor.zero_, in_place=True),
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}


@torch.no_grad()
def accumulate(
    parameters: Parameters,
    made: Hidden,  # by the forward pass
    dkv: Tensor,  # [N, 2, Hkv, P, D], any float type; is kept and added to
    before_reading: Callable[[], None],
    backend: str = "auto",
) -> None:
    """Adds the gradient of one backward pass to `.grad` of the parameters that want one.

    Micro-batches of one forward pass, which have one `made`, are summed in one.
    """
    last = len(parameters) + W2
    numbered = [(index if index < last else index - len(parameters), p) for index, p in enumerate(parameters)]
    wanting = [(index, p) for index, p in numbered if p is not None and p.requires_grad]
    source = _shared([p for _, p in wanting], made)
    if source is not None:
        source.add(dkv)
        return
    source = Source(parameters, made, dkv, before_reading, backend)
    for index, p in wanting:
        if isinstance(p.grad, LazyGradient):
            p.grad.value.parts.append((source, 1.0))
        else:
            p.grad = lazy(p, Value([(source, 1.0)], p.grad), index)


def _shared(wanting: list[Tensor], made: Hidden) -> Source | None:
    """The source of `made` that is the last part of every gradient, and that none of them has scaled."""
    last = []
    for p in wanting:
        parts = p.grad.value.parts if isinstance(p.grad, LazyGradient) else []
        if not parts or not isinstance(parts[-1][1], float) or parts[-1][1] != 1:
            return None
        last.append(parts[-1][0])
    return last[0] if last and all(s is last[0] for s in last) and last[0].made is made else None


@torch.no_grad()
def accumulate_projected(p: Tensor, made: Pull, dkv: Tensor, before_reading: Callable[[], None]) -> None:
    """Adds the gradient of one backward pass to `.grad` of the vectors p, micro-batches of one state in one source."""
    parts = p.grad.value.parts if isinstance(p.grad, LazyGradient) else []
    if parts:
        source, scale = parts[-1]
        if isinstance(source, ProjectedSource) and source.projected is made and isinstance(scale, float) and scale == 1:
            source.add(dkv)
            return
    source = ProjectedSource(made, dkv, before_reading)
    if isinstance(p.grad, LazyGradient):
        p.grad.value.parts.append((source, 1.0))
    else:
        p.grad = lazy(p, Value([(source, 1.0)], p.grad), 0)
