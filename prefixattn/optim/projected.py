"""`ProjectedSource`: the gradient of a simple share's bank, until somebody needs that of its vectors."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from prefixattn.optim.gradient import LazyGradient, lazy
from prefixattn.optim.source import Source, Value, X, is_finite


class Pull(Protocol):
    """prefixattn.prefixes.networks.Projected."""

    bank: Tensor

    def pull(self, dbank: Tensor) -> Tensor: ...


class ProjectedSource(Source):
    """Micro-batches are summed in the bank, and carried through the frozen projections together."""

    def __init__(self, made: Pull, dbank: Tensor, before_reading: Callable[[], None]) -> None:
        self.made, self.z = made, made.bank
        self.pending: Tensor | None = dbank  # [N, 2, Hkv, P, D], not carried yet
        self.carried: Tensor | None = None  # [N, P, E]
        self.before_reading = before_reading
        self.averaged = False

    def add(self, dbank: Tensor) -> None:
        if self.pending is None:
            self.pending = dbank
        else:
            self.pending = self.pending.to(torch.promote_types(dbank.dtype, torch.float32)).add_(dbank)
        self.averaged = False

    def changed(self) -> None:
        self.averaged = False

    def wide(self) -> Tensor:
        """The vectors' gradient, not averaged over processes: what they exchange."""
        if self.pending is not None:
            grad, self.pending = self.made.pull(self.pending), None
            self.carried = grad if self.carried is None else self.carried.add_(grad)
        assert self.carried is not None
        return self.carried

    def copy(self) -> "ProjectedSource":
        made = ProjectedSource(self.made, self.wide(), self.before_reading)
        made.pending, made.carried, made.averaged = None, self.wide().clone(), self.averaged
        return made

    def small(self, index: int) -> Tensor:
        self.ready()
        return self.wide()

    def check(self, dh_comes: bool) -> None:
        self.wide()

    def finite(self) -> Tensor:
        return is_finite(self.small(X))


@torch.no_grad()
def deliver_projected(p: Tensor, made: Pull, dbank: Tensor, before_reading: Callable[[], None]) -> None:
    """Adds the gradient of one backward pass to `.grad` of the vectors p, micro-batches of one state in one source."""
    parts = p.grad.value.parts if isinstance(p.grad, LazyGradient) else []
    if parts:
        source, scale = parts[-1]
        if isinstance(source, ProjectedSource) and source.made is made and isinstance(scale, float) and scale == 1:
            source.add(dbank)
            return
    source = ProjectedSource(made, dbank, before_reading)
    if isinstance(p.grad, LazyGradient):
        p.grad.value.parts.append((source, 1.0))
    else:
        p.grad = lazy(p, Value([(source, 1.0)], p.grad), X)
