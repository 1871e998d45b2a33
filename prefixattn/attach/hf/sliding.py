"""Prefixes that slide out of the windows of a decoder's layers: `prefix_in_window` of a config."""

from collections.abc import Sequence
from typing import Any

import torch

from prefixattn.attach.hf.probe import Site
from prefixattn.attach.records import PrefixCall


def windows(sites: Sequence[Site]) -> dict[int, int]:
    """By slot, how many keys the layers see that do not see all."""
    return {slot: site.window for slot, site in enumerate(sites) if site.window is not None}


def possible(found: dict[int, int], config: Any) -> bool | None:
    """Whether a prefix can slide out of windows; None if the config has some that no mask told of."""
    if found:
        return True
    types = getattr(config, "layer_types", None)
    told = getattr(config, "sliding_window", None) is not None if types is None else "sliding_attention" in types
    return None if told else False


def placed(call: PrefixCall, config: Any, found: dict[int, int], kwargs: dict[str, Any]) -> PrefixCall:
    """The call of a pass with the arguments `kwargs`; its prefix lies in the windows `found` if the config says so."""
    if not getattr(config, "prefix_in_window", False):
        return call
    cache = kwargs.get("past_key_values")
    if cache is None:
        return call._replace(windows=found)
    slides = list(getattr(cache, "is_sliding", ()))
    seen = cache.get_seq_length(slides.index(True) if True in slides else 0)
    # of a sliding layer's cache it is a number on the host
    return call._replace(windows=found, seen=int(seen) if isinstance(seen, torch.Tensor) else seen)
