"""From a backward pass to `.grad`."""

from collections.abc import Callable

import torch
from torch import Tensor

from prefixattn.optim.gradient import LazyGradient, lazy
from prefixattn.optim.source import Parameters, Source, Value
from prefixattn.reparam.call import Form


@torch.no_grad()
def deliver(
    parameters: Parameters,
    z: Tensor,  # [G, P, M], of the forward pass
    dbank: Tensor,  # [N, 2, Hkv, P, D], any float type; is kept and added to
    form: Form,
    before_reading: Callable[[], None],
    backend: str = "auto",
) -> None:
    """Adds the gradient of one backward pass to `.grad` of the parameters that want one.

    Micro-batches of one forward pass, which have one z, are summed in one.
    """
    wanting = [(index, p) for index, p in enumerate(parameters) if p is not None and p.requires_grad]
    source = _shared([p for _, p in wanting], z)
    if source is not None:
        source.add(dbank)
        return
    source = Source(parameters, z, dbank, form, before_reading, backend)
    for index, p in wanting:
        if isinstance(p.grad, LazyGradient):
            p.grad.value.parts.append((source, 1.0))
        else:
            p.grad = lazy(p, Value([(source, 1.0)], p.grad), index)


def _shared(wanting: list[Tensor], z: Tensor) -> Source | None:
    """The source of this z that is the last part of every gradient, and that none of them has scaled."""
    last = []
    for p in wanting:
        parts = p.grad.value.parts if isinstance(p.grad, LazyGradient) else []
        if not parts or not isinstance(parts[-1][1], float) or parts[-1][1] != 1:
            return None
        last.append(parts[-1][0])
    return last[0] if last and all(s is last[0] for s in last) and last[0].z is z else None
