"""`TimmAdapter`: prefixes into a vision transformer of timm."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.attach.adapter import Choice, evaluating
from prefixattn.attach.base import Attached
from prefixattn.attach.records import PrefixCall
from prefixattn.attach.timm import layers, threads
from prefixattn.attach.timm.passes import PLAIN, PassingAdapter
from prefixattn.prefixes.config import INITS, Defaults, PrefixConfig
from prefixattn.prefixes.geometry import Geometry


class TimmAdapter(PassingAdapter):
    """Any model of timm whose attention is `Attention`, `AttentionRope` or `EvaAttention` throughout."""

    caches = False

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        super().__init__(model, base)
        self.paths = _paths(base)
        self.handles: list[Any] = []
        # kept as they are: what a user does with the model's blocks afterwards changes what their paths lead to
        self.found = [base.get_submodule(path) for path in self.paths]
        self.around = [base.get_submodule(path.rpartition(".")[0]) for path in self.paths]  # the block, or a part of it
        heads, kv_heads, head_dim, width = _sizes(base, self.found)
        self.geometry = Geometry(type(base).__name__, len(self.paths), kv_heads, head_dim, width, heads=heads)
        channels, height, width_of_patch = self._channels(), *_patch(base)
        bound = (6 / (channels * height * width_of_patch + width)) ** 0.5  # VPT's rule
        self.defaults = Defaults(network="per_layer", hidden=48, positions="unshifted", init="uniform", bound=bound)

    def resolve(self, config: Choice) -> Choice:
        if isinstance(config, PrefixConfig) and config.init not in INITS:
            words = ", ".join(map(repr, INITS))
            raise ValueError(f"init is {config.init!r}, but {self.geometry.model_type} takes images; expected {words}")
        if isinstance(config, PrefixConfig) and config.count is not None:
            raise NotImplementedError(
                f"count is {config.count}: a timm model's forward pass takes no prefix_ids to choose by; attach "
                "prefixes one by one and activate() the wanted"
            )
        return super().resolve(config)

    def enter(self) -> None:
        for slot, layer in enumerate(self.found):
            layers.enter(layer, self, slot)
        base, embedding = self.base, _embedding(self.base)
        self.embedded = embedding is not None
        self.handles = [
            base.register_forward_pre_hook(self.before_model),
            base.register_forward_hook(self.after_model, always_call=True),
        ]
        if self.embedded:
            # forward_features, forward_intermediates and get_intermediate_layers run no hook of the model, but this
            self.handles.append(embedding.register_forward_pre_hook(self.begin))
        blocks = {id(block): block for block in self.around}
        self.handles += [block.register_forward_pre_hook(self.before_block) for block in blocks.values()]
        # a pass that began before ends without a prefix, for there is none yet
        self._alone("attach")

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.forget()
        for layer in self.found:
            layers.leave(layer)

    def remove(self, prefix: Attached) -> None:
        active = self.prefix
        if active is not None and all(p is prefix for p in self.prefixes):
            self.prefix = None  # a pass that begins now has none
            try:
                self._alone("detach")
            except ValueError:
                self.prefix = active
                raise
        super().remove(prefix)

    def _alone(self, what: str) -> None:
        if threads.inside_elsewhere(self.base):
            raise ValueError(
                f"{what}: another thread is in the middle of a forward pass of this {type(self.base).__name__}, part "
                "of which would run with the prefix and part without; wait until it is over"
            )

    def lost(self, slots: list[int]) -> str | None:
        modules = {id(module) for module in self.base.modules()}
        here = [slot for slot in slots if id(self.found[slot]) in modules and not self._compiled(slot)]
        if here:
            return (
                f"{self.paths[here[0]]} has a prefix, but this forward pass of {type(self.base).__name__} did not "
                f"call it ({len(here)} such layers): its output is without that prefix"
            )
        ours, paths = {id(layer) for layer in self.found}, {self.paths[slot] for slot in slots}
        for path, module, _ in _attentions(self.base):
            if path in paths and id(module) not in ours:
                return (
                    f"{path} of {type(self.base).__name__} came after attach and has no prefix, and the prefix of the "
                    "one before it meets no layer; detach() before layers are replaced, and attach after"
                )
        return None

    def _compiled(self, slot: int) -> bool:
        """True if the layer is in a part that is compiled by itself, which counts no calls."""
        parts = self.paths[slot].split(".")
        around = [self.base.get_submodule(".".join(parts[:n])) for n in range(1, len(parts))]
        return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in around)

    # what attach asks

    def verify(self, prefix: Attached) -> None:
        """Runs one black image without and with random rows, and looks whether each layer's output moved."""
        geometry, slots = self.geometry, prefix.slots
        generator = torch.Generator("cpu").manual_seed(0)
        shape = 2, geometry.kv_heads, 1, geometry.head_dim
        rows = torch.randn(shape, generator=generator, device="cpu").to(self.device)
        plain = self._outputs(PLAIN)
        moved = self._outputs(PrefixCall({slot: (rows[0], rows[1]) for slot in slots}, 0.0))
        met = [slot for slot in slots if slot in moved]
        if self.device.type != "meta":
            met = [slot for slot in met if not torch.equal(plain[slot], moved[slot])]
        if len(met) != len(slots):
            raise NotImplementedError(
                f"a prefix does not reach the output of {geometry.model_type}: {len(met)} of {len(slots)} layers "
                "attended to it, and the model is left as it was"
            )

    def _outputs(self, call: PrefixCall) -> dict[int, Tensor]:
        """What each layer makes of a black image."""
        outputs: dict[int, Tensor] = {}
        slot_of = {layer: slot for slot, layer in enumerate(self.found)}

        def keep(layer: nn.Module, args: Any, out: Tensor) -> None:
            if self.passes.override is call:  # in this thread
                outputs[slot_of[layer]] = out

        handles = [layer.register_forward_hook(keep) for layer in slot_of]
        try:
            with evaluating(self.base), torch.no_grad(), self.overriding(call):
                self.base(self._image())
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _image(self) -> Tensor:
        embedding: Any = _embedding(self.base)
        size = getattr(embedding, "img_size", None)
        if size is None:
            size = [4 * n for n in _patch(self.base)]
        parameter = next(self.base.parameters() if embedding is None else embedding.parameters())
        return torch.zeros(1, self._channels(), *size, device=self.device, dtype=parameter.dtype)

    def _channels(self) -> int:
        known = getattr(self.base, "pretrained_cfg", None) or {"input_size": (3, 0, 0)}
        return int(getattr(self.base, "in_chans", known["input_size"][0]))

    def project(self, slot: int, vectors: Tensor) -> Tensor:
        # a block that was taken out of the model may have stayed behind when that moved
        return layers.project(self.found[slot], self.around[slot], vectors, self.device)

    def projection_parameters(self, slot: int) -> Iterator[Tensor]:
        return layers.projection_parameters(self.found[slot], self.around[slot])


def _attentions(base: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Where something attends, in the modules' order; True if it computes as we know."""
    for path, module in base.named_modules():
        name = type(module).__name__
        if layers.known(module):
            yield path, module, True
        elif "AttentionPool" not in name and (hasattr(module, "fused_attn") or "Attention" in name or "Attn" in name):
            yield path, module, False


def _paths(base: nn.Module) -> list[str]:
    """Where the attention layers are, in the modules' order."""
    found = []
    for path, module, known in _attentions(base):
        if not known:
            cls = type(module)
            replaced = ", whose forward was replaced" if "forward" in module.__dict__ else ""
            raise NotImplementedError(
                f"attach does not know the attention of {type(base).__name__}: its {path} is a "
                f"{cls.__module__}.{cls.__qualname__}{replaced}; it knows timm's Attention, AttentionRope and "
                "EvaAttention, and what computes as they do"
            )
        found.append(path)
    if not found:
        raise NotImplementedError(f"attach finds no attention in {type(base).__name__}")
    return found


def _sizes(base: nn.Module, found: list[Any]) -> tuple[int, int, int, int]:
    different = {layers.sizes(layer) for layer in found}
    if len(different) > 1:
        spelled = ", ".join(f"H={h} Hkv={g} D={d} width={e}" for h, g, d, e in sorted(different))
        raise NotImplementedError(
            f"the layers of {type(base).__name__} differ in size ({spelled}); expected one for all"
        )
    return different.pop()


def _embedding(base: nn.Module) -> Any:
    """The module that every way through the model runs first, or None."""
    return next((m for p, m in base.named_modules() if p.rpartition(".")[2] in ("patch_embed", "embeds")), None)


def _patch(base: nn.Module) -> tuple[int, int]:
    size = getattr(_embedding(base), "patch_size", 16)
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
