"""`Prefix`: a prefix of keys and values on a model, from `attach` to `detach`."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.attach.base import Attached
from prefixattn.attach.records import Chosen, Host, LayerPrefix, asked
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.networks import DeepShare, DeepShares, FreePrefix, SimpleShare


class Prefix(Attached):
    """A trainable prefix on a frozen model. Made by `prefixattn.attach` and `prefixattn.load`.

    `parameters()` and `state_dict()` hold the prefix's own tensors only, and the model's never hold them. `train()` and
    `eval()` switch the prefix's dropout and leave the model's mode alone: the published GPT-2 runs train the prefix
    with the model in `eval()`, which is how `from_pretrained` returns it.
    """

    config: PrefixConfig

    def __init__(self, config: PrefixConfig, adapter: Host, encoder: nn.Module) -> None:
        super().__init__(config, adapter, encoder)
        slots = len(config.slots(adapter.geometry.kinds))
        dtype = next(encoder.parameters()).dtype  # a checkpoint has one type
        self.gate = nn.Parameter(torch.ones(slots, dtype=dtype)) if config.gate else None  # [N]
        self._cache: tuple[tuple[Any, ...], list[LayerPrefix]] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The prefix's length in each of those layers."""
        return self.config.lengths(len(self.slots))

    @property
    def folded(self) -> bool:
        """True if only keys and values are left, with no network or projection to run."""
        return isinstance(self.encoder, FreePrefix) and self.gate is None

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """Keys and values, `[N, 2, Hkv, P, D]`, in the parameters' own type or in `dtype`.

        Where values have another width Dv than keys, `[N, 1, Hkv, P, D + Dv]`: of each row its key, then its value.
        """
        # The network is small beside the model and its output is what will be kept: it runs in its own type.
        device_type = next(self.encoder.parameters()).device.type
        # there is no autocast on meta to switch off, and torch raises
        with nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False):
            if isinstance(self.encoder, (DeepShare, DeepShares)):
                kv = self.encoder(dtype)
            elif isinstance(self.encoder, SimpleShare):
                kv = self.encoder(self._attached().project, self._projection_parameters(), dtype)
            else:
                kv = self.encoder()
            if self.gate is not None:
                kv = kv * self.gate[:, None, None, None, None]
            return kv if dtype is None else kv.to(dtype)

    def choose(self, ids: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device) -> Chosen:
        """The prefixes of a forward pass of `batch` samples, for which the caller passed the prefix_ids `ids`."""
        self._refuse_ids(ids)
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
        state = self.state()
        if state is None:
            return self._split(dtype, device)
        key = (dtype, device, *state)
        if self._cache is None or self._cache[0] != key:
            # Not as inference tensors: a later pass may need to save them for a backward.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (key, self._split(dtype, device))
        return self._cache[1]

    def sources(self) -> Iterator[Tensor]:
        """What kv is computed from, while the prefix is attached: its parameters, and weights of the model."""
        yield from self.parameters()
        if isinstance(self.encoder, SimpleShare) and self._adapter is not None:
            yield from self._projection_parameters()

    def _projection_parameters(self) -> Iterator[Tensor]:
        for slot in self.slots:
            yield from self._attached().projection_parameters(slot)

    def _split(self, dtype: torch.dtype, device: torch.device) -> list[LayerPrefix]:
        kv = self(dtype).to(device)
        pairs = self._geometry.by_layer(kv, self.slots)
        if isinstance(self.config.length, int):
            return pairs
        return [(k[:, :n], v[:, :n]) for (k, v), n in zip(pairs, self.lengths, strict=True)]

    def num_parameters(self, kept: bool = False) -> int:
        """Parameters being trained; with `kept`, the numbers that must be kept to use the prefix afterwards."""
        if kept:
            sizes = [self._geometry.of(slot) for slot in self.slots]
            return sum(P * Hkv * (D + Dv) for P, (Hkv, D, Dv) in zip(self.lengths, sizes, strict=True))
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def fold(self) -> "Prefix":
        """Drops the network and keeps the prefixes it makes, as frozen tensors. Returns the prefix itself.

        An optimizer made before holds parameters that are no longer used.
        """
        if not self.folded:
            self.encoder, self.gate = FreePrefix(self._kv(), trainable=False), None
            self.config = replace(self.config, gate=False)  # it is in the keys and values
            self._cache = None
        return self

    @torch.no_grad()
    def mass(self, *args: Any, **inputs: Any) -> Tensor:
        """The share of the softmax's weight that each query gives the prefix: `[N, B, H, L]`, float32, from 0 to 1.

        This is alpha in Prefix-Tuning+ (eq. 3), for each layer with a prefix; `inputs` are those of the model. The
        layers' queries must be as many everywhere: give `attentions` one kind for an encoder-decoder.
        """
        if not self.is_active:
            raise ValueError("the prefix is not the model's active one; call activate() first")
        masses = asked.masses.setdefault(self, {})
        try:
            self._attached().model(*args, **inputs)
        finally:
            del asked.masses[self]
        if missing := [slot for slot in self.slots if slot not in masses]:
            raise ValueError(
                f"{len(missing)} of {len(self.slots)} layers with a prefix told no mass: they did not run, or in "
                "compiled code"
            )
        found = [masses[slot] for slot in self.slots]
        if len({t.shape for t in found}) > 1:
            raise ValueError(f"the layers' queries differ in number: {sorted({tuple(t.shape) for t in found})}")
        return torch.stack(found)

    def plot_mass(self, mass: Tensor, path: str | Path) -> None:
        """Draws what `mass` returned as a heat map, layers by heads, into the file `path`. Needs matplotlib."""
        from prefixattn.attach.heatmap import plot_mass

        names = [f"{kind} {layer}" for kind, count in self._geometry.kinds.items() for layer in range(count)]
        plot_mass(mass, path, [names[slot].removeprefix("self ") for slot in self.slots])

    def save_pretrained(self, folder: str | Path, folded: bool = False) -> None:
        """Writes the prefix to `folder`: all that training needs to go on, or with `folded` keys and values only."""
        from prefixattn.prefixes import checkpoint  # here, for the sake of installations without safetensors

        folded = folded or (self.folded and self.config.share != "none")
        gate = {} if self.gate is None else {"gate": self.gate}
        tensors = {"bank": self._kv()} if folded else {**self.encoder.state_dict(), **gate}
        config = replace(self.config, gate=self.config.gate and not folded)
        checkpoint.save(Path(folder), config, self._geometry, tensors, folded)

    def export_peft(self, folder: str | Path) -> None:
        """Writes a PEFT prefix-tuning adapter to `folder`; it holds keys and values only, with the gate in them.

        What `save_pretrained` wrote there stays, and is what `load` reads; an adapter is replaced.
        PEFT shifts positions, has one length for all layers, and of an encoder-decoder a prefix in the decoder's
        self-attention alone; ValueError says what it cannot hold.
        """
        from prefixattn.prefixes import peft

        peft.export(Path(folder), self.config, self._geometry, self._kv())

    def to_cache(self, batch: int = 1, *, prefix_ids: Tensor | None = None, tokens: int | None = None) -> Any:
        """A cache that holds the prefix for seen tokens, with which plain transformers serves it.

        The model that takes it may be any copy without a prefix. The cache grows as it is used, so each call of
        `generate` needs its own::

            mask = torch.cat([mask.new_ones(batch, P), mask], 1)  # [B, P + S]
            plain.generate(ids, attention_mask=mask, past_key_values=prefix.to_cache(batch))

        An encoder-decoder needs no such mask. With a prefix in its cross-attention the encoder's input can have no
        padding: a mask of it has no columns for the prefix, and transformers raises. Before it returns, some tokens are
        run with the prefix and with the cache, under `disabled`: no other thread may run the model meanwhile.

        Args:
            batch: B, the samples that are to be served together (times the beams).
            prefix_ids: Of a `PrefixBank`, in place of `batch`: int64 [B], prefixes of one length.
            tokens: The most tokens that will follow the prefix in a sample; to be given where layers have a sliding
                window, out of which a cache slides and a prefix slides only with prefix_in_window.

        Returns:
            A `DynamicCache`, or an `EncoderDecoderCache`, with keys and values [B, Hkv, P, D] in each layer, in the
            model's type and on the layers' devices, without gradients.

        Raises:
            ValueError: a cache does not hold this prefix: it is in the encoder, not in all layers, of several lengths,
                or its positions are not those that a cache implies ("shifted"; "unshifted" in cross-attention alone);
                or it would slide out of a window.
            NotImplementedError: the model has no cache, or makes something else of it.
        """
        config, rows = self._served(batch, prefix_ids)
        from prefixattn.attach.hf import cache  # here, for installations without transformers

        return cache.make(self._attached(), config, rows, tokens)

    def export_cache(self, folder: str | Path, *, tokens: int | None = None) -> None:
        """Writes ``prefix_cache.safetensors`` to `folder`, the tensors of `to_cache`, for engines that preload a cache.

        ``layers.{l}.key`` and ``layers.{l}.value`` are ``[Hkv, P, D]`` in the model's type, of layer l's
        self-attention (of an encoder-decoder its decoder's), and ``cross.layers.{l}.key`` and ``.value`` of its
        cross-attention. Keys are used as they are: a prefix is not rotated. Self-attention's rows take the positions 0
        to P - 1. The file's metadata have this layout in words, its "format", "length" (P) and "model_type". The file
        is replaced as a whole. `tokens` and errors are those of `to_cache`.
        """
        config, rows = self._served(1, None)
        from prefixattn.attach.hf import cache

        cache.export(Path(folder), self._attached(), config, rows, tokens)

    def _served(self, batch: int, ids: Tensor | None) -> tuple[PrefixConfig, Tensor]:
        """The keys and values that a cache holds, [B, *kv], and the config of such a prefix."""
        self._refuse_uncached()
        self._refuse_ids(ids)
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch is {batch!r}, expected an integer from 1")
        return self.config, self._kv().expand(batch, -1, -1, -1, -1, -1)

    def _refuse_uncached(self) -> None:
        if not self._attached().caches:
            raise NotImplementedError("to_cache and export_cache are for models of transformers; others have no cache")

    def _kv(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self().detach().clone(memory_format=torch.contiguous_format)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Prefix":
        self._cache = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}
