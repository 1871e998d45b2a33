"""What is attached to a model: the base of `Prefix` and `PrefixPlus`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.attach import copies
from prefixattn.attach.records import Chosen, Host, PrefixCall, asked
from prefixattn.attach.training import steps, watched
from prefixattn.optim.processes import Average
from prefixattn.prefixes.geometry import Geometry


class Attached(nn.Module):
    """Something trainable on a frozen model, with parameters of its own."""

    config: Any
    encoder: nn.Module

    def __init__(self, config: Any, adapter: Host, encoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        # Plain attributes: were the model a submodule, its weights would be among the prefix's parameters.
        self._adapter: Host | None = adapter
        self._geometry = adapter.geometry
        self._origin: copies.Origin | None = None  # of one that was copied with its model

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def slots(self) -> tuple[int, ...]:
        """The layers that have a prefix, counted through all kinds of attention of the model."""
        return self.config.slots(self._geometry.kinds)

    @property
    def process_group(self) -> Any:
        """Of the processes that train it together and average its gradients.

        None: all, if torch.distributed is initialized; False: this one alone; or a torch ProcessGroup.
        """
        return self.average.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self.average.group = group

    @property
    def average(self) -> Average:
        """What averages its gradients over processes."""
        return watched(self).average

    def sources(self) -> Iterator[Tensor]:
        """What it is made of: its parameters, and perhaps weights of the model."""
        yield from self.parameters()

    def state(self) -> tuple[Any, ...] | None:
        """What changes when that does, or None if nothing tells: of tensors that were made in inference_mode."""
        sources = list(self.sources())
        if any(t.is_inference() for t in sources):
            return None
        # the count, because torch's fused optimizers leave no trace in a version
        return (steps(), *((t.data_ptr(), t._version) for t in sources))

    def begin(self) -> None:
        """Before a forward pass of the model chooses: several processes begin a training with the same numbers.

        In the first pass with gradients they wait for each other.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.average.start()

    def choose(self, ids: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device) -> Chosen:
        """What a forward pass of `batch` samples gets, for which the caller passed the prefix_ids `ids`."""
        raise NotImplementedError

    @staticmethod
    def _refuse_ids(ids: Tensor | None) -> None:
        if ids is not None:
            raise ValueError("prefix_ids chooses among the prefixes of a PrefixBank; the active prefix is a single one")

    def call(self, chosen: Chosen) -> PrefixCall:
        """What the layers of the model get with a forward pass."""
        if self._origin is not None and not torch.compiler.is_compiling():
            self._check_origin(self._origin)
        dropout_p = getattr(self.config, "dropout", 0.0) if self.training else 0.0
        # one of the two is empty
        prefixes, memories = dict(zip(self.slots, chosen.prefixes)), dict(zip(self.slots, chosen.memories))  # noqa: B905
        masses = None if torch.compiler.is_compiling() else asked.masses.get(self)
        return PrefixCall(prefixes, dropout_p, chosen.prefix_ids, chosen.lengths, masses, chosen.shift, memories)

    def activate(self) -> None:
        """Makes this the prefix that the model attends to, of several that are attached to it."""
        self._origin = None
        self._attached().activate(self)

    @property
    def is_active(self) -> bool:
        return self._adapter is not None and self._adapter.prefix is self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model runs as it did before `attach`, bit for bit.

        Of a timm model that is so in the caller's thread alone. A transformers model is disabled for all threads, so
        none may be in the middle of a pass when this begins or ends; `detach` of the last prefix is no different.
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes to `folder` all that training needs to go on; `prefixattn.load` reads it."""
        raise NotImplementedError

    @torch.no_grad()
    def restore(self, folder: str | Path) -> None:
        """Takes the values of a prefix that this one, or one of the same config, saved unfolded; for going on training.

        They are written into the parameters there are, so that an optimizer keeps them. Refused as a whole if anything
        does not fit.
        """
        from prefixattn.prefixes import checkpoint  # here, for the sake of installations without safetensors

        config, encoder, gate = checkpoint.read(Path(folder), self._geometry, self._attached().defaults)
        found, own = dict(encoder.named_parameters()), dict(self.encoder.named_parameters())
        if config != self.config or {n: p.shape for n, p in found.items()} != {n: p.shape for n, p in own.items()}:
            raise ValueError(f"{folder} holds a prefix of {config}, expected one of {self.config}, unfolded")
        for name, parameter in own.items():
            parameter.copy_(found[name])
        if gate is not None and isinstance(own_gate := getattr(self, "gate", None), Tensor):
            own_gate.copy_(gate)

    def _check_origin(self, origin: copies.Origin) -> None:
        if not origin.check(self, self._attached().model):
            self._origin = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attached":
        return copies.copied(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_origin": None}

    def _attached(self) -> Host:
        if self._adapter is None:
            raise ValueError("the prefix is detached from its model; attach a new one, or load a saved one")
        return self._adapter
