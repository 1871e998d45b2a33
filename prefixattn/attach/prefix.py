"""`Prefix`: the prefix on a model, from `attach` to `detach`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from prefixattn.config import PrefixConfig
from prefixattn.prefix import DeepShare, FreePrefix, Geometry, SimpleShare

LayerPrefix = tuple[Tensor, Tensor]  # key and value of one layer, [Hkv, P, D] each

_steps = 0  # of all optimizers of the process


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Adapter(Protocol):
    """What `Prefix` asks of the code that knows the model's class (prefixattn/attach/)."""

    geometry: Geometry

    def install(self, prefix: "Prefix") -> None: ...
    def remove(self) -> None: ...
    def disabled(self) -> AbstractContextManager[None]: ...
    def project(self, layer: int, vectors: Tensor) -> Tensor: ...
    def projection_parameters(self, layer: int) -> Iterable[Tensor]: ...


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
        # Plain attributes: were the model a submodule, its weights would be among the prefix's parameters.
        self._adapter: Adapter | None = adapter
        self._geometry = adapter.geometry
        self._cache: tuple[tuple[Any, ...], list[LayerPrefix]] | None = None

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a prefix."""
        return self.config.layer_indices(self._geometry.layers)

    @property
    def folded(self) -> bool:
        """True if only keys and values are left, with no network or projection to run."""
        return isinstance(self.encoder, FreePrefix)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The bank, `[N, 2, Hkv, P, D]`, in the parameters' own type or in `dtype`."""
        # The network is small beside the model and its output is what will be kept: it runs in its own type.
        device_type = next(self.encoder.parameters()).device.type
        with torch.autocast(device_type, enabled=False):
            if isinstance(self.encoder, DeepShare):
                return self.encoder(dtype)
            if isinstance(self.encoder, SimpleShare):
                return self.encoder(self._attached().project, self._projection_parameters(), dtype)
            bank = self.encoder()
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
        sources = list(self.sources())
        if any(t.is_inference() for t in sources):  # made in inference_mode: nothing tells when they change
            return self._split(dtype, device)
        # the count, because torch's fused optimizers leave no trace in a version
        key = (dtype, device, _steps, *((t.data_ptr(), t._version) for t in sources))
        if self._cache is None or self._cache[0] != key:
            # Not as inference tensors: a later pass may need to save them for a backward.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (key, self._split(dtype, device))
        return self._cache[1]

    def sources(self) -> Iterator[Tensor]:
        """What the bank is computed from, while the prefix is attached: its parameters, and weights of the model."""
        yield from self.parameters()
        if isinstance(self.encoder, SimpleShare) and self._adapter is not None:
            yield from self._projection_parameters()

    def _projection_parameters(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from self._attached().projection_parameters(layer)

    def _split(self, dtype: torch.dtype, device: torch.device) -> list[LayerPrefix]:
        bank = self(dtype).to(device)
        tensors = bank.flatten(0, 1).unbind(0)
        return list(zip(tensors[0::2], tensors[1::2], strict=True))

    def num_parameters(self, kept: bool = False) -> int:
        """Parameters being trained; with `kept`, the numbers that must be kept to use the prefix afterwards."""
        if kept:
            return len(self.layers) * 2 * self._geometry.kv_heads * self.config.length * self._geometry.head_dim
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def fold(self) -> "Prefix":
        """Drops the network and keeps the prefixes it makes, as frozen tensors. Returns the prefix itself.

        An optimizer made before holds parameters that are no longer used.
        """
        if not self.folded:
            self.encoder = FreePrefix(self._bank(), trainable=False)
            self._cache = None
        return self

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
        self._attached().remove()
        self._adapter = None

    def save_pretrained(self, folder: str | Path, folded: bool = False) -> None:
        """Writes the prefix to `folder`: all that training needs to go on, or with `folded` keys and values only."""
        from prefixattn import checkpoint  # here, for the sake of installations without safetensors

        folded = folded or (self.folded and self.config.share != "none")
        tensors = {"bank": self._bank()} if folded else self.encoder.state_dict()
        checkpoint.save(Path(folder), self.config, self._geometry, tensors, folded)

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
