"""Which prefix a layer of a timm model meets.

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

from prefixattn.attach.adapter import Adapter
from prefixattn.attach.base import Attached
from prefixattn.attach.records import PrefixCall

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

    active = True  # False inside `disabled`
    override: PrefixCall | None = None  # what attach tries
    running: _Pass | None = None
    whole = False  # inside the model's own forward
    call: PrefixCall | None = None  # what the layers of that get
    met: frozenset[int] = frozenset()  # those that got it


class PassingAdapter(Adapter):
    """Hands the prefixes of a forward pass to layers that know the adapter, and of themselves their slot."""

    found: list[Any]  # the layers, by slot

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        super().__init__(model, base)
        self.embedded = False  # the passes begin at the embedding of patches; else at the model
        self.passes = _Passes()
        self.traced: PrefixCall | None = None  # the pass that is being compiled, which knows no threads
        self.apart = False  # a layer ran in compiled code of its own

    def lost(self, slots: list[int]) -> str | None:
        """Why layers that got no call should have got one; None if they were taken out of the model."""
        raise NotImplementedError

    def switch(self, on: bool) -> None:
        # layers that get no prefix run timm's own forward pass
        self.forget()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """In this thread alone; compiled code knows no threads."""
        passes, before = self.passes, self.passes.active
        passes.active = False
        try:
            with super().disabled():
                yield
        finally:
            passes.active = before

    def activate(self, prefix: Attached) -> None:
        super().activate(prefix)
        self.forget()

    @contextmanager
    def overriding(self, call: PrefixCall) -> Iterator[None]:
        """Inside, this thread's layers get `call`."""
        self.passes.override = call
        try:
            yield
        finally:
            self.passes.override = None

    # hooks

    def before_model(self, module: nn.Module, args: Any) -> None:
        self.forget()
        if not torch.compiler.is_compiling():
            self.apart = False
            self.passes.whole, self.passes.call, self.passes.met = True, None, frozenset()
        if not self.embedded:
            self.begin(module, args)

    def after_model(self, module: nn.Module, args: Any, out: Any) -> None:
        passes = self.passes
        call = None if torch.compiler.is_compiling() or passes.override is not None else passes.call
        self.forget()
        # a pass that raised has no output
        if call is None or out is None or self.apart:
            return
        missing = sorted({*call.prefixes, *call.memories} - passes.met)
        if missing and (why := self.lost(missing)) is not None:
            raise ValueError(why)

    def begin(self, module: nn.Module, args: Any) -> None:
        """A hook on what every forward pass runs first: computes the prefixes."""
        call = self.new_call(args)
        if torch.compiler.is_compiling():
            self.traced = call
            return
        passes, state = self.passes, None if self.passes.whole else self._state()
        # of a pass of which nobody knows the end: what one that stopped early had may not be what the prefix has later
        passes.running = _Pass(call, holds=lambda: state is None or state == self._state())
        passes.call = call

    def before_block(self, block: nn.Module, args: Any) -> None:
        """A hook on each block: one that a checkpoint runs again, in the backward, gets the prefixes it had.

        A checkpoint keeps what a block was given and gives it again. So the pass is written on that tensor or, where it
        has one, on its node in the graph, which outlives it if saved tensors are packed. The prefixes were computed
        outside the checkpoint, and their gradients flow through the graph of the first run.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not args or not isinstance(args[0], Tensor):
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

    # what they stand on

    def forget(self) -> None:
        if torch.compiler.is_compiling():
            self.traced = None
        else:
            self.passes.running, self.passes.whole = None, False

    def new_call(self, args: tuple[Any, ...]) -> PrefixCall:
        """The prefixes of a pass that begins now, with a module that gets `args`."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.passes.override is not None:
            return self.passes.override
        prefix = self.prefix
        if prefix is None or not (self.active if compiling else self.passes.active):
            return PLAIN
        if not compiling:
            self._refuse_tracers(args)
        if torch.is_grad_enabled() and getattr(self.base, "grad_checkpointing", False) and use_reentrant_ckpt():
            raise NotImplementedError(
                "a prefix with reentrant checkpoints: no input of a frozen model's first block wants a gradient, and "
                "such checkpoints pass none on; call timm.layers.set_reentrant_ckpt(False)"
            )
        prefix.begin()
        return prefix.call(prefix.choose(None, 0, self.dtype(), self.device))

    @staticmethod
    def _refuse_tracers(args: tuple[Any, ...]) -> None:
        tracer = "torch.jit.trace" if torch.jit.is_tracing() else ""
        if any(isinstance(arg, torch.fx.Proxy) for arg in args):
            tracer = "torch.fx's symbolic tracing"
        if tracer:
            raise NotImplementedError(
                f"{tracer} cannot record attention with a prefix; torch.export.export can. For the model without its "
                "prefix trace inside prefix.disabled(), or call prefix.detach() before"
            )

    def call_for(self, slot: int, x: Any) -> PrefixCall:
        """What a layer gets with its forward pass on x."""
        last = slot == len(self.found) - 1
        if torch.compiler.is_compiling():
            call = self.traced
            # a compiled checkpoint may change nothing outside it
            checkpointing = getattr(self.base, "grad_checkpointing", False)
            if call is None:
                if not checkpointing:
                    self.apart = True
                return self.new_call((x,))
            if last and not checkpointing:
                self.traced = None
            return call
        passes = self.passes
        running = passes.running
        passes.met |= {slot}
        if running is None or not running.reaches(slot):
            passes.running = None
            passes.call = call = self.new_call((x,))
            return call
        running.slot = slot + 1
        if last:
            passes.running = None
        return running.call

    def _state(self) -> Any:
        prefix = self.prefix
        return None if prefix is None else (torch.is_grad_enabled(), prefix.state())

    def dtype(self) -> torch.dtype:
        """The type that attention computes in."""
        device_type = self.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        dtype: torch.dtype = self.found[0].proj.weight.dtype
        return dtype

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "passes": None, "traced": None, "active": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "passes": _Passes()})
