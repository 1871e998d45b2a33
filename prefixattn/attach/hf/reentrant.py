"""Prefixes for layers under reentrant gradient checkpoints, each of which runs a backward of its own.

Such a backward would run the graph of the network behind the prefix once per layer and free it after the first.
Instead the layers accumulate into leaves, and a gate at the model's inputs, whose backward comes after all of theirs,
passes the sums on.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Gate(torch.autograd.Function):
    """Passes the model's inputs on; its backward hands the leaves' gradients to what made the prefixes."""

    @staticmethod
    def forward(ctx: Any, leaves: list[Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.leaves = leaves
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *dinputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return None, None, *dinputs, *grads


def needed(base: nn.Module) -> bool:
    """True if a layer of the model is under a reentrant checkpoint."""
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            return bool(keywords.get("use_reentrant", True))
    return False


def behind(base: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> list[Tensor]:
    """Leaves in place of `outputs`, with the gate put before the inputs in `kwargs`."""
    if not any(t.requires_grad for t in outputs):
        return outputs
    leaves = [t.detach().requires_grad_() for t in outputs]
    for ids, embeds in (("input_ids", "inputs_embeds"), ("decoder_input_ids", "decoder_inputs_embeds")):
        if kwargs.get(ids) is not None:
            tokens = kwargs.pop(ids)
            if tokens.ndim != 2:
                raise NotImplementedError(f"{ids} of shape {tuple(tokens.shape)} with reentrant checkpoints")
            kwargs[embeds] = base.get_input_embeddings()(tokens)
    names = [n for n in ("inputs_embeds", "decoder_inputs_embeds", "pixel_values") if kwargs.get(n) is not None]
    gated = _Gate.apply(leaves, len(names), *(kwargs[n] for n in names), *outputs)
    kwargs.update(zip(names, gated, strict=True))
    return leaves
