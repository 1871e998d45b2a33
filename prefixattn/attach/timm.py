"""`TimmAdapter`: prefixes into a vision transformer of timm.

timm's blocks pass no keyword arguments on, so the prefixes of a forward pass lie in the adapter until the layers, one
after another, have met theirs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor, nn

from prefixattn.attach import timm_layers
from prefixattn.attach.adapter import Adapter, Choice, evaluating
from prefixattn.attach.attached import Attached, PrefixCall
from prefixattn.config import INITS, Defaults, PrefixConfig
from prefixattn.prefix import Geometry

MARK = "prefixattn"
PLAIN = PrefixCall({}, 0.0)


class _Pass:
    """A forward pass of the model under way. Its layers meet it in their order."""

    def __init__(self, call: PrefixCall, slot: int | None = 0, holds: Callable[[], bool] = lambda: True) -> None:
        self.call = call
        self.slot = slot  # of the layer that comes next; None: any
        self.holds = holds  # of a pass that nobody will end

    def reaches(self, slot: int) -> bool:
        """False of a pass that was left unfinished: the layer is run by itself."""
        return self.slot in (None, slot) and self.holds()


class _Passes(threading.local):
    """Of each thread its own: several may run one model."""

    running: _Pass | None = None
    whole = False  # inside the model's own forward


class TimmAdapter(Adapter):
    """Any model of timm whose attention is `Attention`, `AttentionRope` or `EvaAttention` throughout."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        super().__init__(model, base)
        self.paths = _paths(base)
        self.handles: list[Any] = []
        self.embedded = False  # the passes begin at the embedding of patches; else at the model
        self.passes = _Passes()
        self.traced: PrefixCall | None = None  # the pass that is being compiled, which knows no threads
        self.override: PrefixCall | None = None
        heads, kv_heads, head_dim, width = _sizes(base, self.layers())
        self.geometry = Geometry(type(base).__name__, len(self.paths), kv_heads, head_dim, width, heads=heads)
        channels, height, width_of_patch = self._channels(), *_patch(base)
        bound = (6 / (channels * height * width_of_patch + width)) ** 0.5  # VPT's rule
        self.defaults = Defaults(network="per_layer", hidden=48, positions="unshifted", init="uniform", bound=bound)

    def layers(self) -> list[Any]:
        return [self.base.get_submodule(path) for path in self.paths]

    def around(self, slot: int) -> nn.Module:
        """The block of a layer, or what in it is around the layer."""
        module: nn.Module = self.base.get_submodule(self.paths[slot].rpartition(".")[0])
        return module

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
        for slot, layer in enumerate(self.layers()):
            timm_layers.enter(layer, self, slot)
        base, embedding = self.base, _embedding(self.base)
        self.embedded = embedding is not None
        self.handles = [
            base.register_forward_pre_hook(self.before_model),
            base.register_forward_hook(self.after_model, always_call=True),
        ]
        if self.embedded:
            # forward_features, forward_intermediates and get_intermediate_layers run no hook of the model, but this
            self.handles.append(embedding.register_forward_pre_hook(self.begin))
        blocks = {id(block): block for block in map(self.around, range(len(self.paths)))}
        self.handles += [block.register_forward_pre_hook(self.before_block) for block in blocks.values()]

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.forget()
        for layer in self.layers():
            timm_layers.leave(layer)

    def switch(self, on: bool) -> None:
        # layers that get no prefix run timm's own forward pass
        self.forget()

    def activate(self, prefix: Attached) -> None:
        super().activate(prefix)
        self.forget()

    # a forward pass

    def before_model(self, module: nn.Module, args: Any) -> None:
        self.forget()
        if not torch.compiler.is_compiling():
            self.passes.whole = True
        if not self.embedded:
            self.begin(module, args)

    def after_model(self, module: nn.Module, args: Any, out: Any) -> None:
        self.forget()

    def begin(self, module: nn.Module, args: Any) -> None:
        """A hook on what every forward pass runs first: computes the prefixes."""
        call = self.new_call()
        if torch.compiler.is_compiling():
            self.traced = call
        else:
            state = None if self.passes.whole else self._state()
            # else, what a pass that stopped early had may not be what the prefix has later
            self.passes.running = _Pass(call, holds=lambda: state is None or state == self._state())

    def forget(self) -> None:
        if torch.compiler.is_compiling():
            self.traced = None
        else:
            self.passes.running, self.passes.whole = None, False

    def new_call(self) -> PrefixCall:
        if self.override is not None:
            return self.override
        prefix = self.prefix
        if prefix is None or not self.active:
            return PLAIN
        if torch.is_grad_enabled() and getattr(self.base, "grad_checkpointing", False) and use_reentrant_ckpt():
            raise NotImplementedError(
                "a prefix with reentrant checkpoints: no input of a frozen model's first block wants a gradient, and "
                "such checkpoints pass none on; call timm.layers.set_reentrant_ckpt(False)"
            )
        prefix.begin()
        return prefix.call(prefix.choose(None, 0, self._dtype(), self.device))

    def call_for(self, slot: int) -> PrefixCall:
        """What a layer gets with its forward pass."""
        last = slot == len(self.paths) - 1
        if torch.compiler.is_compiling():
            call = self.traced
            # a compiled checkpoint may change nothing outside it
            if last and not getattr(self.base, "grad_checkpointing", False):
                self.traced = None
            return self.new_call() if call is None else call
        running = self.passes.running
        if running is None or not running.reaches(slot):
            self.passes.running = None
            return self.new_call()
        running.slot = slot + 1
        if last:
            self.passes.running = None
        return running.call

    def _state(self) -> Any:
        prefix = self.prefix
        return None if prefix is None else (torch.is_grad_enabled(), prefix.state())

    def before_block(self, block: nn.Module, args: Any) -> None:
        """A hook on each block: one that a checkpoint runs again, in the backward, gets the prefixes it had.

        A checkpoint keeps what a block was given and gives it again. So the pass is written on that tensor or, where it
        has one, on its node in the graph, which outlives it if saved tensors are packed. The prefixes were computed
        outside the checkpoint, and their gradients flow through the graph of the first run.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not args:
            return
        node = args[0].grad_fn
        marks: Any = args[0].__dict__ if node is None else node.metadata
        backward = torch._C._current_graph_task_id()  # -1 outside; as torch.utils.checkpoint asks
        if backward != -1 and MARK in marks:

            def holds() -> bool:
                return bool(torch._C._current_graph_task_id() == backward)

            self.passes.running = _Pass(marks[MARK], None, holds)
        elif self.passes.running is not None:
            marks[MARK] = self.passes.running.call

    def _dtype(self) -> torch.dtype:
        device_type = self.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        dtype: torch.dtype = self.base.get_submodule(self.paths[0]).proj.weight.dtype
        return dtype

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
        layers = {layer: slot for slot, layer in enumerate(self.layers())}
        handles = [
            layer.register_forward_hook(lambda layer, args, out: outputs.__setitem__(layers[layer], out))
            for layer in layers
        ]
        try:
            with evaluating(self.base), torch.no_grad(), self._overriding(call):
                self.base(self._image())
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    @contextmanager
    def _overriding(self, call: PrefixCall) -> Iterator[None]:
        self.override = call
        try:
            yield
        finally:
            self.override = None

    def _image(self) -> Tensor:
        embedding: Any = _embedding(self.base)
        size = getattr(embedding, "img_size", None)
        if size is None:
            size = [4 * n for n in _patch(self.base)]
        parameter = next(self.base.parameters() if embedding is None else embedding.parameters())
        return torch.zeros(1, self._channels(), *size, device=parameter.device, dtype=parameter.dtype)

    def _channels(self) -> int:
        known = getattr(self.base, "pretrained_cfg", None) or {"input_size": (3, 0, 0)}
        return int(getattr(self.base, "in_chans", known["input_size"][0]))

    def project(self, slot: int, vectors: Tensor) -> Tensor:
        return timm_layers.project(self.base.get_submodule(self.paths[slot]), self.around(slot), vectors)

    def projection_parameters(self, slot: int) -> Iterator[Tensor]:
        return timm_layers.projection_parameters(self.base.get_submodule(self.paths[slot]), self.around(slot))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "passes": None, "traced": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, passes=_Passes())


def _paths(base: nn.Module) -> list[str]:
    """Where the attention layers are, in the modules' order."""
    found = []
    for path, module in base.named_modules():
        name = type(module).__name__
        if timm_layers.known(module):
            found.append(path)
        elif "AttentionPool" not in name and (hasattr(module, "fused_attn") or "Attention" in name or "Attn" in name):
            cls = type(module)
            raise NotImplementedError(
                f"attach does not know the attention of {type(base).__name__}: its {path} is a "
                f"{cls.__module__}.{cls.__qualname__}; it knows timm's Attention, AttentionRope and EvaAttention, and "
                "what computes as they do"
            )
    if not found:
        raise NotImplementedError(f"attach finds no attention in {type(base).__name__}")
    return found


def _sizes(base: nn.Module, layers: list[Any]) -> tuple[int, int, int, int]:
    different = {timm_layers.sizes(layer) for layer in layers}
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
