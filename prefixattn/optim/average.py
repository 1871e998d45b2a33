"""Averages over processes: the gradient of a network's output instead of those of its parameters."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefixattn.optim.gradient import LazyGradient
from prefixattn.optim.source import Source


class Average:
    """Averages the gradients of the parameters given to `add`, in place, where that was not done yet.

    The gradient of a network's bank is what crosses the wire; those of its five parameters follow. A parameter with an
    ordinary gradient sends that.
    """

    def __init__(self, group: Any) -> None:
        if group not in (None, False) and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(f"process_group is {group!r}, expected a torch ProcessGroup, None or False")
        self.group = group
        self.parameters: list[Tensor] = []
        self.dirty: set[int] = set()  # indices of parameters with an ordinary gradient since the last average
        self.watched: set[int] = set()

    def add(self, parameters: Iterable[Tensor]) -> None:
        self.parameters += [p for p in parameters if not any(p is known for known in self.parameters)]
        self._watch()

    def _watch(self) -> None:
        """An ordinary gradient does not come from a network's bank; a hook says that there was one."""
        for i, p in enumerate(self.parameters):
            if p.requires_grad and i not in self.watched:  # torch refuses hooks on what wants no gradient
                p.register_post_accumulate_grad_hook(_Mark(weakref.ref(self), i))
                self.watched.add(i)
                self.dirty.add(i)

    def processes(self) -> int:
        if self.group is False or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def __call__(self) -> None:
        """RuntimeError on every process if one has a gradient that another lacks."""
        number = self.processes()
        wanted = [p for p in self.parameters if p.requires_grad]
        if number == 1 or not wanted:
            return
        self._watch()
        sources = self._sources()
        dense = [self._dense(p) for i, p in enumerate(self.parameters) if i in self.dirty]
        if not sources and not any(d is not None for d in dense) and all(p.grad is not None for p in wanted):
            return
        counts = [self._count(i, p) for i, p in enumerate(self.parameters)]
        if not self._agreed(counts):
            raise RuntimeError(
                f"the processes have gradients of different prefix parameters (here {counts}): each must run backward "
                "through the same prefixes before a step"
            )
        for source in sources:
            # set first: reading it must not come back here
            source.changed()
            source.averaged = True
            self._mean(source.wide(), number)
        for d in dense:
            if d is not None:
                self._mean(d, number)
        self.dirty.clear()

    def _mean(self, t: Tensor, number: int) -> None:
        # gloo knows no mean, and sums in float32 what is float32
        whole = t.contiguous()
        dist.all_reduce(whole, group=self.group)
        t.copy_(whole.div_(number))

    def _agreed(self, counts: list[int]) -> bool:
        both = torch.tensor([counts, [-c for c in counts]], device=self.parameters[0].device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        return bool((both[0] == -both[1]).all())

    def _sources(self) -> list[Source]:
        found: dict[int, Source] = {}
        for p in self.parameters:
            if isinstance(p.grad, LazyGradient):
                found |= {id(source): source for source, _ in p.grad.value.parts if not source.averaged}
        return list(found.values())

    def _dense(self, p: Tensor) -> Tensor | None:
        return p.grad.value.dense if isinstance(p.grad, LazyGradient) else p.grad

    def _count(self, i: int, p: Tensor) -> int:
        parts = p.grad.value.parts if isinstance(p.grad, LazyGradient) else []
        return sum(not source.averaged for source, _ in parts) + (i in self.dirty and self._dense(p) is not None)


class _Mark:
    """Notes that a parameter got an ordinary gradient."""

    def __init__(self, average: "weakref.ref[Average]", index: int) -> None:
        self.average, self.index = average, index

    def __call__(self, _: Tensor) -> None:
        average = self.average()
        if average is not None:
            average.dirty.add(self.index)
