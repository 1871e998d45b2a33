"""`combine`: one prefix made of several."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.attach.adapter import making
from prefixattn.attach.find import make_adapter
from prefixattn.attach.prefix import Prefix
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import FreePrefix

HOWS = ("concatenate", "average")


@making()
def combine(
    model: nn.Module,
    prefixes: Sequence[Prefix],
    how: str = "concatenate",
    weights: Sequence[float] | None = None,
) -> Prefix:
    """Attaches a new trainable prefix, of share="none", made of the keys and values of several.

    Args:
        model: The model that gets it; it becomes the active one of those that are there. The others are left alone.
        prefixes: At least one; attached to `model` or to another of its sizes, or detached. They have the same layers
            and the same `positions` and `prefix_in_window`. Gates are in the keys and values; dropout is not
            taken over.
        how: "concatenate": the rows of all, in each layer one prefix after the other. An order that means nothing to
            attention; but positions="shifted" lets the sequence begin after all rows, further on than each prefix
            learned it, as if all prefixes were tokens read before. "average": the mean of keys and values that stand
            in the same row, of prefixes with the same lengths.
        weights: Of how="average": what each prefix counts, divided by their sum; all the same if None.

    Returns:
        The prefix. Its `config.length` is a list where layers differ.
    """
    if how not in HOWS:
        raise ValueError(f"how is {how!r}, expected {' or '.join(map(repr, HOWS))}")
    adapter = make_adapter(model)
    _check(prefixes, adapter.geometry)
    shares = _shares(prefixes, how, weights)
    first = prefixes[0]
    with torch.inference_mode(False), torch.no_grad():
        kvs = _alike([prefix() for prefix in prefixes], adapter.device)
        if how == "average":
            lengths = first.lengths
            kv = torch.stack([w * kv for w, kv in zip(shares, kvs, strict=True)]).sum(0)
        else:
            lengths = tuple(sum(n) for n in zip(*(p.lengths for p in prefixes), strict=True))
            kv = _concatenated(prefixes, kvs, max(lengths))
    config = PrefixConfig(
        length=lengths[0] if len(set(lengths)) == 1 else lengths,
        share="none",
        layers=first.config.layers,
        attentions=first.config.attentions,
        positions=first.config.positions,
        prefix_in_window=first.config.prefix_in_window,
    )
    prefix = Prefix(adapter.resolve(config), adapter, FreePrefix(kv))
    adapter.install(prefix)
    return prefix


def _check(prefixes: Sequence[Prefix], geometry: Geometry) -> None:
    if isinstance(prefixes, Prefix) or not prefixes or not all(isinstance(p, Prefix) for p in prefixes):
        given = type(prefixes).__name__
        if isinstance(prefixes, (list, tuple)):
            given = f"[{', '.join(type(p).__name__ for p in prefixes)}]"
        raise ValueError(f"prefixes is {given}, expected a list of at least one Prefix")
    first = prefixes[0]
    for i, prefix in enumerate(prefixes):
        if prefix.geometry != geometry:
            raise ValueError(f"prefixes[{i}] is of a model {prefix.geometry}, expected {geometry}")
        if prefix.slots != first.slots:
            raise ValueError(f"prefixes[{i}] is in layers {prefix.slots}, expected those of the first, {first.slots}")
        for name in ("positions", "prefix_in_window"):
            mine, firsts = getattr(prefix.config, name), getattr(first.config, name)
            if mine != firsts:
                raise ValueError(f"prefixes[{i}] has {name}={mine!r}, expected the first's, {firsts!r}")


def _shares(prefixes: Sequence[Prefix], how: str, weights: Sequence[float] | None) -> list[float]:
    """What each prefix counts, adding up to 1."""
    if how != "average":
        if weights is not None:
            raise ValueError(f"weights is {weights!r} with how={how!r}; they are of how='average'")
        return []
    for i, prefix in enumerate(prefixes):
        if prefix.lengths != prefixes[0].lengths:
            raise ValueError(
                f"prefixes[{i}] has lengths {prefix.lengths}, expected the first's, {prefixes[0].lengths}: "
                "how='average' needs the same rows; how='concatenate' does not"
            )
    given: Any = [1.0] * len(prefixes) if weights is None else weights
    listed = isinstance(given, (list, tuple)) and len(given) == len(prefixes)
    if not listed or not all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in given) or not sum(given):
        raise ValueError(f"weights is {weights!r}, expected {len(prefixes)} finite numbers from 0, not all of them 0")
    return [w / sum(given) for w in given]


def _alike(kvs: list[Tensor], device: torch.device) -> list[Tensor]:
    dtype = kvs[0].dtype
    for kv in kvs:
        dtype = torch.promote_types(dtype, kv.dtype)
    return [kv.to(device, dtype) for kv in kvs]


def _concatenated(prefixes: Sequence[Prefix], kvs: list[Tensor], longest: int) -> Tensor:
    """The kv, zero past a layer's own rows."""
    N, pair, Hkv, _, D = kvs[0].shape
    out = kvs[0].new_zeros(N, pair, Hkv, longest, D)
    for slot in range(N):
        rows = torch.cat([kv[slot, :, :, : p.lengths[slot]] for p, kv in zip(prefixes, kvs, strict=True)], 2)
        out[slot, :, :, : rows.shape[2]] = rows
    return out
