"""`Adapter`: what a model with prefixes has beside it, from its first `attach` to its last `detach`."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prefixattn.attach.base import Attached
from prefixattn.attach.training import watched
from prefixattn.prefixes.config import Defaults, PrefixConfig
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.plus import PrefixPlusConfig

_changing = threading.RLock()  # one attach or detach at a time in a process: models may share modules
Choice = TypeVar("Choice", PrefixConfig, PrefixPlusConfig)


class Adapter:
    """Freezes a model and has its layers attend to the active one of its prefixes; undoes both.

    Layers with attention are *slots*, counted through all kinds of attention. A subclass for a library says how: its
    hook on the model's forward pass is a method of the adapter, by which find.py knows it again.
    """

    geometry: Geometry
    defaults: Defaults
    caches = True  # whether its library has models with a cache of keys and values
    _lent = False  # the model attends to a guest for a while

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        # Any: a module's attributes are known to no type checker.
        self.model: nn.Module = model
        self.base: Any = base
        self.prefixes: list[Attached] = []
        self.prefix: Attached | None = None  # the active one
        self.active = True
        self.flags: dict[str, bool] = {}
        self.wrapped = False  # by PEFT, before attach

    # what a subclass says

    def enter(self) -> None:
        """Has the layers attend by way of the adapter."""
        raise NotImplementedError

    def leave(self) -> None:
        """The layers as they were before `enter`."""
        raise NotImplementedError

    def verify(self, prefix: Attached) -> None:
        """NotImplementedError if a prefix does not reach the output. Some tokens, an image or a silence are run."""
        raise NotImplementedError

    def project(self, slot: int, vectors: Tensor) -> Tensor:
        """A layer's kv (prefixes/networks.py) that the frozen layer makes of `vectors` `[P, E]`, its norm included."""
        raise NotImplementedError

    def projection_parameters(self, slot: int) -> Iterable[Tensor]:
        """What `project` reads."""
        raise NotImplementedError

    def activations(self, ids: list[int]) -> Tensor:
        """The kv of all layers, of the n tokens `ids` in the frozen model."""
        raise NotImplementedError

    def switch(self, on: bool) -> None:
        """Whether the layers run as before `attach`, bit for bit (off), or by way of the adapter."""
        raise NotImplementedError

    # what all share

    @property
    def device(self) -> torch.device:
        """Where the model computes. Weights that accelerate offloads lie on meta in the meantime."""
        device: torch.device = next(self.base.parameters()).device
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.base.modules())
            known = (getattr(hook, "execution_device", None) for hook in hooks)
            device = next((torch.device(d) for d in known if d is not None), device)
        return device

    def resolve(self, config: Choice) -> Choice:
        """The config with the model's own choices, if a prefix of it fits the model."""
        config = config.resolved(self.defaults)
        slots = config.slots(self.geometry.kinds)
        if isinstance(config, PrefixConfig) and config.share == "simple":
            for slot in slots:
                list(self.projection_parameters(slot))  # which refuses a layer that it does not know
        return config

    def install(self, prefix: Attached) -> None:
        """Adds a prefix, which becomes the active one: of passes that begin then, if the model serves meanwhile."""
        with _changing:
            self._refuse_lent()
            if not self.prefixes:
                self.flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
                self.wrapped = _in_peft(self.model)
                self.model.requires_grad_(False)
            try:
                if not self.prefixes:
                    self.enter()
                    self.model.__dict__["zero_grad"] = self.zero_grad
                self.verify(prefix)
            except BaseException:
                if not self.prefixes:
                    self._undo()
                raise
            self.prefixes = [*self.prefixes, prefix]
            self.prefix = prefix
        watched(prefix)

    def activate(self, prefix: Attached) -> None:
        """Of one that is here, or of a copy of one: a guest, who goes with the last of those that are here."""
        if not self.prefixes:
            raise ValueError("the prefix is a copy of one that is detached from its model; attach or load a new one")
        self._refuse_lent()
        self.prefix = prefix

    def remove(self, prefix: Attached) -> None:
        """Takes a prefix away; with the last one the model is as it was before `attach`."""
        with _changing:
            self._refuse_lent()
            here = [p for p in self.prefixes if p is not prefix]
            guest, self.prefixes = len(here) == len(self.prefixes), here
            if self.prefix is prefix or not self.prefixes:
                self.prefix = self.prefixes[-1] if self.prefixes else None
            if not self.prefixes and not guest:
                self._undo()

    @contextmanager
    def lent(self, guest: Attached) -> Iterator[None]:
        """Inside, `guest` is what the model attends to, and the prefixes stay what they are."""
        before, self.prefix, self._lent = self.prefix, guest, True
        try:
            yield
        finally:
            self.prefix, self._lent = before, False

    def _refuse_lent(self) -> None:
        if self._lent:
            raise ValueError("the model reads shared prompts; leave their context before its prefixes change")

    def _undo(self) -> None:
        self.leave()
        self.model.__dict__.pop("zero_grad", None)
        if _in_peft(self.model) and not self.wrapped:
            return  # PEFT came later and froze the model for itself
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The model's while it has prefixes: loops that zero the model's gradients mean all that they train."""
        type(self.model).zero_grad(self.model, set_to_none)
        for prefix in self.prefixes:
            prefix.zero_grad(set_to_none)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for prefix in self.prefixes:
            # copied before its model, as when both are in one module, it would still be on the original
            prefix.__dict__["_adapter"] = self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before = self.active
        self.active = False
        self.switch(False)
        try:
            yield
        finally:
            self.active = before
            if self.prefixes:  # else all were detached inside, and the model is as it was before
                self.switch(before)


@contextmanager
def making() -> Iterator[None]:
    """Where a prefix is made: its parameters can be trained and have numbers, wherever the caller is."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; each in its own afterwards."""
    modes = [module for module in model.modules() if module.training]
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module in modes:
            module.training = True


def _in_peft(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("peft.") for module in model.modules())
