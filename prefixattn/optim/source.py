"""`Source`: what the five gradients of a network are made of, before anybody makes them. `Value`: a sum of such."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from prefixattn.reparam.reference import Form, hidden, hidden_bwd
from prefixattn.reparam.sweep import dh_only

X, W1, B1, W2, B2 = range(5)
NAMES = ("x", "w1", "b1", "w2", "b2")
Parameters = tuple[Tensor | None, ...]  # in that order, with an axis G or, of one network, without
Scale = float | Tensor  # a tensor of one element where reading it would stop a GPU


class Source:
    """dy [G, P, O], the gradient of a network's output summed over micro-batches, and what it was made with.

    Holds the parameters weakly: their `.grad` holds the source, a circle that Python's collector does not see.
    """

    def __init__(
        self,
        parameters: Parameters,
        z: Tensor,  # [G, P, M], of the forward pass
        dy: Tensor,  # [G, P, O], owned
        form: Form,
        before_reading: Callable[[], None],  # called as long as `averaged` is False
    ) -> None:
        self.parameters = tuple(None if p is None else weakref.ref(p) for p in parameters)
        self.versions = tuple(None if p is None else p._version for p in parameters)
        self.z, self.dy, self.form = z, dy, form
        self.h = hidden(z, form)  # [G, P, M]
        self.before_reading = before_reading
        self.averaged = False  # over processes
        self._dh: Tensor | None = None
        self._small: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, dy: Tensor) -> None:
        """Another micro-batch's dy."""
        self.dy += dy
        self.changed()

    def changed(self) -> None:
        """dy is another: what was made of it is made again."""
        self.averaged, self._dh, self._small = False, None, None

    def ready(self) -> "Source":
        """Itself, averaged over processes if there are several."""
        if not self.averaged:
            self.before_reading()
        return self

    def copy(self) -> "Source":
        made = Source.__new__(Source)
        made.__dict__.update(self.__dict__)
        made.dy = self.dy.clone()
        return made

    def parameter(self, index: int) -> Tensor:
        """The parameter as it was in the forward pass, with the axis G; RuntimeError if it was changed since."""
        ref = self.parameters[index]
        p = None if ref is None else ref()
        if p is None:
            raise RuntimeError(f"{NAMES[index]} of a prefix network is gone, and a gradient that needs it was not made")
        if p._version != self.versions[index]:
            raise RuntimeError(
                f"{NAMES[index]} {list(p.shape)} of a prefix network was changed between the backward pass and the "
                "first use of a gradient that needs its old value; call zero_grad() after changing parameters"
            )
        return stacked(p.detach(), index)

    @property
    def dh(self) -> Tensor:
        """dy @ w2, [G, P, M]: one read of w2, unless a sweep took it along."""
        return self.make_dh() if self._dh is None else self._dh

    @dh.setter
    def dh(self, dh: Tensor) -> None:
        self._dh = dh

    def make_dh(self) -> Tensor:
        self._dh = dh_only(self.parameter(W2), self.ready().dy)
        return self._dh

    @property
    def knows_dh(self) -> bool:
        return self._dh is not None

    def small(self, index: int) -> Tensor:
        """The gradient of x, w1, b1 or b2, with the axis G."""
        if index == B2:
            return self.ready().dy.sum(1)
        if self._small is None:
            x, w1 = self.parameter(X), self.parameter(W1)
            self._small = hidden_bwd(self.dh, x, w1, self.z, self.form, (True, True, True))
        return self._small[index]

    def finite(self) -> Tensor:
        """A bool of no dimensions."""
        largest = [torch.linalg.vector_norm(t, float("inf")) for t in (self.ready().dy, self.h)]
        return torch.stack(largest).isfinite().all()


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


def stacked(p: Tensor, index: int) -> Tensor:
    """The parameter with the axis G."""
    return p if p.dim() == (2 if index in (B1, B2) else 3) else p.unsqueeze(0)
