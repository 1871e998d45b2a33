"""`Prefix`: the prefix on a model, from `attach` to `detach`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from prefixattn.attach.adapter import Adapter
from prefixattn.config import PrefixConfig
from prefixattn.prefix import DeepShare, DeepShares, FreePrefix, Geometry, SimpleShare

LayerPrefix = tuple[Tensor, Tensor]  # key and value of one layer, [Hkv, P, D] each


class PrefixCall(NamedTuple):
    """What one forward of the model passes to its attention layers."""

    prefixes: dict[int, LayerPrefix]  # slot -> key, value [Hkv, P, D], or a bank's [T, Hkv, P, D]
    dropout_p: float
    ids: Tensor | None = None  # [B], rows of the bank
    lengths: Tensor | None = None  # [T]
    masses: dict[int, Tensor] | None = None  # where the softmax's weight on the prefix is wanted: slot -> [B, H, L]


_steps = 0  # of all optimizers of the process


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


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
        self.gate = nn.Parameter(torch.ones(slots)) if config.gate else None  # [N]
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
        state = self.state()
        if state is None:
            return self._split(dtype, device)
        key = (dtype, device, *state)
        if self._cache is None or self._cache[0] != key:
            # Not as inference tensors: a later pass may need to save them for a backward.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (key, self._split(dtype, device))
        return self._cache[1]

    def state(self) -> tuple[Any, ...] | None:
        """What changes when the bank does, or None if nothing tells: of tensors that were made in inference_mode."""
        sources = list(self._sources())
        if any(t.is_inference() for t in sources):
            return None
        # the count, because torch's fused optimizers leave no trace in a version
        return (_steps, *((t.data_ptr(), t._version) for t in sources))

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

    def call(self, found: list[LayerPrefix], ids: Tensor | None) -> PrefixCall:
        """What the layers of the model get with a forward pass."""
        if ids is not None:
            raise ValueError("prefix_ids chooses among the prefixes of a PrefixBank; the active prefix is a single one")
        dropout_p = self.config.dropout if self.training else 0.0
        return PrefixCall(dict(zip(self.slots, found, strict=True)), dropout_p, masses=self._masses)

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

    def export_peft(self, folder: str | Path) -> None:
        """Writes a PEFT prefix-tuning adapter to `folder`; it holds keys and values only."""
        from prefixattn import checkpoint

        checkpoint.export_peft(Path(folder), self.config, self._geometry, self._bank())

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
