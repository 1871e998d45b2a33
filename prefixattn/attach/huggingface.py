"""`HuggingFaceAdapter`: a prefix into a model whose layers call transformers' attention interface."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.attach.interface import NAME, PrefixCall
from prefixattn.attach.prefix import LayerPrefix, Prefix
from prefixattn.prefix import Geometry


class _PrefixGate(torch.autograd.Function):
    """Passes hidden states on; its backward, the last of the model's, hands the leaves' gradients to the network."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        grads = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return dhidden, None, *grads


class HuggingFaceAdapter:
    """Freezes a model, has its layers attend through `interface.py`, and undoes both.

    A subclass for a model class says its `geometry`, how a layer projects a vector, and where its blocks are.
    """

    geometry: Geometry

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        # Any: a module's attributes are known to no type checker.
        self.model: nn.Module = model
        self.base: Any = base
        # The names of positional arguments, for callers that pass them so.
        self.names = tuple(inspect.signature(type(base).forward).parameters)[1:]
        self.prefix: Prefix | None = None
        self.active = True
        self.handle: Any = None
        self.implementation: str | None = None
        self.flags: dict[str, bool] = {}

    def project(self, layer: int, vectors: Tensor) -> Tensor:
        raise NotImplementedError

    def projection_parameters(self, layer: int) -> Iterator[Tensor]:
        raise NotImplementedError

    def activations(self, ids: list[int]) -> Tensor:
        raise NotImplementedError

    def blocks(self) -> Any:
        raise NotImplementedError

    @property
    def max_positions(self) -> int:
        raise NotImplementedError

    def install(self, prefix: Prefix) -> None:
        self.prefix = prefix
        # Models built from one config object share it; the attention implementation is this model's alone.
        own, shared = copy.deepcopy(self.base.config), self.base.config
        for module in self.model.modules():
            if module.__dict__.get("config") is shared:
                module.config = own
        self.implementation = own._attn_implementation
        own._attn_implementation = NAME
        self.flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.model.requires_grad_(False)
        self.handle = self.base.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def remove(self) -> None:
        self.handle.remove()
        self.base.config._attn_implementation = self.implementation
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
        self.prefix = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before = self.active, self.base.config._attn_implementation
        self.active, self.base.config._attn_implementation = False, self.implementation
        try:
            yield
        finally:
            self.active = before[0]
            if self.prefix is not None:  # else it was detached inside, and the model is as it was before
                self.base.config._attn_implementation = before[1]

    def before_forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward pre-hook: computes the prefixes and shifts the positions."""
        prefix = self.prefix
        if not self.active or prefix is None:
            return None
        implementation = self.base.config._attn_implementation
        if implementation != NAME:
            raise ValueError(
                f"the model's attention implementation was set to {implementation!r} after attach, and would leave out "
                f"the prefix; expected {NAME!r}: call set_attn_implementation before attach, or detach() the prefix"
            )
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return None  # the model itself says what is missing
        if kwargs.get("output_attentions"):
            raise NotImplementedError("output_attentions: attention with a prefix never makes its weights")
        batch, length = tokens.shape[0], tokens.shape[1]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if cache is None and mask is not None and mask.ndim == 2 and mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {length} tokens; a prefix takes no column of it"
            )
        if mask is None and cache is None and kwargs.get("position_ids") is None and torch.compiler.is_compiling():
            # While tracing, transformers cannot see that nothing is packed and would build [B, 1, L, S].
            kwargs["attention_mask"] = tokens.new_ones(1, 1, dtype=torch.bool).expand(batch, length)
        if prefix.config.positions == "shifted":
            kwargs["position_ids"] = self._shifted(kwargs.get("position_ids"), cache, length, tokens.device)
        found = prefix.layer_prefixes(self._dtype(tokens.device), tokens.device)
        if torch.is_grad_enabled() and self._reentrant_checkpoints():
            found = self._behind_gate(found, kwargs)
        dropout_p = prefix.config.dropout if prefix.training else 0.0
        kwargs["prefix_call"] = PrefixCall(dict(zip(prefix.layers, found, strict=True)), dropout_p)
        return (), kwargs

    def _shifted(self, positions: Tensor | None, cache: Any, length: int, device: torch.device) -> Tensor:
        assert self.prefix is not None
        shift = self.prefix.config.length
        if positions is None:
            past = cache.get_seq_length() if cache is not None else 0
            positions = (torch.arange(length, device=device) + past)[None]
        positions = positions + shift
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            last = int(positions.max()) if positions.numel() else 0
            if last >= self.max_positions:
                raise ValueError(
                    f"position {last} is past the model's {self.max_positions} positions, {shift} of which the prefix "
                    f"takes; shorten the input or use positions='unshifted'"
                )
        return positions

    def _dtype(self, device: torch.device) -> torch.dtype:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        dtype: torch.dtype = self.base.dtype
        return dtype

    def _reentrant_checkpoints(self) -> bool:
        block = self.blocks()[0]
        if not (getattr(block, "gradient_checkpointing", False) and block.training):
            return False
        keywords = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
        return bool(keywords.get("use_reentrant", True))

    def _behind_gate(self, found: list[LayerPrefix], kwargs: dict[str, Any]) -> list[LayerPrefix]:
        """Cuts the prefixes off the network's graph, for checkpoints that run a backward of their own per layer.

        Such a backward would run the network's graph once per layer and free it after the first. Instead the layers
        accumulate into leaves, and the gate, whose backward comes after all of theirs, passes the sums on.
        """
        outputs = [t for pair in found for t in pair]
        if not any(t.requires_grad for t in outputs):
            return found
        leaves = [t.detach().requires_grad_() for t in outputs]
        hidden = kwargs.get("inputs_embeds")
        if hidden is None:
            ids = kwargs.pop("input_ids")
            if ids.ndim != 2:
                raise NotImplementedError(f"input_ids of shape {tuple(ids.shape)} with reentrant checkpoints")
            hidden = self.base.get_input_embeddings()(ids)
        kwargs["inputs_embeds"] = _PrefixGate.apply(hidden, leaves, *outputs)
        return list(zip(leaves[0::2], leaves[1::2], strict=True))
