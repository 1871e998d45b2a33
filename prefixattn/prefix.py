"""Modules that make prefixes.

A *bank* is all prefixes of a model: `[N, 2, Hkv, P, D]`, with N the layers that have a prefix, and key before value.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixattn.config import PrefixConfig

Project = Callable[[int, Tensor], Tensor]  # layer, vectors [P, E] -> [2, Hkv, P, D]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that a prefix must fit."""

    model_type: str
    layers: int
    kv_heads: int  # Hkv
    head_dim: int  # D
    width: int  # E


class DeepShare(nn.Module):
    """Embedding -> Linear -> tanh -> Linear: key and value of a row in every layer come from one embedding."""

    def __init__(self, layers: int, length: int, hidden: int, geometry: Geometry) -> None:
        super().__init__()
        self.shape = (length, layers, 2, geometry.kv_heads, geometry.head_dim)
        self.embedding = nn.Embedding(length, geometry.width)
        self.down = nn.Linear(geometry.width, hidden)
        self.up = nn.Linear(hidden, layers * 2 * geometry.kv_heads * geometry.head_dim)

    def forward(self) -> Tensor:
        # The input is the whole embedding: one pass over P rows, whatever the batch.
        out = self.up(torch.tanh(self.down(self.embedding.weight)))  # [P, N * 2 * Hkv * D]
        return out.view(self.shape).permute(1, 2, 3, 0, 4)  # [N, 2, Hkv, P, D]


class SimpleShare(nn.Module):
    """One vector per row and layer; the layer's own norm and frozen projections make key and value of it."""

    def __init__(self, layers: tuple[int, ...], length: int, geometry: Geometry) -> None:
        super().__init__()
        self.layers = layers
        self.vectors = nn.Parameter(torch.randn(len(layers), length, geometry.width))

    def forward(self, project: Project) -> Tensor:
        return torch.stack([project(layer, vector) for layer, vector in zip(self.layers, self.vectors, strict=True)])


class FreePrefix(nn.Module):
    """Keys and values as parameters: share="none", and what is left of any prefix after `fold`."""

    def __init__(self, bank: Tensor, trainable: bool = True) -> None:
        super().__init__()
        self.bank = nn.Parameter(bank, requires_grad=trainable)  # [N, 2, Hkv, P, D]

    def forward(self) -> Tensor:
        return self.bank


def make_encoder(config: PrefixConfig, geometry: Geometry) -> nn.Module:
    layers = config.layer_indices(geometry.layers)
    if config.share == "deep":
        return DeepShare(len(layers), config.length, config.hidden, geometry)
    if config.share == "simple":
        return SimpleShare(layers, config.length, geometry)
    return FreePrefix(torch.randn(len(layers), 2, geometry.kv_heads, config.length, geometry.head_dim))
