"""Modules whose kv an optimizer can own: then it is a leaf, computed once for a state of the parameters.

An optimizer asks a module whether it is `Factorable`. `OwnedByOptimizer` is that but for what a kind of prefix says.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prefixattn.reparam.call import Form


class State:
    """Parameters at a time."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        # an address alone may be that of another tensor later
        self.seen = [(weakref.ref(t), t.data_ptr(), t._version) for t in parameters]

    def is_of(self, parameters: tuple[Tensor, ...]) -> bool:
        same = [ref() is t for (ref, _, _), t in zip(self.seen, parameters, strict=False)]
        return len(self.seen) == len(parameters) and all(same) and self.lasts()

    def lasts(self) -> bool:
        """True if they are there and unchanged."""
        return all(
            (t := ref()) is not None and pointer == t.data_ptr() and version == t._version
            for ref, pointer, version in self.seen
        )


class Known:
    """What was computed for one state of the parameters."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        self.of = State(parameters)
        self.leaves: dict[torch.dtype, Tensor] = {}  # kv, by type
        self.made: Any = None  # Hidden of a network; of projections, Projected
        self.name = object()  # for leaves, which must not hold what holds them


class Hidden(NamedTuple):
    """What a network made ahead of its large matrix, of one state of its parameters."""

    h: Tensor  # [G, P, M], without a graph
    form: Form  # how the matrix's rows become kv
    # the gradient of h, and the parameters ahead of the matrix -> their gradients; holds neither them nor the module
    pull: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


@runtime_checkable
class Factorable(Protocol):
    """A module behind whose kv stands a parameter whose ordinary gradient an optimizer does without."""

    reads_the_model: bool  # kv is made of weights of a model too, which may be sharded

    def factored_parameter(self) -> Tensor | None:
        """That parameter; None where its type is none that an optimizer factors."""

    def parameters_in_order(self) -> tuple[Any, ...]:
        """The parameters that kv is computed from; of a network the matrix w2 and its bias are the last."""

    def take_over(self, receive: Callable[..., None]) -> None:
        """From now on `receive(module, dkv, made)` gets the gradient of kv, once after each backward pass.

        `made` is `Hidden`, or what has `kv` and `pull(dkv)`. It is the same object for one state of the parameters.
        """

    def forget(self) -> None:
        """Parameters are about to change."""


class MakesPrefix(nn.Module):
    """What is trained in the place of keys and values: optimizers average its gradients over processes."""


class OwnedByOptimizer(MakesPrefix):
    """What the kinds of prefixes share that an optimizer can own."""

    reads_the_model = False

    def __init__(self) -> None:
        super().__init__()
        self._receive: Callable[[], Any] | None = None  # a weak reference
        self._finalizer: Any = None
        self._last: Known | None = None

    def take_over(self, receive: Callable[..., None]) -> None:
        """From now on `receive` gets what arrives; a method of the optimizer, of which a weak reference is kept.

        When the optimizer is gone, forward passes are recorded as before.
        """
        self.release()
        self._receive = weakref.WeakMethod(receive)
        # compiled code looks at what release() takes away alone
        optimizer = receive.__self__  # type: ignore[attr-defined]
        self._finalizer = weakref.finalize(optimizer, _release, weakref.ref(self))

    def release(self) -> None:
        """Undoes `take_over`."""
        self._receive = None
        if self._last is not None:
            self._last.leaves.clear()
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None

    @property
    def receiver(self) -> Any:
        return None if self._receive is None else self._receive()

    def factored_parameter(self) -> Tensor | None:
        raise NotImplementedError

    def parameters_in_order(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def forget(self) -> None:
        """Frees the leaf, for parameters are about to change; a backward pass through it raises from now on."""
        self._last = None

    def _known(self, parameters: tuple[Tensor, ...]) -> Known:
        if self._last is None or not self._last.of.is_of(parameters):
            self._last = Known(parameters)
        return self._last

    def _as_leaf(self, kv: Tensor, known: Known) -> Tensor:
        """A tensor without a graph becomes the leaf of its type."""
        # the hook must not keep the module alive: Python's collector does not see that circle
        hook = partial(arrived, weakref.ref(self), known.name)
        kv.requires_grad_().register_post_accumulate_grad_hook(hook)
        known.leaves[kv.dtype] = kv
        return kv

    def _deliver(self, name: object, dkv: Tensor) -> None:
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "OwnedByOptimizer":
        super()._apply(fn, recurse)
        self._last = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no optimizer
        return {**self.__dict__, "_receive": None, "_finalizer": None, "_last": None}


CHANGED = (
    "a parameter of the {what} behind the prefix was changed between a forward pass and its backward pass; call "
    "backward before optimizer.step()"
)


def _release(reference: "weakref.ref[OwnedByOptimizer]") -> None:
    module = reference()
    if module is not None:
        module.release()


def arrived(reference: "weakref.ref[OwnedByOptimizer]", name: object, leaf: Tensor) -> None:
    """What follows a backward pass that reached the leaf: its gradient moves on."""
    module, dkv = reference(), leaf.grad
    leaf.grad = None
    if module is not None and dkv is not None:
        module._deliver(name, dkv.detach())
