"""Prefix-Tuning+ (arXiv 2506.13674): a trained matrix for each layer in place of keys and values."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixattn.attention.reference import PHIS
from prefixattn.prefixes.config import MOST, Defaults, LayerChoice
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.ownership import MakesPrefix

PER = ("head", "width")
INITS = ("zero", "normal")
SPREAD = 0.02  # of init="normal"


@dataclass(frozen=True)
class PrefixPlusConfig(LayerChoice):
    """The choices behind Prefix-Tuning+: each layer's attention gets ``phi(q) @ M`` added to its output (eq. 7).

    There are no keys and values, no length, and no positions to shift. q is the query as attention gets it, rotated in
    a model with rotary positions.

    Args:
        phi: "elu" (the paper's main results), "gelu", "relu", "none", or "mlp": ``relu(q @ W.T + b)`` with a trained W
            (remark 1).
        per: "head": M is ``[H, D, Dv]``, a matrix for each query head, applied inside the attention kernels; Dv is the
            width of values, which most models have from D. "width": M is ``[H * D, H * Dv]``, over the queries of all
            heads, as published code has it; a product of its own.
        hidden: Features of phi="mlp"; None: as many as q has, D or H * D.
        layers: "all", "first", or the indices of the layers that get a matrix; of an encoder-decoder in each stack.
        attentions: "all", or some of a model's kinds of attention, as in `PrefixConfig`.
        init: "zero": M starts at zero, and the model as it was. "normal": standard deviation 0.02.
    """

    phi: str = "elu"
    per: str = "head"
    hidden: int | None = None
    layers: Any = "all"
    attentions: Any = "all"
    init: str = "zero"

    def __post_init__(self) -> None:
        for name, words in {"phi": (*PHIS, "mlp"), "per": PER, "init": INITS}.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in words:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, words))}")
        if self.hidden is not None:
            if not (isinstance(self.hidden, int) and not isinstance(self.hidden, bool) and 1 <= self.hidden <= MOST):
                raise ValueError(f"hidden is {self.hidden!r}, expected an integer from 1 to {MOST}")
            if self.phi != "mlp":
                raise ValueError(
                    f"hidden is {self.hidden!r} with phi={self.phi!r}; only phi='mlp' has features of its own"
                )
        self.check_layers()
        self.check_attentions()

    def resolved(self, defaults: Defaults) -> "PrefixPlusConfig":
        return self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PrefixPlusConfig":
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"the config is {values!r:.80}, expected the fields {', '.join(sorted(known))}")
        return cls(**values)


PHI: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "gelu": F.gelu, "relu": F.relu, "none": lambda t: t}


class Memory(NamedTuple):
    """What one layer adds to its attention's output."""

    phi: str
    matrix: Tensor  # [H, F, Dv], or [1, F, H * Dv] over all heads; F = D or H * D without an MLP
    weight: Tensor | None  # [H, F, D] or [1, F, H * D], of phi="mlp"
    bias: Tensor | None  # [H, F] or [1, F]

    @property
    def inside(self) -> bool:
        """True if the attention kernels add it themselves."""
        return self.weight is None and len(self.matrix) > 1

    def to(self, device: torch.device) -> "Memory":
        parts = (self.matrix, self.weight, self.bias)
        return Memory(self.phi, *(None if t is None else t.to(device) for t in parts))  # type: ignore[arg-type]

    def added(self, q: Tensor) -> Tensor:  # [B, H, L, D] -> [B, H, L, Dv]
        """phi(q) @ M, for what the kernels do not know."""
        B, H, L, D = q.shape
        heads = len(self.matrix)
        rows = q if heads == H else q.transpose(1, 2).reshape(B, 1, L, H * D)  # [B, H or 1, L, D or H * D]
        if self.weight is None or self.bias is None:
            features = PHI[self.phi](rows)
        else:
            features = torch.relu(rows @ self.weight.mT + self.bias[:, None])
        out = features @ self.matrix
        return out if heads == H else out.view(B, L, H, out.shape[-1] // H).transpose(1, 2)


class Memories(MakesPrefix):
    """The matrices of all layers that have one. A parameter for each layer: no layer's gradient waits for another's."""

    def __init__(self, config: PrefixPlusConfig, geometry: Geometry) -> None:
        super().__init__()
        if geometry.sizes:
            raise NotImplementedError(
                f"the layers of {geometry.model_type} have keys of several sizes, for which there are no matrices of "
                "Prefix-Tuning+; PrefixConfig is for such a model too"
            )
        H, D, Dv = geometry.heads, geometry.head_dim, geometry.value_dim
        groups, width, made = (H, D, Dv) if config.per == "head" else (1, H * D, H * Dv)
        hidden = config.hidden or width
        self.phi = config.phi
        count = len(config.slots(geometry.kinds))
        self.matrix = nn.ParameterList(torch.zeros(groups, hidden, made) for _ in range(count))
        self.weight: Any = None
        self.bias: Any = None
        if config.phi == "mlp":
            bound = width**-0.5  # nn.Linear's
            self.weight = nn.ParameterList(
                torch.empty(groups, hidden, width).uniform_(-bound, bound) for _ in range(count)
            )
            self.bias = nn.ParameterList(torch.empty(groups, hidden).uniform_(-bound, bound) for _ in range(count))
        if config.init == "normal":
            for matrix in self.matrix:
                nn.init.normal_(matrix, std=SPREAD)

    def forward(self, dtype: torch.dtype | None = None) -> list[Memory]:
        """One for each layer, in the parameters' type or in `dtype`."""
        parts = [self.matrix, self.weight, self.bias]
        cast = [
            [None] * len(self.matrix) if p is None else [t if dtype is None else t.to(dtype) for t in p] for p in parts
        ]
        return [Memory(self.phi, *tensors) for tensors in zip(*cast, strict=True)]
