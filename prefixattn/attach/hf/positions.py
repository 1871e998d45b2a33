"""Where a Hugging Face model's token positions pass, so that a prefix can take the first P of them.

Models make positions in their own ways: counted from 0, from the padding mask, past a padding index, in three axes for
images. So they are not made anew but shifted where the model hands them on: at its rotary or position embedding
(`Positions.embeddings`), found by running it. A model that hands them to its layers takes them as an argument.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.attach.hf import interface, probe


class Positions(NamedTuple):
    """Paths are from the base model on."""

    embeddings: tuple[str, ...] = ()  # modules that are called with positions
    argument: bool = False  # there are none, but the model takes `position_ids`, by default 0, 1, ...
    padded: bool = False  # a rotary model whose positions count padding on the left
    shiftable: bool = False  # they pass where a decoder, or the only stack, can be told others


class Seen(NamedTuple):
    """A call of a position embedding."""

    path: str
    positions: Tensor


def find(base: Any, layers: list[str], plain: list[probe.Trial], decodes: bool) -> Positions:
    """Where positions pass in `base`.

    Args:
        layers: Paths of the layers that attend.
        plain: What the model makes of some inputs, the last ones padded on the left if it takes such.
        decodes: The only stack is causal.
    """
    found: list[list[Seen]] = []
    for trial in (plain[0], plain[-1]):
        with _watched(base, layers) as seen:
            probe.run(base, trial.inputs)
        found.append(seen)
    paths = _innermost(found[0])
    if paths:
        found_there = [base.get_submodule(path) for path in paths]
        # others beside a rotary one are handed positions that they do not use
        rotary = any(map(_is_rotary, found_there)) and not any(isinstance(m, nn.Embedding) for m in found_there)
        counted = all(_counts_from_zero(call.positions) for call in found[1] if call.path in paths)
        stack = base.get_decoder() if base.config.is_encoder_decoder else base
        within = {id(module) for module in stack.modules()}
        shiftable = any(id(base.get_submodule(path)) in within for path in paths)
        return Positions(paths, False, len(plain) > 1 and rotary and counted, shiftable)
    argument = decodes and "position_ids" in interface.arguments(base)
    argument = argument and all(_counts_from_zero_given(base, trial) for trial in plain)
    return Positions((), argument, len(plain) > 1 and argument and any(map(_is_rotary, base.modules())), argument)


def _counts_from_zero_given(base: Any, trial: probe.Trial) -> bool:
    """Whether a model makes of the positions 0, 1, ... what it makes without any."""
    tokens = trial.inputs["input_ids"]
    try:
        out, _ = probe.run(base, {**trial.inputs, "position_ids": _counted(tokens)})
    except Exception:  # whatever a model does that takes no positions after all
        return False
    return probe.differs(trial, out) is None


def _counted(tokens: Tensor) -> Tensor:  # [B, L, ...] -> [B, L]
    """Positions 0, 1, ... of each sample; models look at them by `view`, so no row stands for all."""
    return torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)


def _counts_from_zero(found: Tensor) -> bool:
    """Whether positions are 0, 1, ... in each row, padding or not."""
    return bool((found == torch.arange(found.shape[-1], device=found.device)).all())


@contextmanager
def _watched(base: nn.Module, layers: list[str]) -> Iterator[list[Seen]]:
    """Collects the calls of position embeddings that are outside the layers."""
    seen: list[Seen] = []
    inside = tuple(f"{path}." for path in map(_stack_of_layers, layers))
    with ExitStack() as hooks:
        for path, module in base.named_modules():
            # a layer that a checkpoint runs again would not meet the shift of its pass
            if f"{path}.".startswith(inside) or not _takes_positions(path, module):
                continue

            def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                found = named(module, args, kwargs)[argument(module)]
                if isinstance(found, Tensor) and not found.is_floating_point():
                    seen.append(Seen(path, found))

            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield seen


def _innermost(seen: list[Seen]) -> tuple[str, ...]:
    """The innermost of those that were called: one hands positions on to the next."""
    paths = dict.fromkeys(call.path for call in seen)
    return tuple(path for path in paths if not any(other.startswith(f"{path}.") for other in paths))


def _is_rotary(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return not isinstance(module, nn.Embedding) and ("rot" in name or "rope" in name)


def argument(module: nn.Module) -> str:
    """The name of the argument that has the positions."""
    return "position_ids" if "position_ids" in interface.arguments(module) else "input"


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names; positions that are missing are None."""
    return {argument(module): None, **dict(zip(interface.arguments(module), args, strict=False)), **kwargs}


def replaced(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other positions, where the caller gave them."""
    name = argument(module)
    if name in kwargs:
        return args, {**kwargs, name: positions}
    at = interface.arguments(module).index(name)
    return (*args[:at], positions, *args[at + 1 :]), kwargs


def count(module: nn.Module) -> int | None:
    """How many positions an embedding has; a rotary or computed one has no end."""
    if not isinstance(module, nn.Embedding):
        return None
    return int(module.num_embeddings) - int(getattr(module, "offset", 0))


def padding_on_the_left(mask: Tensor) -> Tensor:  # [B, n] -> [B, 1]
    return (mask.cumsum(-1) == 0).sum(-1, keepdim=True)


def given(kwargs: dict[str, Any], tokens: Tensor) -> Tensor:
    """The argument `position_ids` of a model that hands it to its layers, or what it makes without one."""
    found: Tensor | None = kwargs.get("position_ids")
    if found is not None:
        return found
    cache = kwargs.get("past_key_values")
    return _counted(tokens) + (cache.get_seq_length() if cache is not None else 0)


def shifted(positions: Tensor, shift: int | Tensor, most: int | None) -> Tensor:
    """Positions after those of the prefix, which must be fewer than `most`.

    Args:
        shift: The prefix's length, or one for each sample, [B, 1].
    """
    positions = positions + shift
    if most is not None and positions.device.type == "cpu" and not torch.compiler.is_compiling():
        last = int(positions.max()) if positions.numel() else 0
        if last >= most:
            raise ValueError(
                f"position {last} is past the model's {most} positions, {int(torch.as_tensor(shift).max())} of "
                "which the prefix takes; shorten the input or use positions='unshifted'"
            )
    return positions


def _takes_positions(path: str, module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel):
        return False
    name = path.rpartition(".")[2].lower()
    table = isinstance(module, nn.Embedding) and ("pos" in name or name == "wpe")
    return table or "position_ids" in interface.arguments(module)


def _stack_of_layers(site: str) -> str:
    """The list of layers that an attention is in; layers without one, as in hybrid models, are in it too."""
    found = re.match(r"(.*?)\.\d+(\.|$)", f".{site}")
    return found[1][1:] if found else site
