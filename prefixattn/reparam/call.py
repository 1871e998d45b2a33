"""The records of a reparameterization, in the words of attention/call.py: what backends take and return, by name."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What the tensors' shapes do not say."""

    layers: int  # n, of each network
    kv_heads: int  # Hkv
    head_dim: int  # D
    interleaved: bool
    activation: str  # a key of reference.ACTIVATIONS

    @property
    def layout(self) -> tuple[int, int, int, bool]:
        """Where y's numbers lie in kv: what the fused steps' kernels are told."""
        return self.layers, self.kv_heads, self.head_dim, self.interleaved


class Call(NamedTuple):
    """G networks in the normal form of functional.py: checked, all of one type. They make N = G * n layers."""

    x: Tensor  # [G, P, E]
    w1: Tensor  # [G, M, E]
    b1: Tensor | None  # [G, M]
    w2: Tensor  # [G, O, M], O = n * 2 * Hkv * D
    b2: Tensor | None  # [G, O]
    form: Form
    dtype: torch.dtype  # of kv

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """What may have a gradient, in the order of `Needs`."""
        return self.x, self.w1, self.b1, self.w2, self.b2

    def each(self, f: Callable[[Tensor], Tensor]) -> "Call":
        """The same call of other tensors."""
        b1, b2 = (None if b is None else f(b) for b in (self.b1, self.b2))
        return Call(f(self.x), f(self.w1), b1, f(self.w2), b2, self.form, self.dtype)


class Needs(NamedTuple):
    """Whose gradient is wanted: of the first fields of `Call`, in their order."""

    x: bool = False
    w1: bool = False
    b1: bool = False
    w2: bool = False
    b2: bool = False

    @property
    def hidden(self) -> bool:
        """Whether any is wanted that goes through the hidden rows."""
        return self.x or self.w1 or self.b1


class Results(NamedTuple):
    """Of a forward pass."""

    kv: Tensor  # [N, 2, Hkv, P, D], contiguous
    z: Tensor  # [G, P, M], float32 (float64 of float64)


class Given(NamedTuple):
    """What a backward pass is given beside the call, in which b1 and b2 are None."""

    dkv: Tensor  # [N, 2, Hkv, P, D], any float type
    z: Tensor  # [G, P, M]


class Grads(NamedTuple):
    """Each in its input's shape and type, contiguous, in the order of `Needs`; what is not wanted is empty [0]."""

    x: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
