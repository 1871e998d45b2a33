"""What a new prefix starts from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.networks import DeepShare, FreePrefix, PrefixRows, SimpleShare

NEAR = 1e-4
FIT_STEPS, FIT_LR = 500, 1e-2  # Li & Liang's low-data runs: 500 steps of Adam on the squared error


def initialise(encoder: nn.Module, config: PrefixConfig, bound: float, activations: Tensor | None) -> None:
    """Sets `encoder` as config.init says.

    Args:
        bound: Of init="uniform".
        activations: Keys and values of a text, as kv in networks.py,, if init is one.
    """
    if activations is not None:
        if isinstance(encoder, FreePrefix):
            encoder.bank = nn.Parameter(activations)
        elif isinstance(encoder, PrefixRows):
            encoder.weight = nn.Parameter(activations.flatten().repeat(len(encoder.weight), 1))
        else:
            _fit(encoder, activations)
        return
    for part in encoder.modules():
        if config.init == "zero" and isinstance(part, DeepShare):
            # zero embeddings alone would leave the biases' output; a zero network still learns, from its last layer on
            nn.init.zeros_(part.up.weight)
            nn.init.zeros_(part.up.bias)
        elif isinstance(part, (DeepShare, FreePrefix, PrefixRows, SimpleShare)):
            start(_rows(part), config.init, bound)


def start(rows: Tensor, init: object, bound: float) -> None:
    """ "normal" leaves the rows as they were made, so that a seed gives the numbers that it gives torch's modules."""
    with torch.no_grad():
        if init == "uniform":
            rows.uniform_(-bound, bound)
        elif init == "zero":
            rows.zero_()


def _rows(part: DeepShare | FreePrefix | PrefixRows | SimpleShare) -> Tensor:
    """What share trains in place of keys and values."""
    if isinstance(part, FreePrefix):
        return part.bank
    if isinstance(part, PrefixRows):
        return part.weight
    rows: Tensor = part.vectors if isinstance(part, SimpleShare) else part.embedding.weight
    return rows


def _fit(encoder: nn.Module, target: Tensor) -> None:
    """Trains the network until it makes `target` to NEAR of its mean square, or for FIT_STEPS steps."""
    from prefixattn.optim import FactoredAdamW

    optimizer = FactoredAdamW(encoder, lr=FIT_LR, weight_decay=0.0)
    enough = NEAR * target.square().mean().item()
    with torch.enable_grad():
        for _ in range(FIT_STEPS):
            optimizer.zero_grad()
            loss = F.mse_loss(encoder(target.dtype), target)
            if loss.item() <= enough:
                break
            loss.backward()
            optimizer.step()
