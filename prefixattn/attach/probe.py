"""Which layers of a Hugging Face model attend, and with what sizes: found by running one token or one image."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefixattn.attach import interface
from prefixattn.attach.adapter import evaluating

_CROSS = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn")


class Site(NamedTuple):
    path: str  # of the attention module, from the base model on
    kind: str  # "self", or "encoder", "decoder", "cross"
    heads: int  # H
    kv_heads: int
    head_dim: int


def example(base: Any, ids: list[int]) -> dict[str, Tensor | bool]:
    """The inputs of a forward pass of `base` on the tokens `ids`, or on one black image."""
    config, name, device = base.config, base.main_input_name, base.device
    if name == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.zeros(1, config.num_channels, height, width, device=device, dtype=base.dtype)}
    if name != "input_ids":
        raise NotImplementedError(
            f"{type(base).__name__} takes {name}; attach tries a model with tokens (input_ids) or images (pixel_values)"
        )
    tokens = torch.tensor([ids], device=device)
    inputs: dict[str, Tensor | bool] = {name: tokens}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if "use_cache" in interface.arguments(base):
        inputs["use_cache"] = False
    return inputs


def run(base: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[interface.Watched]]:
    """A forward pass in evaluation mode: the last hidden states, and the calls of attention."""
    with evaluating(base), torch.no_grad(), interface.watched() as calls:
        try:
            out = base(**inputs)
        except NotImplementedError:
            raise
        except Exception as error:  # whatever a model does that has never met another attention
            raise NotImplementedError(
                f"{type(base).__name__} does not run with the attention that reads a prefix: "
                f"{type(error).__name__}: {error}"
            ) from error
    hidden = getattr(out, "last_hidden_state", None)
    return (out[0] if hidden is None else hidden), calls


def sites(base: Any, calls: list[interface.Watched]) -> list[Site]:
    """The layers of `calls`, those of each kind together."""
    if not calls:
        raise NotImplementedError(
            f"attach does not know {type(base).__name__}: none of its layers calls transformers' attention interface"
        )
    paths = {module: path for path, module in base.named_modules()}
    if lost := [paths[call.module] for call in calls if not call.carried]:
        raise NotImplementedError(
            f"attach cannot reach the layers of {type(base).__name__}: {lost[0]} does not get, or does not pass on, "
            "the keyword arguments of the model's forward pass"
        )
    found: dict[str, list[Site]] = {}
    for call in calls:
        path = paths[call.module]
        site = Site(path, _kind(path, base), call.heads, call.key.shape[1], call.key.shape[3])
        if all(site.path != known.path for known in found.setdefault(site.kind, [])):
            found[site.kind].append(site)
    flat = [site for kind in ("self", "encoder", "decoder", "cross") for site in found.get(kind, [])]
    sizes = {(site.heads, site.kv_heads, site.head_dim) for site in flat}
    if len(sizes) > 1:
        spelled = ", ".join(f"H={h} Hkv={g} D={d}" for h, g, d in sorted(sizes))
        raise NotImplementedError(
            f"the layers of {type(base).__name__} differ in size ({spelled}); expected one for all"
        )
    return flat


def _kind(path: str, base: nn.Module) -> str:
    config: Any = base.config
    if not config.is_encoder_decoder:
        return "self"
    if any(word in path for word in _CROSS):
        return "cross"
    return "encoder" if "encoder" in path.split(".") else "decoder"
