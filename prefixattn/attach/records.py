"""What goes between a prefix, the adapter of its model and the model's layers."""

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from prefixattn.attention.sequences import Sequences
from prefixattn.prefixes.config import Defaults
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.plus import Memory

LayerPrefix = tuple[Tensor, Tensor]  # key and value of one layer, [Hkv, P, D] each, or [T, Hkv, P, D] of a bank


class Chosen(NamedTuple):
    """What a forward pass of the model attends to."""

    prefixes: list[LayerPrefix]  # of each layer of `slots`, or of none
    shift: int | Tensor  # how many positions the prefix takes; [B, 1] where each sample has its own
    prefix_ids: Tensor | None = None  # [B], of a bank
    lengths: Tensor | None = None  # [T], of a bank
    memories: list[Memory] = []  # noqa: RUF012 # of each layer of `slots`, or of none

    def tensors(self) -> list[Tensor]:
        """Those that may want a gradient."""
        parts = [t for memory in self.memories for t in memory[1:] if t is not None]
        return [t for pair in self.prefixes for t in pair] + parts

    def with_tensors(self, tensors: list[Tensor]) -> "Chosen":
        """The same with others in their place."""
        rest = iter(tensors)
        prefixes = [(next(rest), next(rest)) for _ in self.prefixes]
        memories = [
            Memory(m.phi, *(None if t is None else next(rest) for t in m[1:]))  # type: ignore[arg-type]
            for m in self.memories
        ]
        return self._replace(prefixes=prefixes, memories=memories)


class PrefixCall(NamedTuple):
    """What one forward of the model passes to its attention layers."""

    prefixes: dict[int, LayerPrefix]  # by slot
    dropout_p: float
    prefix_ids: Tensor | None = None  # [B], of a bank
    lengths: Tensor | None = None  # [T]
    masses: dict[int, Tensor] | None = None  # where the softmax's weight on the prefix is wanted: slot -> [B, H, L]
    shift: int | Tensor = 0  # of the positions in the decoder of an encoder-decoder
    memories: dict[int, Memory] = {}  # noqa: RUF012 # by slot
    windows: dict[int, int] = {}  # noqa: RUF012 # by slot, of layers out of whose windows the prefix slides: keys
    seen: int = 0  # tokens before the pass, where it does
    packed: Sequences | None = None  # of a pass whose rows, behind one another, hold several; each has its prefix

    def has(self, slot: int | None) -> bool:
        return slot in self.prefixes or slot in self.memories


class _Asked(threading.local):
    """The weight on a prefix that this thread asks for, by prefix: slot -> [B, H, L]."""

    def __init__(self) -> None:
        self.masses: dict[Any, dict[int, Tensor]] = {}


asked = _Asked()


class Host(Protocol):
    """What a prefix knows of its model's adapter: see adapter.py, whose class it is."""

    model: nn.Module
    geometry: Geometry
    defaults: Defaults
    caches: bool
    prefix: Any  # the active one

    @property
    def device(self) -> torch.device: ...

    def activate(self, prefix: Any) -> None: ...

    def remove(self, prefix: Any) -> None: ...

    def disabled(self) -> AbstractContextManager[None]: ...

    def project(self, slot: int, vectors: Tensor) -> Tensor: ...

    def projection_parameters(self, slot: int) -> Iterable[Tensor]: ...
