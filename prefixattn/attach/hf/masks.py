"""The masks of Hugging Face models in the smallest form that says them, made for and read by the attention function.

Axes tell what a mask means, where False is padding among the keys:

- two, `[B, n]`: causal; keys from n on are unused slots of a static cache;
- three, `[B, 1, S + w]`: causal, within a window of w keys, the query's own among them;
- four, as SDPA's: what it holds, no causality besides;
- five, `[B, 1, 1, 1, S + w]`: a window of w keys to either side, the query's own among them.

w is in a size, since `generate` copies masks, and layers on other devices do. The last w columns mean nothing. One
number expanded to all axes says that there is no padding. With two or three axes the last query is the last key that is
there, as `prefix_attention` aligns causality and windows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from prefixattn.attach.hf import packed


class Read(NamedTuple):
    """What a mask says."""

    visible: Tensor | None  # with four axes; None: all keys
    causal: bool  # besides
    window: tuple[int, int] = (-1, -1)  # as `window_size` of prefix_attention


class _Form(NamedTuple):
    """What a mask function of transformers says."""

    causal: bool
    window: int | None = None  # keys, the query's own among them


def smallest_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,  # [B, tokens seen]
    device: torch.device | str = "cpu",
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward, in the smallest form that says it.

    `generate` makes masks ahead of the model's forward and passes them to it, so this function may meet its own result.
    What has no small form (a chunk, a prompt longer than one token in a compiled static cache, what
    may not be skipped, as the model may rework it) is the explicit `[B, 1, L, S]` of transformers, which contains
    causality and the window. Where the layers get packed sequences, the form is that of one of them.
    """
    if attention_mask is not None and attention_mask.ndim == 3:
        return attention_mask
    form = _form(mask_function)
    if packed.announced():
        form = _of_a_sequence(mask_function)
        # transformers lets none be skipped that packs; a model that reworks its masks is not told of packed sequences
        allow_is_causal_skip = form is not None
    if form is None and _within_chunk(kv_length, kv_offset, allow_is_causal_skip=allow_is_causal_skip, **kwargs):
        form = _Form(True)
    tracing = torch.compiler.is_compiling()
    on_device = isinstance(q_offset, Tensor)
    attention_mask = _checked(attention_mask, kv_length, kv_offset, q_length, q_offset, mask_function)
    if form is None:
        plain = False
    elif form.window is not None:
        plain = _says_window(form, q_length, kv_length, q_offset, kv_offset)
        plain = plain and (allow_is_causal_skip if form.causal else allow_is_bidirectional_skip)
    elif form.causal:
        # a compiled decoding step may not skip a mask, and gets one all the same
        plain = (allow_is_causal_skip or q_length == 1) and not (on_device and q_length > 1 and tracing)
    else:
        plain = allow_is_bidirectional_skip
    if form is None or not plain or (kv_offset and form.window is None):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **kwargs,
        )
    if form == _Form(True) and q_length == 1 and (on_device or not allow_is_causal_skip):
        # One query, perhaps at a position only the device knows: the filled slots are those up to it.
        filled = torch.arange(kv_length, device=device)[None] <= q_offset  # [1, S]
        if attention_mask is None:
            visible = filled.expand(batch_size, kv_length)
        else:
            missing = max(kv_length - attention_mask.shape[-1], 0)
            visible = filled & nn.functional.pad(attention_mask[:, :kv_length], (0, missing))
        # a model that may not skip a mask may rework it, and knows four axes
        return visible if allow_is_causal_skip else visible[:, None, None, :]
    end = int(q_offset) + q_length if form.causal else kv_length
    # Looking for padding would stop a GPU until its queue is empty; there the mask is simply read.
    looked_at = attention_mask is not None and attention_mask.device.type == "cpu" and not tracing
    if attention_mask is None or (looked_at and bool(attention_mask[:, kv_offset:end].all())):
        padding = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, end - kv_offset)
    else:
        padding = attention_mask[:, kv_offset:end]
    if form.window is None or end - kv_offset < kv_length:
        return padding if form.causal else padding[:, None, None, :]
    wider = end - kv_offset + form.window
    all_visible = not any(padding.stride())
    padding = padding[:, :1].expand(-1, wider) if all_visible else nn.functional.pad(padding, (0, form.window))
    return padding[:, None] if form.causal else padding[:, None, None, None]


def _says_window(form: _Form, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """Whether a small form says a window: the last query is the last key, or there are no more keys than it shows."""
    if isinstance(q_offset, Tensor):
        return False
    keys = q_offset + q_length - kv_offset
    if not form.causal:
        return keys == kv_length and not q_offset
    return keys == kv_length or (keys <= (form.window or 0) and not kv_offset)


def read(mask: Tensor | None, is_causal: bool | None, module: nn.Module, S: int, sliding_window: Any = None) -> Read:
    """What a mask of `smallest_mask` or of transformers says of S keys.

    The mask was made by the function that the model asked for, so it knows. Where a model asked for none, the layer
    says it, as it says it to transformers' own attention. `sliding_window` is what a layer tells FlashAttention; of
    some it is in the config alone. Some tell it where they see all, so it makes no window but is that of the mask.
    """
    if mask is None:
        return Read(None, bool(getattr(module, "is_causal", False) if is_causal is None else is_causal))
    if mask.ndim == 2:
        return Read(mask[:, None, None, :], True)
    if mask.ndim == 4:
        return Read(mask, False)
    window = mask.shape[-1] - S
    if sliding_window is None:
        sliding_window = getattr(getattr(module, "config", None), "sliding_window", None)
    # to both sides masks count the distance, and T5Gemma tells FlashAttention that too (transformers 5.23)
    if sliding_window != window and not (mask.ndim == 5 and sliding_window == window - 1):
        raise NotImplementedError(
            f"a {type(module).__name__} has a window of {sliding_window}, and its mask one of {window}; a prefix takes "
            "layers whose masks have their window"
        )
    if mask.ndim == 3:
        return Read(mask[:, :, None, :S], True, (window - 1, -1))
    return Read(mask[:, 0, :, :, :S], False, (window - 1, window - 1))


def with_window(
    key: Tensor, value: Tensor, said: Read, window: int, seen: int, queries: int, module: nn.Module
) -> tuple[Tensor, Tensor, Read]:
    """Keys, values and mask of a pass after `seen` tokens, where an explicit mask has hidden what the window hides.

    A prefix that lies in the window has its place before the first key, if the last query is the last key. So a static
    cache is cut where its unused slots begin. One that is full holds the window, and all of the prefix is behind it.
    """
    if queries > 1 or said.visible is None:
        raise NotImplementedError(
            f"a {type(module).__name__} got a mask of its own for {queries} tokens (packed sequences, images, a mask "
            "with four axes), which does not say where a prefix lies; use a mask [B, n] of padding, or a prefix with "
            "prefix_in_window=False"
        )
    end = min(key.shape[2], seen + queries)
    return key[:, :, :end], value[:, :, :end], Read(said.visible[..., :end], False, (window - 1, -1))


def columns_differ(found: int, expected: int) -> str:
    """The words for a mask of another width than the tokens'."""
    return (
        f"attention_mask has {found} columns, expected {expected}: one for each token in the cache and in the input (a "
        "prefix has none)"
    )


def explicit_mask(form: Callable[..., Any], **kwargs: Any) -> Tensor | None:
    """The mask in the form that transformers' own attention `form` gets, never left out."""
    function = kwargs.get("mask_function", causal_mask_function)
    offsets = kwargs.get("kv_offset", 0), kwargs["q_length"], kwargs.get("q_offset", 0)
    mask = _checked(kwargs.get("attention_mask"), kwargs["kv_length"], *offsets, function)
    never = {"attention_mask": mask, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Tensor | None = form(**{**kwargs, **never})
    return made


def hides_later(mask: Tensor | None) -> bool:
    """Whether an explicit mask hides every later token from an earlier one."""
    if mask is None or mask.shape[-2] < 2 or mask.shape[-2] != mask.shape[-1] or mask.device.type == "meta":
        return False
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not bool(visible.triu(1).any())


def _form(mask_function: Callable[..., Any]) -> _Form | None:
    """What a mask function says, or None if it has no small form.

    transformers makes that of a window by `and_masks` of an overlay, whose closure has the size. `local_size` would say
    no more than that there is a window or a chunk.
    """
    if mask_function is causal_mask_function:
        return _Form(True)
    if mask_function is bidirectional_mask_function:
        return _Form(False)
    if getattr(mask_function, "__code__", None) is not packed.AND:
        return None
    parts = packed.inside(mask_function)
    if len(parts) != 2:
        return None
    overlay, base = parts
    code = getattr(overlay, "__code__", None)
    if code is _WINDOW and base is causal_mask_function:
        return _Form(True, int(packed.inside(overlay)))
    if code is _BOTH_SIDES and base is bidirectional_mask_function:
        return _Form(False, int(packed.inside(overlay)) + 1)  # it counts the distance
    return None


def _of_a_sequence(mask_function: Callable[..., Any]) -> _Form | None:
    """What a mask function says of each of several packed sequences, or None if it has no small form."""
    base = packed.without_packing(mask_function)
    form = _form(mask_function if base is None else base)  # gpt-oss tells its masks no positions (transformers 5.23)
    if form is None and base is None:
        raise NotImplementedError(
            "the batch is of packed sequences, and a mask of the model's is neither causal nor a window and does not "
            "say where they begin; pad the sequences"
        )
    return form


_WINDOW = sliding_window_overlay(1).__code__
_BOTH_SIDES = sliding_window_bidirectional_overlay(1).__code__


def _checked(
    attention_mask: Tensor | None,
    kv_length: int,
    kv_offset: int,
    q_length: int,
    q_offset: int | Tensor,
    mask_function: Callable[..., Any],
) -> Tensor | None:
    """The caller's padding `[B, n]`, if it has a column for each token; None if nothing is padded."""
    if attention_mask is None:
        return None
    columns, keys = attention_mask.shape[-1], kv_length + kv_offset  # slots of a cache, filled or not
    # of bidirectional attention the attention itself knows how many keys there are
    known = mask_function is not bidirectional_mask_function and not isinstance(q_offset, Tensor)
    if columns != int(q_offset) + q_length if known else columns > keys:
        raise ValueError(columns_differ(columns, int(q_offset) + q_length if known else keys))
    return attention_mask


def _within_chunk(
    kv_length: int, kv_offset: int, local_size: int | None = None, allow_is_causal_skip: bool = True, **_: Any
) -> bool:
    """True if a chunk is all that a mask adds to causality, and hides nothing."""
    return local_size is not None and allow_is_causal_skip and not kv_offset and kv_length <= local_size
