"""What the gradients of a network, or of a simple share, are made of before anybody makes them.

`Source` and `ProjectedSource`: of one backward pass, or of the micro-batches of one state. `Value`: a sum of such.
"""

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from prefixattn.optim.dispatch import choose
from prefixattn.prefixes.ownership import Hidden
from prefixattn.reparam import reference
from prefixattn.reparam.call import Form

W2, B2 = -2, -1  # of a network's parameters in their order; those ahead of its large matrix count from 0
Parameters = tuple[Tensor | None, ...]  # in that order, with an axis G or, of one network, without
Scale = float | Tensor  # a tensor of one element where reading it would stop a GPU


class Source:
    """The gradient of kv that a network made, summed over micro-batches, and what it was made with.

    It stays in kv's layout, and of one micro-batch in kv's type, as it came: the step reads it so. Sums are
    of h's type; rows dy [G, P, O] are for those who cannot do without.
    Holds the parameters weakly: their `.grad` holds the source, a circle that Python's collector does not see.
    """

    def __init__(
        self,
        parameters: Parameters,
        made: Hidden,  # by the forward pass
        dkv: Tensor,  # [N, 2, Hkv, P, D], any float type, owned
        before_reading: Callable[[], None],  # called as long as `averaged` is False
        backend: str = "auto",  # of dh
    ) -> None:
        self.parameters = tuple(None if p is None else weakref.ref(p) for p in parameters)
        self.versions = tuple(None if p is None else p._version for p in parameters)
        self.made, self.form, self.backend = made, made.form, backend
        self.h = made.h  # [G, P, M]
        narrow = dkv.element_size() <= self.h.element_size()
        self.dkv = (dkv if narrow else dkv.to(self.h.dtype)).contiguous()
        self.before_reading = before_reading
        self.averaged = False  # over processes
        self._dh: Tensor | None = None
        self._small: tuple[Tensor, ...] | None = None
        self._row: Tensor | None = None

    def add(self, dkv: Tensor) -> None:
        """Another micro-batch's gradient."""
        self.wide().add_(dkv)
        self.changed()

    def wide(self) -> Tensor:
        """dkv, from now on in the type of h: what is added up or averaged."""
        self.dkv = self.dkv.to(self.h.dtype)
        return self.dkv

    def changed(self) -> None:
        """dkv is another: what was made of it is made again."""
        self.averaged, self._dh, self._small, self._row = False, None, None, None

    def ready(self) -> "Source":
        """Itself, averaged over processes if there are several."""
        if not self.averaged:
            self.before_reading()
        return self

    def copy(self) -> "Source":
        made = Source.__new__(Source)
        made.__dict__.update(self.__dict__)
        made.dkv = self.dkv.clone()
        return made

    def rows(self) -> Tensor:
        """dy [G, P, O], a copy."""
        return reference.rows_of(self.ready().dkv, self.form, len(self.h), self.h.dtype)

    def dkv_in(self, form: Form) -> Tensor:
        """The gradient as if kv had another form, in the type of h."""
        if self.form.layout == form.layout:
            return self.ready().dkv.to(self.h.dtype)
        return reference.kv_of(self.rows(), form, self.h.dtype)

    def parameter(self, index: int) -> Tensor:
        """The parameter as it was in the forward pass; RuntimeError if it was changed since."""
        ref = self.parameters[index]
        p = None if ref is None else ref()
        if p is None:
            raise RuntimeError(f"{_name(index)} of a prefix network is gone, and a gradient that needs it was not made")
        if p._version != self.versions[index]:
            raise RuntimeError(
                f"{_name(index)} {list(p.shape)} of a prefix network was changed between the backward pass and the "
                "first use of a gradient that needs its old value; call zero_grad() after changing parameters"
            )
        return p.detach()

    def ahead(self) -> tuple[Tensor, ...]:
        """Those ahead of the matrix."""
        return tuple([self.parameter(i) for i in range(len(self.parameters) + W2)])

    @property
    def row(self) -> Tensor:
        """The sum over P, [N, 2, Hkv, 1, D]: as if P were 1."""
        if self._row is None:
            self._row = self.ready().dkv.sum(3, keepdim=True, dtype=self.h.dtype)
        return self._row

    @property
    def dh(self) -> Tensor:
        """dy @ w2, [G, P, M]: one read of w2, unless a fused step took it along."""
        return self.make_dh() if self._dh is None else self._dh

    @dh.setter
    def dh(self, dh: Tensor) -> None:
        self._dh = dh

    def make_dh(self) -> Tensor:
        w, dkv = stacked(self.parameter(W2), W2), self.ready().dkv
        module = choose(self.backend, w, None, None, self.h, dkv, self.form)
        self._dh = dh = module.dh_only(w, dkv, self.form)
        return dh

    @property
    def knows_dh(self) -> bool:
        return self._dh is not None

    def small(self, index: int) -> Tensor:
        """The gradient of b2, with the axis G, or of a parameter ahead."""
        if index == B2:
            return reference.rows_of(self.row, self.form, len(self.h), self.h.dtype)[:, 0]
        if self._small is None:
            ahead = self.ahead()
            self._small = self.made.pull(self.dh, ahead)
        return self._small[index]

    def check(self, dh_comes: bool) -> None:
        """RuntimeError if a parameter is no longer what a small gradient is made of; makes dh if no step will."""
        if self._small is not None:
            return
        self.ahead()
        if self._dh is None:
            if dh_comes:
                self.parameter(W2)
            else:
                self.make_dh()

    def finite(self) -> Tensor:
        """A bool of no dimensions."""
        # what is wrong in kv is also in the row, which is b2's gradient
        self.ready()
        return is_finite(self.h) & is_finite(self.row)


class Pull(Protocol):
    """prefixattn.prefixes.networks.Projected."""

    kv: Tensor

    def pull(self, dkv: Tensor) -> Tensor: ...


class ProjectedSource(Source):
    """Micro-batches are summed in kv, and carried through the frozen projections together."""

    def __init__(self, made: Pull, dkv: Tensor, before_reading: Callable[[], None]) -> None:
        self.projected, self.h = made, made.kv
        self.pending: Tensor | None = dkv  # [N, 2, Hkv, P, D], not carried yet
        self.carried: Tensor | None = None  # [N, P, E]
        self.before_reading = before_reading
        self.averaged = False

    def add(self, dkv: Tensor) -> None:
        if self.pending is None:
            self.pending = dkv
        else:
            self.pending = self.pending.to(torch.promote_types(dkv.dtype, torch.float32)).add_(dkv)
        self.averaged = False

    def changed(self) -> None:
        self.averaged = False

    def wide(self) -> Tensor:
        """The vectors' gradient, not averaged over processes: what they exchange."""
        if self.pending is not None:
            grad, self.pending = self.projected.pull(self.pending), None
            self.carried = grad if self.carried is None else self.carried.add_(grad)
        assert self.carried is not None
        return self.carried

    def copy(self) -> "ProjectedSource":
        made = ProjectedSource(self.projected, self.wide(), self.before_reading)
        made.pending, made.carried, made.averaged = None, self.wide().clone(), self.averaged
        return made

    def small(self, index: int) -> Tensor:
        self.ready()
        return self.wide()

    def check(self, dh_comes: bool) -> None:
        self.wide()

    def finite(self) -> Tensor:
        return is_finite(self.small(0))


class Value:
    """The sum of scale * source over `parts`, and of `dense`. A gradient and its detach() share one."""

    def __init__(self, parts: list[tuple[Source, Scale]], dense: Tensor | None = None) -> None:
        self.parts, self.dense = parts, dense

    def copy(self) -> "Value":
        copies = [(source.copy(), scale) for source, scale in self.parts]
        return Value(copies, None if self.dense is None else self.dense.clone())

    def scale(self, factor: Scale) -> None:
        if isinstance(factor, Tensor):
            factor = float(factor) if factor.device.type == "cpu" else factor.detach().reshape(())
        self.parts = [(source, scale * factor) for source, scale in self.parts]
        if self.dense is not None:
            self.dense.mul_(factor)


def is_finite(t: Tensor) -> Tensor:
    """A bool of no dimensions; of a sharded tensor, of this process's part."""
    if t.device.type == "cpu" and not hasattr(t, "full_tensor"):
        # many times faster than a norm, and finite only if all of t is; finite numbers may overflow it
        finite = t.sum().isfinite()
        if finite:
            return finite
    return local(torch.linalg.vector_norm(t, float("inf"))).isfinite()


def local(t: Tensor) -> Tensor:
    """A sharded number, as an FSDP2 parameter's norm is, summed over its processes; any other as it is."""
    whole = getattr(t, "full_tensor", None)
    made: Tensor = t if whole is None else whole()
    return made


def _name(index: int) -> str:
    return {W2: "w2", B2: "b2"}.get(index, f"parameter {index}")


def stacked(p: Tensor, index: int) -> Tensor:
    """w2 or b2 with the axis G."""
    return p if p.dim() == (2 if index == B2 else 3) else p.unsqueeze(0)
