"""`HuggingFaceAdapter`: prefixes into a model whose layers call transformers' attention interface."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefixattn.attach import gate, interface, probe, projections, quantised
from prefixattn.attach.adapter import Adapter
from prefixattn.attach.attached import PrefixCall
from prefixattn.attach.interface import NAME
from prefixattn.config import Defaults
from prefixattn.prefix import Geometry


class HuggingFaceAdapter(Adapter):
    """Any transformers model whose layers call the attention interface and pass it their keyword arguments."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        super().__init__(model, base)
        self.names = interface.arguments(base)  # for callers that pass them by position
        self.handles: list[Any] = []
        self.implementations: list[tuple[Any, str | None]] = []
        self.unpacked: list[nn.Module] = []
        self.override: PrefixCall | None = None
        self.shift: int | Tensor = 0  # of the decoder's forward pass that is running
        self.enter()
        try:
            _, calls = probe.run(base, {**probe.example(base, [1]), "prefix_call": PrefixCall({}, 0.0)})
            self.sites = probe.sites(base, calls)
        finally:
            self.leave()
        kinds: dict[str, int] = {}
        for site in self.sites:
            kinds[site.kind] = kinds.get(site.kind, 0) + 1
        first = self.sites[0]
        config = self.base.config.get_text_config()
        if base.main_input_name == "pixel_values":
            config = getattr(self.base.config, "vision_config", self.base.config)
        self.geometry = Geometry(
            config.model_type, len(self.sites), first.kv_heads, first.head_dim, config.hidden_size, kinds, first.heads
        )
        self.defaults = self._defaults(config)

    def _defaults(self, config: Any) -> Defaults:
        if self.base.main_input_name == "pixel_values":
            patch = config.patch_size
            height, width = (patch, patch) if isinstance(patch, int) else patch
            numbers = config.num_channels * height * width
            bound = (6 / (numbers + self.geometry.width)) ** 0.5  # VPT's rule
            return Defaults(network="per_layer", hidden=48, positions="unshifted", init="uniform", bound=bound)
        attention = self.base.get_submodule(self.sites[0].path)
        decodes = list(self.geometry.kinds) == ["self"] and getattr(attention, "is_causal", False)
        positions = "shifted" if decodes and "position_ids" in self.names else "unshifted"
        shiftable = self._decoder_positions() is not None
        return Defaults(positions=positions, bound=(3 / self.geometry.width) ** 0.5, shiftable=shiftable)

    def _decoder_positions(self) -> Any:
        """The position embedding in the decoder of an encoder-decoder, if it can be told positions."""
        decoder = self.base.get_decoder() if self.base.config.is_encoder_decoder else None
        embedding = getattr(decoder, "embed_positions", None)
        return embedding if embedding is not None and "position_ids" in interface.arguments(embedding) else None

    def enter(self) -> None:
        # Models built from one config object share it; the attention implementation is this model's alone.
        copies: dict[int, Any] = {}
        for module in self.model.modules():
            config = module.__dict__.get("config")
            if isinstance(config, PreTrainedConfig):
                module.config = copy.deepcopy(config, copies)
        configs = {id(m.config): m.config for m in self.model.modules() if "config" in m.__dict__}
        known = [c for c in configs.values() if isinstance(c, PreTrainedConfig)]
        self.implementations = [(config, config._attn_implementation) for config in known]
        self.switch(True)
        self.unpacked = quantised.keep_differentiable(self.model)
        for slot, site in enumerate(getattr(self, "sites", [])):
            self.base.get_submodule(site.path).prefix_slot = slot
        # generate runs the encoder of an encoder-decoder by itself
        stacks = [self.base, self.base.get_encoder()] if self.base.config.is_encoder_decoder else [self.base]
        self.handles = [stack.register_forward_pre_hook(self.before_forward, with_kwargs=True) for stack in stacks]
        if (embedding := self._decoder_positions()) is not None:
            decoder = self.base.get_decoder()
            self.handles += [
                decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
                embedding.register_forward_pre_hook(self.before_positions, with_kwargs=True),
            ]
        for name, ours in self.replaced.items():
            if hasattr(self.model, name):
                setattr(self.model, name, ours)

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.switch(False)
        quantised.restore(self.unpacked)
        for site in getattr(self, "sites", []):
            self.base.get_submodule(site.path).__dict__.pop("prefix_slot", None)
        for name in self.replaced:
            self.model.__dict__.pop(name, None)

    @property
    def replaced(self) -> dict[str, Any]:
        """The model's methods that are ours while it has prefixes."""
        return {
            "_validate_model_kwargs": self.validate_kwargs,
            "init_continuous_batching": self.init_continuous_batching,
        }

    def switch(self, on: bool) -> None:
        for config, implementation in self.implementations:
            config._attn_implementation = NAME if on else implementation

    def verify(self) -> None:
        """Runs one token with a random prefix of one row, and looks whether the output moved."""
        assert self.prefix is not None
        slots, (_, _, Hkv, _, D) = self.prefix.slots, (0, 0, self.geometry.kv_heads, 0, self.geometry.head_dim)
        generator = torch.Generator("cpu").manual_seed(0)
        rows = torch.randn(2, Hkv, 1, D, generator=generator, device="cpu").to(self.base.device)
        inputs = probe.example(self.base, [1])
        plain, _ = probe.run(self.base, {**inputs, "prefix_call": PrefixCall({}, 0.0)})
        self.override = PrefixCall({slot: (rows[0], rows[1]) for slot in slots}, 0.0)
        try:
            moved, calls = probe.run(self.base, inputs)
        finally:
            self.override = None
        used = sum(call.used for call in calls)
        if used != len(slots) or (plain.device.type != "meta" and torch.equal(plain, moved)):
            raise NotImplementedError(
                f"a prefix does not reach the output of {type(self.base).__name__}: {used} of {len(slots)} layers "
                "attended to it, and the model is left as it was"
            )

    def project(self, slot: int, vectors: Tensor) -> Tensor:
        geometry = self.geometry
        return projections.project(self.base, self.sites[slot].path, vectors, geometry.kv_heads, geometry.head_dim)

    def projection_parameters(self, slot: int) -> Iterator[Tensor]:
        yield from projections.parameters(self.base, self.sites[slot].path)

    def activations(self, ids: list[int]) -> Tensor:
        if self.base.main_input_name != "input_ids":
            raise ValueError(f"init is a text, but {type(self.base).__name__} takes {self.base.main_input_name}")
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise ValueError(f"init has token id {max(ids)}, but the model's vocabulary ends at {vocabulary - 1}")
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise ValueError(f"init has {len(ids)} tokens, but the model has {self.max_positions} positions")
        inside = bool(self.prefixes)
        if not inside:
            self.enter()
        try:
            call = PrefixCall({}, 0.0)
            _, calls = probe.run(self.base, {**probe.example(self.base, ids), "prefix_call": call})
        finally:
            if not inside:
                self.leave()
        made = {call.module: torch.stack([call.key[0], call.value[0]]) for call in calls}
        bank = torch.stack([made[self.base.get_submodule(site.path)] for site in self.sites])
        return bank.to(torch.promote_types(bank.dtype, torch.float32))

    @property
    def max_positions(self) -> int | None:
        """Of learned positions; rotary ones end nowhere."""
        if hasattr(self.base, "rotary_emb"):
            return None
        most = getattr(self.base.config, "max_position_embeddings", None)
        return None if most is None else int(most)

    def validate_kwargs(self, kwargs: dict[str, Any]) -> None:
        """generate's check of its arguments, to which prefix_ids would be a mistake."""
        type(self.model)._validate_model_kwargs(  # type: ignore[attr-defined]
            self.model, {name: value for name, value in kwargs.items() if name != "prefix_ids"}
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Its manager asks for an attention of transformers' own by name, and none of those has a prefix."""
        if self.active and self.prefix is not None:
            raise NotImplementedError(
                "continuous batching (generate_batch) takes no attention but transformers' own, which would leave out "
                "the prefix; use generate, or go without the prefix: disabled() or detach()"
            )
        return type(self.model).init_continuous_batching(self.model, *args, **kwargs)  # type: ignore[attr-defined]

    def before_forward(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook: computes the prefixes and shifts the positions."""
        prefix = self.prefix
        if prefix is None or kwargs.get("prefix_call") is not None:
            return None
        ids = kwargs.pop("prefix_ids", None)
        if not self.active:
            return args, kwargs
        self._check_implementation()
        names = self.names if stack is self.base else interface.arguments(stack)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        first = next((kwargs[n] for n in _INPUTS if kwargs.get(n) is not None), None)
        if first is None:
            return None  # the model itself says what is missing
        if kwargs.get("output_attentions"):
            raise NotImplementedError("output_attentions: attention with a prefix never makes its weights")
        if self.override is not None:
            return (), {**kwargs, "prefix_call": self.override}
        prefix.begin()
        chosen = prefix.choose(ids, first.shape[0], self._dtype(first.device), first.device)
        if self.defaults.positions == "shifted":
            self._prepare_decoder(first, kwargs, chosen.shift)
        if torch.is_grad_enabled() and gate.needed(self.base):
            chosen = chosen.with_tensors(gate.behind(self.base, chosen.tensors(), kwargs))
        kwargs["prefix_call"] = prefix.call(chosen)
        return (), kwargs

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = kwargs.get("prefix_call")
        self.shift = 0 if call is None else call.shift

    def before_positions(self, embedding: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shifts the positions that the decoder of an encoder-decoder makes itself, and takes from nobody."""
        if isinstance(self.shift, int) and self.shift == 0:
            return None
        kwargs = {**dict(zip(interface.arguments(embedding), args, strict=False)), **kwargs}
        return (), {**kwargs, "position_ids": self._after_prefix(kwargs["position_ids"], self.shift)}

    def _check_implementation(self) -> None:
        implementation = self.base.config._attn_implementation
        if implementation != NAME:
            raise ValueError(
                f"the model's attention implementation was set to {implementation!r} after attach, and would leave out "
                f"the prefix; expected {NAME!r}: call set_attn_implementation before attach, or detach() the prefix"
            )

    def _prepare_decoder(self, tokens: Tensor, kwargs: dict[str, Any], shift: int | Tensor) -> None:
        """What a decoder's inputs need: a mask of the tokens alone, positions after the prefix's."""
        assert self.prefix is not None
        batch, length = tokens.shape[0], tokens.shape[1]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if cache is None and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {length} tokens; a prefix takes no column of it"
            )
        if mask is None and cache is None and kwargs.get("position_ids") is None and torch.compiler.is_compiling():
            # While tracing, transformers cannot see that nothing is packed and would build [B, 1, L, S].
            kwargs["attention_mask"] = tokens.new_ones(1, 1, dtype=torch.bool).expand(batch, length)
        if not isinstance(shift, int) or shift:
            kwargs["position_ids"] = self._shifted(kwargs.get("position_ids"), cache, length, tokens.device, shift)

    def _shifted(
        self, positions: Tensor | None, cache: Any, length: int, device: torch.device, shift: int | Tensor
    ) -> Tensor:
        if positions is None:
            past = cache.get_seq_length() if cache is not None else 0
            positions = (torch.arange(length, device=device) + past)[None]
        return self._after_prefix(positions, shift)

    def _after_prefix(self, positions: Tensor, shift: int | Tensor) -> Tensor:
        positions = positions + shift
        most = self.max_positions
        if most is not None and positions.device.type == "cpu" and not torch.compiler.is_compiling():
            last = int(positions.max()) if positions.numel() else 0
            if last >= most:
                raise ValueError(
                    f"position {last} is past the model's {most} positions, {int(torch.as_tensor(shift).max())} of "
                    "which the prefix takes; shorten the input or use positions='unshifted'"
                )
        return positions

    def _dtype(self, device: torch.device) -> torch.dtype:
        # torch's question has no answer for meta, and raises
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        dtype: torch.dtype = self.base.dtype
        return dtype


_INPUTS = "input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds"
