"""`HuggingFaceAdapter`: prefixes into a model whose layers call transformers' attention interface."""

import copy
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefixattn.attach.adapter import Adapter
from prefixattn.attach.base import Attached
from prefixattn.attach.hf import interface, packed, positions, probe, projections, quantised, reentrant, sliding
from prefixattn.attach.hf.interface import EXPLICIT, NAME, NAMES, PLAIN
from prefixattn.attach.hf.positions import Positions
from prefixattn.attach.records import PrefixCall
from prefixattn.prefixes.config import Defaults
from prefixattn.prefixes.geometry import Geometry


class _Thread(threading.local):
    """What of a forward pass belongs to the thread that runs it."""

    override: PrefixCall | None = None  # of attach's own passes
    shift: int | Tensor = 0  # of the positions in the stack that is running


class HuggingFaceAdapter(Adapter):
    """Any transformers model whose layers call the attention interface and pass it their keyword arguments."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        super().__init__(model, base)
        self.handles: list[Any] = []
        self.implementation = NAME
        self.implementations: list[tuple[Any, str | None]] = []
        self.unpacked: list[nn.Module] = []
        self.thread = _Thread()
        self.traced: int | Tensor = 0  # the shift in code that is compiled: threads are none of its concern
        self.positions = Positions()
        self.sites: list[probe.Site] = []
        self.paths = self._stacks()
        probe.refuse(model, base)
        with quantised.differentiable(model):
            self._look()

    # what attach finds out

    def _look(self) -> None:
        model, base = self.model, self.base
        plain = probe.trials(base)
        calls = self._tried(plain)
        self.small_masks = all(call.small for call in calls)
        self.sites = probe.sites(base, calls)
        self.paths = [p for p in self.paths if not p or any(f"{s.path}.".startswith(f"{p}.") for s in self.sites)]
        with self.entered(), self.overriding(PLAIN):
            self.own = probe.own_attentions(base, plain[0].inputs)
        self.whole = probe.outermost(model, base)
        kinds: dict[str, int] = {}
        for site in self.sites:
            kinds[site.kind] = kinds.get(site.kind, 0) + 1
        first = self.sites[0]
        config = self.base.config.get_text_config()
        if base.main_input_name == "pixel_values":
            config = getattr(self.base.config, "vision_config", self.base.config)
        width = probe.field(base, config, first, "hidden_size")
        sizes = [(site.kv_heads, site.head_dim, site.value_dim) for site in self.sites]
        sources = [site.source for site in self.sites]
        self.geometry = Geometry.of_layers(config.model_type, sizes, width, kinds, first.heads, sources)
        self.decodes = list(kinds) == ["self"] and all(site.causal for site in self.sites)
        self.windows = sliding.windows(self.sites) if self.decodes else {}
        if base.main_input_name == "input_ids":
            self.positions = positions.find(base, [site.path for site in self.sites], plain, self.decodes)
        self.defaults = self._defaults(config)

    def _stacks(self) -> list[str]:
        """Paths of the parts of the model that can be called by themselves, the base model first."""
        stacks = {id(m) for m in self.base.modules() if isinstance(m, PreTrainedModel)}
        if self.base.config.is_encoder_decoder:
            stacks |= {id(self.base.get_encoder()), id(self.base.get_decoder())}
        return [path for path, module in self.base.named_modules() if not path or id(module) in stacks]

    def _tried(self, plain: list[probe.Trial]) -> list[interface.Watched]:
        """The calls of attention, with masks in the smallest form in which the model makes what it makes plainly."""
        form = "eager" if self.base.config._attn_implementation == "eager" else "sdpa"
        for implementation in (NAME, EXPLICIT[form]):
            self.implementation = implementation
            try:
                with self.entered(), self.overriding(PLAIN):
                    return probe.check(self.base, plain)
            except NotImplementedError as objection:
                last = objection
        raise last

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def _defaults(self, config: Any) -> Defaults:
        if self.base.main_input_name == "pixel_values":
            fields = "patch_size", "num_channels"
            patch, channels = (probe.field(self.base, config, self.sites[0], name) for name in fields)
            height, width = (patch, patch) if isinstance(patch, int) else patch
            numbers = channels * height * width
            bound = (6 / (numbers + self.geometry.width)) ** 0.5  # VPT's rule
            return Defaults(network="per_layer", hidden=48, positions="unshifted", init="uniform", bound=bound)
        shiftable = self.positions.shiftable and (self.decodes or self.base.config.is_encoder_decoder)
        where = "shifted" if shiftable and self.decodes else "unshifted"
        if self.decodes and not shiftable:
            name = type(self.base).__name__
            warnings.warn(
                f"{name} hands its positions on nowhere that a prefix could shift them: 'unshifted'", stacklevel=5
            )
        slides = sliding.possible(self.windows, config) if self.decodes else False
        return Defaults(positions=where, bound=(3 / self.geometry.width) ** 0.5, shiftable=shiftable, slides=slides)

    # in and out

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
        for slot, site in enumerate(self.sites):
            self.base.get_submodule(site.path).prefix_slot = slot
        for path in self.paths:
            stack = self.base.get_submodule(path)
            self.handles += [
                stack.register_forward_pre_hook(self.before_forward, with_kwargs=True),
                stack.register_forward_hook(self.after_forward, always_call=True),
            ]
        for path in self.positions.embeddings:
            embedding = self.base.get_submodule(path)
            self.handles += [
                embedding.register_forward_pre_hook(self.before_positions, with_kwargs=True),
                embedding.register_forward_hook(self.after_positions),
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
        for site in self.sites:
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
        # a part of the model without such layers, as one for images beside the text's, keeps its own attention
        ours = {id(c) for c, _ in self.implementations}
        if self.sites:
            above = [self.base.get_submodule(path) for path in self._above_sites()]
            ours = {id(m.config) for m in [self.model, *above] if "config" in m.__dict__}
        for config, implementation in self.implementations:  # outer ones first: a config sets those inside it
            config._attn_implementation = self.implementation if on and id(config) in ours else implementation

    def _above_sites(self) -> set[str]:
        """Paths of the layers and of all that is around them."""
        parts = [site.path.split(".") for site in self.sites]
        return {".".join(names[:n]) for names in parts for n in range(len(names) + 1)}

    @contextmanager
    def overriding(self, call: PrefixCall) -> Iterator[None]:
        """In this thread every pass gets `call`."""
        self.thread.override = call
        try:
            yield
        finally:
            self.thread.override = None

    def verify(self, prefix: Attached) -> None:
        """Runs some tokens with a random prefix of one row, and looks whether the output moved."""
        if self.own and prefix.config.attentions == "all":
            path = self.own[0]
            kinds = list(self.geometry.kinds)
            others = "" if kinds == ["self"] else f"; attentions={kinds} leaves such layers out"
            raise NotImplementedError(
                f"{type(self.base).__name__} has layers with an attention of their own, which would get no prefix: "
                f"{path} is a {type(self.base.get_submodule(path)).__name__}{others}"
            )
        slots = prefix.slots
        generator = torch.Generator("cpu").manual_seed(0)
        rows = torch.randn(self.geometry.kv_shape(1, 1), generator=generator, device="cpu").to(self.device)
        pairs = self.geometry.by_layer(rows.expand(len(slots), -1, -1, -1, -1), slots)
        inputs = probe.example(self.whole)
        with self.overriding(PLAIN):
            plain, _ = probe.run(self.whole, inputs)
        with self.overriding(PrefixCall(dict(zip(slots, pairs, strict=True)), 0.0)):
            moved, calls = probe.run(self.whole, inputs)
        used = {call.module.prefix_slot for call in calls if call.used}
        if used != set(slots) or torch.equal(plain, moved):
            raise NotImplementedError(
                f"a prefix does not reach the output of {type(self.whole).__name__}: {len(used)} of {len(slots)} "
                "layers attended to it, and the model is left as it was"
            )

    @property
    def device(self) -> torch.device:
        return probe.execution_device(self.base)

    def project(self, slot: int, vectors: Tensor) -> Tensor:
        return projections.project(self.base, self.sites[slot].path, vectors, self.geometry)

    def projection_parameters(self, slot: int) -> Iterator[Tensor]:
        path = self.sites[slot].path
        for parameter in projections.parameters(self.base, path):
            if parameter.device.type == "meta":
                raise NotImplementedError(
                    f"share='simple' reads the projections of {path}, whose weights are offloaded; share='none' and "
                    "share='deep' read no weights of the model"
                )
            yield parameter

    def activations(self, ids: list[int]) -> Tensor:
        if self.base.main_input_name != "input_ids":
            raise ValueError(f"init is a text, but {type(self.base).__name__} takes {self.base.main_input_name}")
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise ValueError(f"init has token id {max(ids)}, but the model's vocabulary ends at {vocabulary - 1}")
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise ValueError(f"init has {len(ids)} tokens, but the model has {self.max_positions} positions")
        with nullcontext() if self.prefixes else self.entered(), self.overriding(PLAIN):
            _, calls = probe.run(self.base, probe.example(self.base, ids))
        made = {call.module: self.geometry.joined(call.key[0], call.value[0]) for call in calls}
        kv = torch.stack([made[self.base.get_submodule(site.path)] for site in self.sites])
        return kv.to(torch.promote_types(kv.dtype, torch.float32))

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

    # a forward pass

    def before_forward(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook on each part that can be called: the first that is met computes the prefixes and hands them on."""
        if not interface.passes_on(stack):
            return None
        kwargs = {**dict(zip(interface.arguments(stack), args, strict=False)), **kwargs}
        call = kwargs.get("prefix_call")
        if call is None:
            call = self._new_call(kwargs)
            if call is not None:
                kwargs["prefix_call"] = call
        self._set_shift(0 if call is None else self._shift(stack, call, kwargs))
        packed.announce(call is not None and call.packed is not None)
        if call is not None and self.positions.argument and stack is self.base:
            found = positions.given(kwargs, next(kwargs[n] for n in _INPUTS if kwargs.get(n) is not None))
            kwargs["position_ids"] = positions.shifted(found, call.shift, self.max_positions)
        return (), kwargs

    def after_forward(self, stack: Any, args: Any, out: Any) -> None:
        self._set_shift(0)
        packed.announce(False)

    def _shift(self, stack: Any, call: PrefixCall, kwargs: dict[str, Any]) -> int | Tensor:
        """Of the positions in a part of the model; an encoder and a decoder have each their own padding."""
        if not self.base.config.is_encoder_decoder:
            return call.shift
        if stack is self.base:
            return 0
        return self._without_padding(call.shift if stack is self.base.get_decoder() else 0, kwargs)

    def _set_shift(self, shift: int | Tensor) -> None:
        if torch.compiler.is_compiling():
            self.traced = shift
        else:
            self.thread.shift = shift

    def _new_call(self, kwargs: dict[str, Any]) -> PrefixCall | None:
        """What the layers get, of a pass with the arguments `kwargs`; None if it is not to have a prefix."""
        if not torch.compiler.is_compiling() and self.thread.override is not None:
            return self.thread.override
        prefix, ids = self.prefix, kwargs.pop("prefix_ids", None)
        if not self.active:
            return None
        self._check_implementation()
        known = (kwargs[name] for name in _INPUTS if kwargs.get(name) is not None)
        first = next((t for t in (*known, *kwargs.values()) if isinstance(t, Tensor)), None)
        if prefix is None or first is None:
            return PLAIN  # of an input that is missing the model itself speaks
        if kwargs.get("output_attentions"):
            raise NotImplementedError("output_attentions: attention with a prefix never makes its weights")
        takes = interface.arguments(self.base)
        sequences = packed.found(self.base, takes, kwargs, first, self.small_masks, self.decodes)
        batch, ids = packed.samples(first, ids, sequences)
        prefix.begin()
        chosen = prefix.choose(ids, batch, probe.computing_dtype(self.base, first.device), first.device)
        chosen = chosen._replace(shift=packed.of_tokens(chosen.shift, sequences, first))
        if not self.base.config.is_encoder_decoder:
            chosen = chosen._replace(shift=self._without_padding(chosen.shift, kwargs))
            if self.decodes and torch.compiler.is_compiling() and not _told(kwargs):
                # While tracing, transformers cannot see that nothing is packed and would build [B, 1, L, S].
                kwargs["attention_mask"] = first.new_ones(1, 1, dtype=torch.bool).expand(first.shape[:2])
        if torch.is_grad_enabled() and reentrant.needed(self.base):
            chosen = chosen.with_tensors(reentrant.behind(self.base, chosen.tensors(), kwargs))
        call = prefix.call(chosen)._replace(packed=sequences)
        return sliding.placed(call, prefix.config, self.windows, kwargs)

    def _without_padding(self, shift: int | Tensor, kwargs: dict[str, Any]) -> int | Tensor:
        """The shift, less the padding before a sample where positions count it and none are given.

        A rotary model does not mind where its tokens begin, as only distances matter; but a prefix has no position.
        """
        mask = kwargs.get("attention_mask")
        if not self.positions.padded or kwargs.get("position_ids") is not None:
            return shift
        if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.shape[1]:
            return shift
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask[:, 0].all()):
            return shift
        return shift - positions.padding_on_the_left(mask)

    def before_positions(self, embedding: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook on what is called with positions: shifts those that the model made or was given."""
        shift = self.traced if torch.compiler.is_compiling() else self.thread.shift
        if isinstance(shift, int) and shift == 0:
            return None
        name = positions.argument(embedding)
        found = positions.named(embedding, args, kwargs)[name]
        if found is None:
            raise RuntimeError(
                f"{type(embedding).__name__} makes its positions itself in this call, and a prefix cannot shift them; "
                "attach with positions='unshifted'"
            )
        return positions.replaced(embedding, args, kwargs, positions.shifted(found, shift, positions.count(embedding)))

    def after_positions(self, embedding: Any, args: Any, out: Any) -> Any:
        """Of positions that a model makes for all samples at once, and that a bank's lengths made differ."""
        one = isinstance(out, Tensor) and out.ndim == 4 and out.shape[0] == 1
        return out[0] if one and isinstance(embedding, nn.Embedding) else None

    def _check_implementation(self) -> None:
        implementation = self.base.config._attn_implementation
        if implementation not in NAMES:
            raise ValueError(
                f"the model's attention implementation was set to {implementation!r} after attach, and would leave out "
                f"the prefix; expected {self.implementation!r}: call set_attn_implementation before attach, or "
                "detach() the prefix"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "thread": None, "traced": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "thread": _Thread()})


_INPUTS = "input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds"


def _told(kwargs: dict[str, Any]) -> bool:
    """Whether a caller says where tokens are."""
    return any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids", "past_key_values"))
