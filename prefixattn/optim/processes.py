"""Averages over processes: whoever reads a gradient of a prefix finds that of the joint batch."""

import warnings
import weakref
import zlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefixattn.optim.lazy_grad import LazyGradient
from prefixattn.optim.network_grad import Source


class Average:
    """Averages the gradients of the parameters given to `add` or `watch`, in place, where that was not done yet.

    Ordinary gradients are averaged at the end of the backward pass that made them: those who clip and step see nothing
    else, and a mean that is averaged again, after another micro-batch or by DistributedDataParallel, stays a mean. Of a
    network that an optimizer owns, the gradient of its kv crosses the wire, when the first number of it is
    read or at the step, once for all micro-batches; those of its five parameters follow.
    """

    def __init__(self, group: Any = None) -> None:
        self._group: Any = None
        self.group = group
        self.parameters: list[Tensor] = []
        self.watched: dict[int, weakref.ref[Tensor]] = {}  # those with a hook, by id
        self.dirty: set[int] = set()  # ids of parameters with an ordinary gradient since the last average
        self.task = -1  # the backward pass at whose end there will be an average
        # so that no process takes another's next backward pass for this one
        self.steps = self.backwards = 0
        self.started = False  # the processes' parameters were compared

    @property
    def group(self) -> Any:
        """Of the processes that train together; None: all, if torch.distributed is initialized; False: this alone."""
        return self._group

    @group.setter
    def group(self, group: Any) -> None:
        if group not in (None, False) and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(f"process_group is {group!r}, expected a torch ProcessGroup, None or False")
        self._group, self.started = group, False

    def add(self, parameters: Iterable[Tensor]) -> None:
        """These too."""
        self.watch([*self.parameters, *(p for p in parameters if not any(p is known for known in self.parameters))])

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """These and no others from now on, without those that are sharded, which whoever sharded them reduces."""
        self.parameters = [p for p in parameters if not hasattr(p, "full_tensor")]
        for p in self.parameters:
            known = self.watched.get(id(p))
            if p.requires_grad and (known is None or known() is not p):  # torch refuses hooks on others
                p.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self)))
                self.watched[id(p)] = weakref.ref(p)
                if p.grad is not None:
                    self.dirty.add(id(p))

    def processes(self) -> int:
        if self.group is False or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def stepped(self) -> None:
        """An optimizer makes a step with the gradients."""
        self.steps, self.backwards = self.steps + 1, 0

    def __call__(self) -> None:
        """RuntimeError on every process if one has a gradient that another lacks, or had other parameters."""
        number = self.processes()
        wanted = [p for p in self.parameters if p.requires_grad]
        if number == 1 or not wanted:
            return
        self.watch(self.parameters)
        sources = self._sources()
        dirty = [p for p in wanted if id(p) in self.dirty and self._dense(p) is not None]
        if not sources and not dirty and all(p.grad is not None for p in wanted):
            return
        self.agree()
        for source in sources:
            # set first: reading it must not come back here
            source.changed()
            source.averaged = True
            self._mean(source.wide(), number)
        for p in dirty:
            self._mean(self._dense(p), number)
        self.dirty.clear()

    def _mean(self, t: Any, number: int) -> None:
        # gloo knows no mean, and sums in float32 what is float32
        whole = t.coalesce() if t.is_sparse else t.contiguous()
        dist.all_reduce(whole, group=self.group)
        t.copy_(whole.div_(number))

    def start(self) -> None:
        """Before the first forward pass of a training: all processes take the numbers of their first."""
        if self.started or self.processes() == 1 or not any(p.requires_grad for p in self.parameters):
            return
        if not self._same_numbers("begins a forward pass"):
            warnings.warn(
                "the prefixes of the processes differ before the first step, and all become that of the first process; "
                "a process that shall train its own alone needs prefix.process_group = False",
                stacklevel=2,
            )
            first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            for p in self.parameters:
                whole = p.detach().contiguous()
                dist.broadcast(whole, first, group=self.group)
                with torch.no_grad():
                    p.copy_(whole)
        self.started = True

    def agree(self) -> None:
        """RuntimeError on every process if they do not come here with the same."""
        if not self._same_numbers("asks for gradients"):
            raise RuntimeError(
                "the prefixes of the processes differ before the first step: each must start with the same numbers; "
                "seed all alike before attach, or load one file"
            )
        self.started = True

    def _same_numbers(self, place: str) -> bool:
        """False if the parameters differ at the start; RuntimeError on every process if anything else does."""
        shapes = [list(p.shape) for p in self.parameters]
        counts = [self._count(p) for p in self.parameters]
        numbers = None if self.started else [_bits(p) for p in self.parameters]
        mine = (place, shapes, counts, self.steps, self.backwards, numbers)
        # of one size on all, whatever they have
        short = zlib.crc32(repr(mine).encode())
        both = torch.tensor([short, -short], device=self.parameters[0].device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        if both[0] == -both[1]:
            return True
        found: list[Any] = [None] * self.processes()
        dist.all_gather_object(found, mine, group=self.group)
        places, all_shapes, all_counts, steps, backwards, _ = map(list, zip(*found, strict=True))
        if any(s != shapes for s in all_shapes):
            raise RuntimeError(
                f"the processes have prefixes of different sizes: {all_shapes}, process by process; each must attach "
                "the same"
            )
        if any(f[:5] != mine[:5] for f in found):
            raise RuntimeError(
                "the processes have gradients of different prefix parameters: process by process each "
                f"{' / '.join(places)}, with gradients {all_counts}, after {steps} steps and {backwards} backward "
                "passes since; each must run backward through the same prefixes, equally often, before a step"
            )
        return False

    def _sources(self) -> list[Source]:
        found: dict[int, Source] = {}
        for p in self.parameters:
            if isinstance(p.grad, LazyGradient):
                found |= {id(source): source for source, _ in p.grad.value.parts if not source.averaged}
        return list(found.values())

    def _dense(self, p: Tensor) -> Tensor | None:
        return p.grad.value.dense if isinstance(p.grad, LazyGradient) else p.grad

    def _count(self, p: Tensor) -> int:
        parts = p.grad.value.parts if isinstance(p.grad, LazyGradient) else []
        return sum(not source.averaged for source, _ in parts) + (id(p) in self.dirty and self._dense(p) is not None)


def _bits(p: Tensor) -> int:
    """A number for the values of p: exact, so that it does not depend on an order of addition."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(p.detach().contiguous().view(integers[p.element_size()]).sum(dtype=torch.int64))


def _arrived(reference: "weakref.ref[Average]", p: Tensor) -> None:
    """A hook on a parameter: it got an ordinary gradient."""
    average = reference()
    if average is None:
        return
    average.dirty.add(id(p))
    task = torch._C._current_graph_task_id()
    if task not in (-1, average.task) and average.processes() > 1:
        average.task = task
        _at_the_end(partial(_at_the_end, partial(_ended, reference)))


def _at_the_end(call: Any) -> None:
    """Of the backward pass, after what was asked for before: DistributedDataParallel writes its means there."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _ended(reference: "weakref.ref[Average]") -> None:
    average = reference()
    if average is not None:
        average.backwards += 1
        average()
