"""What a prefix is: its length, how key and value share parameters, which layers have one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from prefixattn.reparam.reference import ACTIVATIONS

SHARES = ("deep", "simple", "none")
NETWORKS = ("one", "per_layer")
POSITIONS = ("shifted", "unshifted")
INITS = ("random", "normal", "uniform", "zero")  # any other text is a text
MOST = 2**20  # of rows, and of the width of the bottleneck: far past any use, and far from overflowing a tensor's size


class Defaults(NamedTuple):
    """What a config leaves open, as the published code for a kind of model has it."""

    network: str = "one"
    hidden: int = 512
    positions: str = "shifted"
    init: str = "normal"
    bound: float = 1.0  # of init="uniform"
    shiftable: bool = False  # positions="shifted" is possible where it is not the default
    slides: bool | None = False  # a decoder's layers have windows that a prefix can slide out of; None: that it cannot

    @property
    def can_shift(self) -> bool:
        return self.positions == "shifted" or self.shiftable


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class LayerChoice:
    """The layers of a model that a config names by its fields `layers` and `attentions`."""

    layers: str | Sequence[int]
    attentions: str | Sequence[str]

    def check_layers(self) -> None:
        if isinstance(self.layers, str):
            if self.layers not in ("all", "first"):
                raise ValueError(f"layers is {self.layers!r}, expected 'all', 'first' or a list of layer indices")
            return
        indices: tuple[Any, ...] = tuple(self.layers) if isinstance(self.layers, Sequence) else ()
        if not indices or not all(_is_int(i) and i >= 0 for i in indices) or sorted(set(indices)) != list(indices):
            raise ValueError(f"layers is {self.layers!r}, expected increasing layer indices, at least one, from 0")
        object.__setattr__(self, "layers", indices)

    def check_attentions(self) -> None:
        if self.attentions == "all":
            return
        given = isinstance(self.attentions, Sequence) and not isinstance(self.attentions, str)
        kinds: tuple[Any, ...] = tuple(self.attentions) if given else ()
        if not kinds or not all(isinstance(kind, str) for kind in kinds) or len(set(kinds)) != len(kinds):
            raise ValueError(f"attentions is {self.attentions!r}, expected 'all' or a list of kinds of attention")
        object.__setattr__(self, "attentions", kinds)

    def layer_indices(self, count: int) -> tuple[int, ...]:
        """The layers that get a prefix, in a stack of `count` layers."""
        if self.layers == "all":
            return tuple(range(count))
        indices = (0,) if self.layers == "first" else tuple(int(i) for i in self.layers)
        if indices[-1] >= count:
            raise ValueError(f"layers names layer {indices[-1]}, but the model has {count} layers (0 to {count - 1})")
        return indices

    def counts(self, kinds: Mapping[str, int]) -> dict[str, int]:
        """Layers with a prefix for each kind of attention that has any; `kinds` has all layers of all kinds."""
        return {kind: len(slots) for kind, slots in self._chosen(kinds).items()}

    def slots(self, kinds: Mapping[str, int]) -> tuple[int, ...]:
        """The layers with a prefix, counted through all kinds of attention in their order."""
        return tuple(slot for slots in self._chosen(kinds).values() for slot in slots)

    def _chosen(self, kinds: Mapping[str, int]) -> dict[str, list[int]]:
        wanted = tuple(kinds) if self.attentions == "all" else tuple(self.attentions)
        if unknown := [kind for kind in wanted if kind not in kinds]:
            raise ValueError(f"attentions names {unknown[0]!r}, but the model has {', '.join(map(repr, kinds))}")
        first, chosen = 0, {}
        for kind, count in kinds.items():
            if kind in wanted:
                chosen[kind] = [first + i for i in self.layer_indices(count)]
            first += count
        self.check_count(sum(map(len, chosen.values())))
        return chosen

    def check_count(self, count: int) -> None:
        """ValueError if the config does not fit so many layers."""


@dataclass(frozen=True)
class PrefixConfig(LayerChoice):
    """The choices behind a prefix. Two configs that are equal make prefixes of the same shape.

    None leaves a choice to the model's kind: what the published code for language models or for image models does.
    `attach` fills it in, so that the config of a `Prefix` says it.

    Args:
        length: P, the rows of the prefix in each layer (`num_virtual_tokens` in PEFT, `preseqlen` in Li & Liang), or a
            list with one length for each layer that gets a prefix, in their order.
        share: How the key and the value of a row share parameters. "deep": Embedding -> Linear -> activation -> Linear,
            a network that makes both. "simple": one vector per row and layer, sent through the layer's own norm and
            frozen key and value projections. "none": keys and values are free parameters.
        layers: "all" (DEEP in the papers), "first" (SHALLOW), or the indices of the layers that get a prefix; of an
            encoder-decoder in each of its stacks.
        attentions: "all", or those of a model's kinds of attention that get a prefix: "encoder", "decoder", "cross" of
            an encoder-decoder. Other models have one kind, "self".
        network: Of share="deep". "one": one network for keys and values of all layers (of each kind of attention one),
            as for language. "per_layer": a small one for each layer, whose output interleaves key and value, as for
            images.
        hidden: Width of the bottleneck of share="deep" (`mid_dim`, `encoder_hidden_size`); 512, or 48 per layer.
        activation: Of share="deep": "tanh", "relu", "gelu" or "none".
        dropout: Dropout on the prefix's keys and values, with an own mask for each sample; active while the prefix is
            in training mode.
        gate: A learned factor for each layer, 1 at first, that multiplies its keys and values.
        positions: "shifted": the sequence's position ids start at P, as if the prefix were tokens (Li & Liang, PEFT).
            "unshifted": they start at 0, and the model keeps its whole context. Decoders shift unless told otherwise;
            an encoder-decoder with position embeddings (BART) shifts its decoder's if told so; other models cannot.
        init: "normal" (standard), "uniform" (VPT's rule), "zero", or "random", which is the published choice: "uniform"
            for images, else "normal". These are the start of what share trains: embeddings, vectors, or keys and
            values; "zero" with share="deep" makes its output zero. Or a text (or its token ids) whose keys and values
            in the frozen model become the prefix: the length is then the number of its tokens. share="none" copies
            them, share="deep" fits its network to them. The text "zero" must be given as token ids.
        prefix_in_window: In layers with a sliding window the prefix lies right before the sequence and slides out of
            sight as tokens do, as PEFT's does; row i of P stands i - P tokens from the first column, so that padding on
            the left is between the two. False: all of it stays in sight of all tokens. Of decoders with such layers.
        count: None, or the number T of prefixes in a `PrefixBank`, of which every sample of a batch picks its own by
            `prefix_ids`. They have share="none".
    """

    length: int | Sequence[int] = 10
    share: str = "deep"
    layers: str | Sequence[int] = "all"
    attentions: str | Sequence[str] = "all"
    network: str | None = None
    hidden: int | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    gate: bool = False
    positions: str | None = None
    init: str | Sequence[int] = "random"
    count: int | None = None
    prefix_in_window: bool = False

    def __post_init__(self) -> None:
        self._check_length()
        if self.hidden is not None and not (_is_int(self.hidden) and 1 <= self.hidden <= MOST):
            raise ValueError(f"hidden is {self.hidden!r}, expected an integer from 1 to {MOST}")
        choices = (
            ("share", SHARES),
            ("positions", POSITIONS),
            ("network", NETWORKS),
            ("activation", tuple(ACTIVATIONS)),
        )
        for name, words in choices:
            value = getattr(self, name)
            if value is None and name in ("positions", "network"):
                continue
            if not isinstance(value, str) or value not in words:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, words))}")
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}, expected a probability in [0, 1)")
        for name in ("gate", "prefix_in_window"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected True or False")
        self.check_layers()
        self.check_attentions()
        self._check_init()
        self._check_count()

    def _check_length(self) -> None:
        given = self.length
        several = isinstance(given, Sequence) and not isinstance(given, (str, bytes, bytearray))
        lengths: tuple[Any, ...] = tuple(given) if several else (given,)  # type: ignore[arg-type]
        if not lengths or not all(_is_int(n) and 1 <= n <= MOST for n in lengths):
            raise ValueError(f"length is {given!r}, expected an integer from 1 to {MOST}, or a list of such")
        if several:
            object.__setattr__(self, "length", lengths)

    def _check_init(self) -> None:
        if not isinstance(self.init, str):
            given = isinstance(self.init, Sequence) and not isinstance(self.init, bytes | bytearray)
            ids: tuple[Any, ...] = tuple(self.init) if given else ()
            if not ids or not all(_is_int(i) and i >= 0 for i in ids):
                raise ValueError(f"init is {self.init!r}, expected {_INIT_WORDS}")
            object.__setattr__(self, "init", ids)
        elif not self.init.strip():
            raise ValueError(f"init is {self.init!r}, expected {_INIT_WORDS}")
        if self.init not in INITS and self.share == "simple":
            raise ValueError(
                f"init is {self.init!r} with share='simple'; keys and values of a text have no vector that makes both: "
                "share='none' copies them and share='deep' is fitted to them"
            )

    def _check_count(self) -> None:
        if self.count is None:
            return
        if not (_is_int(self.count) and self.count >= 1):
            raise ValueError(f"count is {self.count!r}, expected None or an integer from 1")
        for name, needed in (("share", "none"), ("gate", False)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} with count={self.count}; a bank holds keys and values only: "
                    f"expected {name}={needed!r}, or prefixes made one by one and put together by PrefixBank.of"
                )
        if not isinstance(self.length, int):
            raise ValueError(f"length is {self.length!r} with count={self.count}; expected one length for all layers")

    @property
    def longest(self) -> int:
        """P of the keys and values: rows past a layer's own length are not used."""
        return self.length if isinstance(self.length, int) else max(self.length)

    def lengths(self, count: int) -> tuple[int, ...]:
        """The length of each of the `count` layers that have a prefix."""
        if isinstance(self.length, int):
            return (self.length,) * count
        if len(self.length) != count:
            raise ValueError(f"length names {len(self.length)} lengths for {count} layers with a prefix")
        return tuple(self.length)

    def check_count(self, count: int) -> None:
        self.lengths(count)

    def resolved(self, defaults: Defaults) -> "PrefixConfig":
        """With everything said that was left open."""
        network = self.network or defaults.network
        hidden = self.hidden or (48 if network == "per_layer" else defaults.hidden)
        init = defaults.init if self.init == "random" else self.init
        if self.positions == "shifted" and not defaults.can_shift:
            raise ValueError("positions is 'shifted', but the model has no positions that a prefix could shift")
        if self.prefix_in_window and not defaults.slides:
            raise ValueError(
                "prefix_in_window is True, but the model is no decoder with sliding windows that reach the attention: "
                "there is nothing that a prefix could slide out of; leave it False"
            )
        return replace(self, network=network, hidden=hidden, init=init, positions=self.positions or defaults.positions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PrefixConfig":
        if not isinstance(values, dict):
            raise ValueError(f"the prefix config is {type(values).__name__}, expected an object with fields")
        known = {field.name for field in fields(cls)}
        values = {**ADDED, **values}
        if set(values) != known:
            unknown, missing = sorted(set(values) - known), sorted(known - set(values))
            raise ValueError(f"the prefix config has unknown fields {unknown} and lacks {missing}")
        return cls(**values)


ADDED: dict[str, Any] = {"prefix_in_window": False}  # fields that older files lack
_INIT_WORDS = f"{', '.join(map(repr, INITS))}, a text, or token ids"
