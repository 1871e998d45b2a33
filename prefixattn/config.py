"""What a prefix is: its length, how key and value share parameters, which layers have one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

SHARES = ("deep", "simple", "none")
POSITIONS = ("shifted", "unshifted")
MOST = 2**20  # of rows, and of the width of the bottleneck: far past any use, and far from overflowing a tensor's size


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class PrefixConfig:
    """The choices behind a prefix. Two configs that are equal make prefixes of the same shape.

    Args:
        length: P, the rows of the prefix in each layer (`num_virtual_tokens` in PEFT, `preseqlen` in Li & Liang).
        share: How the key and the value of a row share parameters. "deep": Embedding -> Linear -> tanh -> Linear, one
            network for keys and values of all layers. "simple": one vector per row and layer, sent through the layer's
            own layer norm and frozen key and value projections. "none": keys and values are free parameters.
        layers: "all" (DEEP in the papers), "first" (SHALLOW), or the indices of the layers that get a prefix.
        hidden: Width of the bottleneck of share="deep" (`mid_dim`, `encoder_hidden_size`).
        dropout: Dropout on the prefix's keys and values, with an own mask for each sample; active while the prefix is
            in training mode.
        positions: "shifted": the sequence's position ids start at P, as if the prefix were tokens (Li & Liang, PEFT).
            "unshifted": they start at 0, and the model keeps its whole context.
        init: "random", or, for share="none", a text (or its token ids) whose keys and values in the frozen model become
            the prefix; the length is then the number of its tokens, and the text "random" must be given as token ids.
    """

    length: int = 10
    share: str = "deep"
    layers: str | Sequence[int] = "all"
    hidden: int = 512
    dropout: float = 0.0
    positions: str = "shifted"
    init: str | Sequence[int] = "random"

    def __post_init__(self) -> None:
        for name in ("length", "hidden"):
            value = getattr(self, name)
            if not _is_int(value) or not 1 <= value <= MOST:
                raise ValueError(f"{name} is {value!r}, expected an integer from 1 to {MOST}")
        if self.share not in SHARES:
            raise ValueError(f"share is {self.share!r}, expected one of {', '.join(map(repr, SHARES))}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}, expected one of {', '.join(map(repr, POSITIONS))}")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}, expected a probability in [0, 1)")
        self._check_layers()
        self._check_init()

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            if self.layers not in ("all", "first"):
                raise ValueError(f"layers is {self.layers!r}, expected 'all', 'first' or a list of layer indices")
            return
        indices: tuple[Any, ...] = tuple(self.layers) if isinstance(self.layers, Sequence) else ()
        if not indices or not all(_is_int(i) and i >= 0 for i in indices) or sorted(set(indices)) != list(indices):
            raise ValueError(f"layers is {self.layers!r}, expected increasing layer indices, at least one, from 0")
        object.__setattr__(self, "layers", indices)

    def _check_init(self) -> None:
        if not isinstance(self.init, str):
            given = isinstance(self.init, Sequence) and not isinstance(self.init, bytes | bytearray)
            ids: tuple[Any, ...] = tuple(self.init) if given else ()
            if not ids or not all(_is_int(i) and i >= 0 for i in ids):
                raise ValueError(f"init is {self.init!r}, expected 'random', a text, or token ids")
            object.__setattr__(self, "init", ids)
        elif not self.init.strip():
            raise ValueError(f"init is {self.init!r}, expected 'random', a text, or token ids")
        if self.init != "random" and self.share != "none":
            raise ValueError(
                f"init is {self.init!r} with share={self.share!r}; only share='none' starts from real activations"
            )

    def layer_indices(self, count: int) -> tuple[int, ...]:
        """The layers that get a prefix, in a model with `count` layers."""
        if self.layers == "all":
            return tuple(range(count))
        indices = (0,) if self.layers == "first" else tuple(int(i) for i in self.layers)
        if indices[-1] >= count:
            raise ValueError(f"layers names layer {indices[-1]}, but the model has {count} layers (0 to {count - 1})")
        return indices

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PrefixConfig":
        if not isinstance(values, dict):
            raise ValueError(f"the prefix config is {type(values).__name__}, expected an object with fields")
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            unknown, missing = sorted(set(values) - known), sorted(known - set(values))
            raise ValueError(f"the prefix config has unknown fields {unknown} and lacks {missing}")
        return cls(**values)
