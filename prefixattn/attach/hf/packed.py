"""Packed sequences of a pass: several in a row of tokens, as flattening collators of transformers make them.

They show in `position_ids` that restart, by the rule of transformers' own masks, or in the keyword arguments of
FlashAttention. The hook on the model looks once for a pass. The layers then get the sequences with their prefixes, and
the mask function, which runs in between, is told to leave them out of its masks.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from prefixattn.attention.sequences import Sequences

FLASH = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"  # of DataCollatorWithFlattening


class _Passing(threading.local):
    """Whether the layers of the pass that this thread runs get packed sequences."""

    packed = False


class _Traced:
    """The same in code that is compiled, where threads are no concern."""

    packed = False


_passing, _traced = _Passing(), _Traced()


def announce(packed: bool) -> None:
    """Tells the mask function whether the layers get packed sequences."""
    if torch.compiler.is_compiling():
        _traced.packed = packed
    else:
        _passing.packed = packed


def announced() -> bool:
    return _traced.packed if torch.compiler.is_compiling() else _passing.packed


def found(
    base: Any, takes: tuple[str, ...], kwargs: dict[str, Any], first: Tensor, small_masks: bool, decodes: bool
) -> Sequences | None:
    """The packed sequences of a pass of `base` on the input `first` [B, L, ...], rows behind one another, or None.

    Args:
        takes: The names of its arguments.
        small_masks: Masks say no more than causality, a window and padding, so what is packed can be left out of them.
        decodes: The layers are causal, so that transformers' masks are for packed sequences where positions restart.
    """
    told = [option for option in FLASH if kwargs.get(option) is not None]
    if told:
        return _told(base, takes, kwargs, told, small_masks)
    places = kwargs.get("position_ids")
    # nothing else is what transformers looks at; compiled code cannot know how many sequences there are
    if torch.compiler.is_compiling() or not small_masks or not decodes or kwargs.get("attention_mask") is not None:
        return None
    if not isinstance(places, Tensor) or places.dim() != 2 or places.shape[1] < 2 or places.device.type == "meta":
        return None
    B, L = first.shape[:2]
    steps = places.diff(dim=1)
    if kwargs.get("past_key_values") is not None or _makes_cache(base, takes, kwargs):
        if bool((steps <= 0).any()):
            raise NotImplementedError(
                "position_ids restart within a row, as of packed sequences, and this pass of "
                f"{type(base).__name__} has a cache, with which transformers takes them for one; pass use_cache=False"
            )
        return None
    starts = torch.ones(B, L, dtype=torch.bool, device=places.device)
    starts[:, 1:] = steps != 1  # as transformers has it
    begins = starts.view(-1).nonzero()[:, 0]  # a GPU is waited for here, once in a pass
    if len(begins) == B:
        return None
    offsets = torch.cat([begins, begins.new_full((1,), B * L)])
    longest = int(offsets.diff().max())
    return Sequences(offsets, offsets, longest, longest)


def _told(base: Any, takes: tuple[str, ...], kwargs: dict[str, Any], told: list[str], small_masks: bool) -> Sequences:
    """Those that the arguments of FlashAttention describe."""
    if missing := [option for option in FLASH if option not in told]:
        raise ValueError(f"{told[0]} came without {missing[0]}; packed sequences are described by {', '.join(FLASH)}")
    if base.config.is_encoder_decoder or not small_masks:
        instead = "pad them" if base.config.is_encoder_decoder else "leave it out and give position_ids that restart"
        raise NotImplementedError(
            f"{told[0]} describes packed sequences, which layers of {type(base).__name__} do not take with a prefix; "
            f"{instead}"
        )
    if kwargs.get("attention_mask") is not None:
        raise NotImplementedError(f"attention_mask came with {told[0]}; packed sequences take none, so leave it out")
    if kwargs.get("past_key_values") is not None:
        raise NotImplementedError(f"past_key_values came with {told[0]}; packed sequences with a prefix take no cache")
    if "position_ids" in takes and kwargs.get("position_ids") is None:
        raise ValueError(
            f"{told[0]} came without position_ids, which would run on from sequence to sequence, away from the prefix; "
            "pass those that restart, as DataCollatorWithFlattening makes them"
        )
    if "use_cache" in takes:
        kwargs["use_cache"] = False  # of no use to a later pass
    lengths = [int(kwargs[option]) for option in FLASH[2:]]
    return Sequences(kwargs[FLASH[0]], kwargs[FLASH[1]], *lengths)


def _makes_cache(base: Any, takes: tuple[str, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a pass without a cache begins one."""
    asked = kwargs.get("use_cache")
    asked = getattr(base.config.get_text_config(), "use_cache", False) if asked is None else asked
    checkpoints = base.training and any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    return bool(asked) and not checkpoints and "use_cache" in takes


def samples(first: Tensor, ids: Any, sequences: Sequences | None) -> tuple[int, Any]:
    """How many there are that have a prefix each, and the `prefix_ids` of them that the caller gave."""
    if sequences is not None:
        if isinstance(ids, Tensor) and ids.shape != (sequences.number,):
            raise ValueError(
                f"prefix_ids has shape {list(ids.shape)}, expected [{sequences.number}], one for each packed sequence"
            )
        return sequences.number, ids
    batch = first.shape[0]
    if first.ndim == 3 and not first.is_floating_point():  # samples, choices, tokens
        batch *= first.shape[1]
        if isinstance(ids, Tensor) and ids.shape == first.shape[:1]:
            ids = ids.repeat_interleave(first.shape[1])
    return batch, ids


def of_tokens(shift: int | Tensor, sequences: Sequences | None, first: Tensor) -> int | Tensor:
    """A shift of positions [n, 1] of packed sequences, for each of their tokens [B, L]."""
    if sequences is None or not isinstance(shift, Tensor):
        return shift
    B, L = first.shape[:2]
    lengths = sequences.cu_seqlens_q.diff().to(shift.device)
    return shift[:, 0].repeat_interleave(lengths, output_size=B * L).view(B, L)


def packed_rows(t: Tensor) -> Tensor:
    """[B, heads, L, D] -> [B * L, heads, D]; a view of what a projection made."""
    return t.transpose(1, 2).flatten(0, 1)


def without_packing(mask_function: Callable[..., Any]) -> Callable[..., Any] | None:
    """What a mask function says besides that sequences are packed, or None if it does not say that."""
    if getattr(mask_function, "__code__", None) is not AND:
        return None
    parts = list(inside(mask_function))
    if len(parts) != 2:
        return None
    others = [part for part in parts if getattr(part, "__code__", None) is not _PACKED]
    if len(others) != 1:
        return None
    other = others[0]
    if _REMAPPED is not None and getattr(other, "__code__", None) is _REMAPPED:
        at = other.__code__.co_freevars.index("mask_function")
        other = other.__closure__[at].cell_contents
    made: Callable[..., Any] = other
    return made


def inside(function: Any) -> Any:
    """What the closure of a mask function holds."""
    return function.__closure__[0].cell_contents


_NONE: Any = None
AND = and_masks(causal_mask_function).__code__
_PACKED = packed_sequence_mask_function(_NONE).__code__
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # not in every version of transformers
_REMAPPED = None if _remap is None else _remap(causal_mask_function, _NONE).__code__
