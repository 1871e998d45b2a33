"""What both ops say of derivatives that they do not have."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor


def without_vmap(words: str) -> Callable[..., NoReturn]:
    """A rule for torch.func.vmap that refuses it."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(words)

    return refuse


def once(words: str, no_vmap: Callable[..., NoReturn]) -> Any:
    """An autograd.Function `apply(op, *args)` whose values are right, and whose differentiation is refused.

    It is for a backward pass of which a graph is recorded.
    """

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(op: Any, *args: Any) -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = op(*args)
            return grads

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise NotImplementedError(words)

        vmap = staticmethod(no_vmap)

    return Once


def transformed(name: str) -> bool:
    """Whether torch.func transforms the call of `name`; in compiled code that is refused."""
    inside: bool = torch._C._are_functorch_transforms_active()
    if inside and torch.compiler.is_compiling():  # Dynamo would take the gradient of this call for zero
        raise NotImplementedError(
            f"{name} inside torch.func's transforms does not compile; compile a function that calls "
            "torch.autograd.grad or backward, or leave the transform uncompiled"
        )
    return inside
