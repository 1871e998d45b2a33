"""The sizes of a model that a prefix must fit, and of what holds the prefix.

*kv* is a model's prefix, `[N, 2, Hkv, P, D]`: N the layers that have one, and key before value. Where a model's values
have another width than its keys it is `[N, 1, Hkv, P, D + Dv]`: of each row of a head, key before value. Where layers
differ in these sizes, they are the largest, and a layer reads the first of its heads and of their numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    model_type: str
    layers: int  # with attention, of all kinds
    kv_heads: int  # Hkv
    head_dim: int  # D
    width: int  # E
    kinds: dict[str, int] = field(default_factory=dict)  # kind of attention -> its layers; of one kind {"self": layers}

    heads: int = 0  # H; 0: as many as Hkv
    value_dim: int = 0  # Dv; 0: as wide as keys
    sizes: tuple[tuple[int, int, int], ...] = ()  # Hkv, D and Dv of each layer, if they differ: these are the largest
    sources: tuple[int, ...] = ()  # whose own keys and values each layer attends to, if some have none

    @classmethod
    def of_layers(
        cls,
        model_type: str,
        sizes: Sequence[tuple[int, int, int]],  # Hkv, D and Dv of each layer, which may differ
        width: int,
        kinds: dict[str, int],
        heads: int,
        sources: Sequence[int],
    ) -> "Geometry":
        kv_heads, head_dim, value_dim = map(max, zip(*sizes, strict=True))
        differing = tuple(sizes) if len(set(sizes)) > 1 else ()
        others = tuple(sources) if list(sources) != list(range(len(sizes))) else ()
        return cls(model_type, len(sizes), kv_heads, head_dim, width, kinds, heads, value_dim, differing, others)

    def __post_init__(self) -> None:
        if not self.kinds:
            self.kinds["self"] = self.layers
        if not self.heads:
            object.__setattr__(self, "heads", self.kv_heads)
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)

    @property
    def two_widths(self) -> bool:
        return self.value_dim != self.head_dim

    def kv_shape(self, layers: int, length: int) -> tuple[int, int, int, int, int]:
        """Of kv, `layers` of its layers and `length` rows."""
        if self.two_widths:
            return layers, 1, self.kv_heads, length, self.head_dim + self.value_dim
        return layers, 2, self.kv_heads, length, self.head_dim

    def of(self, slot: int) -> tuple[int, int, int]:
        """A layer's Hkv, D and Dv."""
        return self.sizes[slot] if self.sizes else (self.kv_heads, self.head_dim, self.value_dim)

    def joined(self, key: Tensor, value: Tensor) -> Tensor:
        """A layer's kv, without N, of its key [Hkv, P, D] and value [Hkv, P, Dv]; zeros where it reads nothing."""
        if self.sizes:
            missing = self.kv_heads - len(key)
            key, value = (
                F.pad(t, (0, width - t.shape[-1], 0, 0, 0, missing))
                for t, width in ((key, self.head_dim), (value, self.value_dim))
            )
        return torch.cat([key, value], -1)[None] if self.two_widths else torch.stack([key, value])

    def by_layer(self, kv: Tensor, slots: Sequence[int], axis: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Key and value of each of the layers `slots`, views without the axes [N, 2 or 1], of which N is at `axis`."""
        if self.two_widths:
            key, value = kv.squeeze(axis + 1).split((self.head_dim, self.value_dim), -1)
            pairs = list(zip(key.unbind(axis), value.unbind(axis), strict=True))
        else:
            tensors = kv.flatten(axis, axis + 1).unbind(axis)
            pairs = list(zip(tensors[0::2], tensors[1::2], strict=True))
        if not self.sizes:
            return pairs
        sizes = [self.of(slot) for slot in slots]
        return [(k[..., :h, :, :d], v[..., :h, :, :dv]) for (k, v), (h, d, dv) in zip(pairs, sizes, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For files; those of one width say nothing of values, and those of one size nothing of sizes.

        Whose keys a layer reads changes nothing in what a prefix is.
        """
        fields = asdict(self) | {"sizes": [list(sizes) for sizes in self.sizes]}
        left_out = {"value_dim": not self.two_widths, "sizes": not self.sizes, "sources": True}
        return {name: value for name, value in fields.items() if not left_out.get(name)}

    @property
    def of_network(self) -> tuple[int, int]:
        """Heads and width of what a network makes twice for each layer: of two widths it is half of the heads, whole.

        NotImplementedError if their number is odd.
        """
        if not self.two_widths:
            return self.kv_heads, self.head_dim
        half, odd = divmod(self.kv_heads, 2)
        if odd:
            raise NotImplementedError(
                f"share='deep' with keys of width {self.head_dim}, values of width {self.value_dim} and "
                f"Hkv={self.kv_heads} key heads; it takes an even number of heads there, and share='none' any"
            )
        return half, self.head_dim + self.value_dim
