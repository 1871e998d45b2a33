"""`Prefix`: the prefix on a model, from `attach` to `detach`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from prefixattn.attach.adapter import Adapter
from prefixattn.config import PrefixConfig
from prefixattn.prefix import DeepShare, DeepShares, FreePrefix, Geometry, SimpleShare

if TYPE_CHECKING:
    from prefixattn.attach.interface import PrefixCall

LayerPrefix = tuple[Tensor, Tensor]  # key and value of one layer, [Hkv, P, D] each, or [T, Hkv, P, D] of a bank


class Chosen(NamedTuple):
    """What a forward pass of the model attends to."""

    prefixes: list[LayerPrefix]  # of each layer of `slots`
    shift: int | Tensor  # how many positions the prefix takes; [B, 1] where each sample has its own
    ids: Tensor | None = None  # [B], of a bank
    lengths: Tensor | None = None  # [T], of a bank


_steps = 0  # of all optimizers of the process


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def steps() -> int:
    """Of all optimizers so far: torch's fused ones leave no trace in a tensor's version."""
    return _steps


class Prefix(nn.Module):
    """A trainable prefix on a frozen model. Made by `prefixattn.attach` and `prefixattn.load`.

    `parameters()` and `state_dict()` hold the prefix's own tensors only, and the model's never hold them. `train()` and
    `eval()` switch the prefix's dropout and leave the model's mode alone: the published GPT-2 runs train the prefix
    with the model in `eval()`, which is how `from_pretrained` returns it.
    """

    def __init__(self, config: PrefixConfig, adapter: Adapter, encoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        slots = len(config.slots(adapter.geometry.kinds))
        dtype = next(encoder.parameters()).dtype  # a checkpoint has one type
        self.gate = nn.Parameter(torch.ones(slots, dtype=dtype)) if config.gate else None  # [N]
        # Plain attributes: were the model a submodule, its weights would be among the prefix's parameters.
        self._adapter: Adapter | None = adapter
        self._geometry = adapter.geometry
        self._cache: tuple[tuple[Any, ...], list[LayerPrefix]] | None = None
        self._masses: dict[int, Tensor] | None = None

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def slots(self) -> tuple[int, ...]:
        """The layers that have a prefix, counted through all kinds of attention of the model."""
        return self.config.slots(self._geometry.kinds)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The prefix's length in each of those layers."""
        return self.config.lengths(len(self.slots))

    @property
    def folded(self) -> bool:
        """True if only keys and values are left, with no network or projection to run."""
        return isinstance(self.encoder, FreePrefix) and self.gate is None

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The bank, `[N, 2, Hkv, P, D]`, in the parameters' own type or in `dtype`."""
        # The network is small beside the model and its output is what will be kept: it runs in its own type.
        device_type = next(self.encoder.parameters()).device.type
        with torch.autocast(device_type, enabled=False):
            if isinstance(self.encoder, (DeepShare, DeepShares)):
                bank = self.encoder(dtype)
            else:
                simple = isinstance(self.encoder, SimpleShare)
                bank = self.encoder(self._attached().project) if simple else self.encoder()
            if self.gate is not None:
                bank = bank * self.gate[:, None, None, None, None]
            return bank if dtype is None else bank.to(dtype)

    def choose(self, ids: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device) -> Chosen:
        """The prefixes of a forward pass of `batch` samples, for which the caller passed the prefix_ids `ids`."""
        if ids is not None:
            raise ValueError("prefix_ids chooses among the prefixes of a PrefixBank; the active prefix is a single one")
        shift = self.config.longest if self.config.positions == "shifted" else 0
        return Chosen(self.layer_prefixes(dtype, device), shift)

    def layer_prefixes(self, dtype: torch.dtype, device: torch.device) -> list[LayerPrefix]:
        """Key and value for each layer of `layers`, in the model's type; computed once for a forward of the model.

        Where no gradient is wanted the result is kept until a parameter changes, so that decoding runs no network.
        """
        if torch.compiler.is_compiling():
            return self._split(dtype, device)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            # An optimizer that writes through `.data` leaves no trace in the version, so training empties the cache.
            self._cache = None
            return self._split(dtype, device)
        sources = list(self._sources())
        if any(t.is_inference() for t in sources):  # made in inference_mode: nothing tells when they change
            return self._split(dtype, device)
        key = (dtype, device, steps(), *((t.data_ptr(), t._version) for t in sources))
        if self._cache is None or self._cache[0] != key:
            # Not as inference tensors: a later pass may need to save them for a backward.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (key, self._split(dtype, device))
        return self._cache[1]

    def _sources(self) -> Iterator[Tensor]:
        """What the bank is computed from."""
        yield from self.parameters()
        if isinstance(self.encoder, SimpleShare):
            for slot in self.slots:
                yield from self._attached().projection_parameters(slot)

    def _split(self, dtype: torch.dtype, device: torch.device) -> list[LayerPrefix]:
        bank = self(dtype).to(device)
        tensors = bank.flatten(0, 1).unbind(0)
        pairs = list(zip(tensors[0::2], tensors[1::2], strict=True))
        if isinstance(self.config.length, int):
            return pairs
        return [(k[:, :n], v[:, :n]) for (k, v), n in zip(pairs, self.lengths, strict=True)]

    def call(self, chosen: Chosen) -> "PrefixCall":
        """What the layers of a Hugging Face model get with a forward pass."""
        from prefixattn.attach.interface import PrefixCall

        dropout_p = self.config.dropout if self.training else 0.0
        by_slot = dict(zip(self.slots, chosen.prefixes, strict=True))
        return PrefixCall(by_slot, dropout_p, chosen.ids, chosen.lengths, self._masses, chosen.shift)

    def num_parameters(self, kept: bool = False) -> int:
        """Parameters being trained; with `kept`, the numbers that must be kept to use the prefix afterwards."""
        if kept:
            return sum(self.lengths) * 2 * self._geometry.kv_heads * self._geometry.head_dim
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def fold(self) -> "Prefix":
        """Drops the network and keeps the prefixes it makes, as frozen tensors. Returns the prefix itself.

        An optimizer made before holds parameters that are no longer used.
        """
        if not self.folded:
            self.encoder, self.gate = FreePrefix(self._bank(), trainable=False), None
            self.config = replace(self.config, gate=False)  # it is in the bank
            self._cache = None
        return self

    def activate(self) -> None:
        """Makes this the prefix that the model attends to, of several that are attached to it."""
        self._attached().activate(self)

    @property
    def is_active(self) -> bool:
        return self._adapter is not None and self._adapter.prefix is self

    @torch.no_grad()
    def mass(self, *args: Any, **inputs: Any) -> Tensor:
        """The share of the softmax's weight that each query gives the prefix: `[N, B, H, L]`, float32, from 0 to 1.

        This is alpha in Prefix-Tuning+ (eq. 3), for each layer with a prefix; `inputs` are those of the model. The
        layers' queries must be as many everywhere: give `attentions` one kind for an encoder-decoder.
        """
        if not self.is_active:
            raise ValueError("the prefix is not the model's active one; call activate() first")
        self._masses = {}
        try:
            self._attached().model(*args, **inputs)
            found = [self._masses[slot] for slot in self.slots]
        finally:
            self._masses = None
        if len({t.shape for t in found}) > 1:
            raise ValueError(f"the layers' queries differ in number: {sorted({tuple(t.shape) for t in found})}")
        return torch.stack(found)

    def plot_mass(self, mass: Tensor, path: str | Path) -> None:
        """Draws what `mass` returned as a heat map, layers by heads, into the file `path`. Needs matplotlib."""
        from prefixattn.attach.heatmap import plot_mass

        names = [f"{kind} {layer}" for kind, count in self._geometry.kinds.items() for layer in range(count)]
        plot_mass(mass, path, [names[slot].removeprefix("self ") for slot in self.slots])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model runs as it did before `attach`, bit for bit.

        A backward through checkpointed layers belongs where their forward was: it runs the layers again.
        """
        with self._attached().disabled():
            yield

    def detach(self) -> None:
        """Gives the model back as it was before `attach`. The prefix keeps its parameters and can still be saved.

        One of share="simple" can then be saved unfolded only, as its keys and values are made with the model's layers;
        call `fold` before, to keep them.
        """
        self._attached().remove(self)
        self._adapter = None

    def save_pretrained(self, folder: str | Path, folded: bool = False) -> None:
        """Writes the prefix to `folder`: all that training needs to go on, or with `folded` keys and values only."""
        from prefixattn import checkpoint  # here, for the sake of installations without safetensors

        folded = folded or (self.folded and self.config.share != "none")
        gate = {} if self.gate is None else {"gate": self.gate}
        tensors = {"bank": self._bank()} if folded else {**self.encoder.state_dict(), **gate}
        config = replace(self.config, gate=self.config.gate and not folded)
        checkpoint.save(Path(folder), config, self._geometry, tensors, folded)

    @torch.no_grad()
    def restore(self, folder: str | Path) -> None:
        """Takes the values of a prefix that this one, or one of the same config, saved unfolded; for going on training.

        They are written into the parameters there are, so that an optimizer keeps them. Refused as a whole if anything
        does not fit.
        """
        from prefixattn import checkpoint

        config, encoder, gate = checkpoint.read(Path(folder), self._geometry, self._attached().defaults)
        found, own = dict(encoder.named_parameters()), dict(self.encoder.named_parameters())
        if config != self.config or {n: p.shape for n, p in found.items()} != {n: p.shape for n, p in own.items()}:
            raise ValueError(f"{folder} holds a prefix of {config}, expected one of {self.config}, unfolded")
        for name, parameter in own.items():
            parameter.copy_(found[name])
        if gate is not None and self.gate is not None:
            self.gate.copy_(gate)
        self._cache = None

    def export_peft(self, folder: str | Path) -> None:
        """Writes a PEFT prefix-tuning adapter to `folder`; it holds keys and values only, with the gate in them.

        PEFT shifts positions, has one length for all layers, and of an encoder-decoder a prefix in the decoder's
        self-attention alone; ValueError says what it cannot hold.
        """
        from prefixattn import peft

        peft.export(Path(folder), self.config, self._geometry, self._bank())

    def _bank(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self().detach().clone(memory_format=torch.contiguous_format)

    def _attached(self) -> Adapter:
        if self._adapter is None:
            raise ValueError("the prefix is detached from its model; attach a new one, or load a saved one")
        return self._adapter

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Prefix":
        self._cache = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}
