"""`PrefixPlus`: Prefix-Tuning+ on a model, from `attach` to `detach`."""

from pathlib import Path

import torch
from torch import Tensor

from prefixattn.attach.base import Attached
from prefixattn.attach.records import Chosen, Host
from prefixattn.prefixes.plus import Memories, Memory, PrefixPlusConfig


class PrefixPlus(Attached):
    """Matrices that add ``phi(q) @ M`` to the attention output of a frozen model's layers. Made by `attach` and `load`.

    As of a `Prefix`, `parameters()` and `state_dict()` hold its own tensors only.
    """

    config: PrefixPlusConfig
    encoder: Memories

    def __init__(self, config: PrefixPlusConfig, adapter: Host, encoder: Memories) -> None:
        super().__init__(config, adapter, encoder)

    def forward(self, dtype: torch.dtype | None = None) -> list[Memory]:
        """What each layer of `slots` adds, in the parameters' own type or in `dtype`."""
        made: list[Memory] = self.encoder(dtype)
        return made

    def choose(self, ids: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device) -> Chosen:
        self._refuse_ids(ids)
        return Chosen([], 0, memories=[memory.to(device) for memory in self(dtype)])

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the matrices to `folder`; `prefixattn.load` reads them."""
        from prefixattn.prefixes import checkpoint  # here, for the sake of installations without safetensors

        checkpoint.save(Path(folder), self.config, self._geometry, self.encoder.state_dict(), folded=False)
