"""The switch for batch invariance, which holds for the process: backends read it when they plan a pass."""

from contextlib import AbstractContextManager, ExitStack

import torch

_on = False


def batch_invariant() -> bool:
    """Whether a sample's bits have to be the same in every batch."""
    return _on


def use_batch_invariant_kernels(mode: bool = True) -> AbstractContextManager[object]:
    """Whether each sample has the same bits in every batch, whatever else is in it: on every backend.

    It holds from this call on for all of the process, forward and backward, compiled programs too, as
    ``torch.use_deterministic_algorithms`` does. In a ``with`` statement it holds until the end of that: a backward
    pass must run in there as well.

    Gradients that samples share (of a shared prefix, of a bank, of a shared memory or mask, of sinks) are sums over the
    batch, and depend on it. Dropout numbers samples by their places in the batch. docs/op.md says what holds without
    the switch, and what it costs.

    Raises:
        ValueError: ``mode`` is no bool.
        RuntimeError: It was called in a function that is compiled, whose graph would not have it.
    """
    global _on
    if not isinstance(mode, bool):
        raise ValueError(f"mode is {mode!r:.40}, expected a bool")
    if torch.compiler.is_compiling():
        raise RuntimeError("use_batch_invariant_kernels switches the process; call it outside of what is compiled")
    before = ExitStack()
    before.callback(_set, _on)
    _on = mode
    return before


def _set(mode: bool) -> None:
    global _on
    _on = mode
