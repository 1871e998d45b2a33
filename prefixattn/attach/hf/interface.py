"""Hugging Face models through registered attention and mask functions.

The prefixes of a forward travel as a keyword argument (`prefix_call`) through the model's layers to the attention
function: no cache and no mask knows of them, nothing is kept on the modules between calls, and a layer that gradient
checkpointing runs again meets the tensors it met the first time.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

from prefixattn.attach.records import LayerPrefix, PrefixCall
from prefixattn.attention.functional import prefix_attention

NAME = "prefixattn"  # with masks in their smallest form
EXPLICIT = {
    form: f"{NAME}_{form}_masks" for form in ("sdpa", "eager")
}  # in transformers' own, for models that rework them
NAMES = (NAME, *EXPLICIT.values())
PLAIN = PrefixCall({}, 0.0)


class Watched(NamedTuple):
    """A call of the attention function while it is watched."""

    module: nn.Module
    heads: int
    queries: int  # L
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor
    carried: bool  # the prefixes came along
    used: bool  # and there was one for this layer
    causal: bool


class _Watching(threading.local):
    calls: list[Watched] | None = None  # of this thread alone


_watching = _Watching()


@contextmanager
def watched() -> Iterator[list[Watched]]:
    """Collects this thread's calls of the attention function inside; for who watches around it too."""
    before, calls = _watching.calls, list[Watched]()
    _watching.calls = calls
    try:
        yield calls
    finally:
        _watching.calls = before
        if before is not None:
            before += calls


def arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of a forward's arguments."""
    cls = type(module)
    if cls not in _arguments:  # written out: functools.cache is nothing that torch.compile looks through
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
        names = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        kinds = {p.kind for p in parameters}
        # of what only hands all its arguments on, the part behind it knows their names
        _arguments[cls] = (
            names,
            inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds,
        )
    return _arguments[cls][0]


def passes_on(module: nn.Module) -> bool:
    """Whether a forward takes keyword arguments that it does not know, which it may hand to its layers."""
    arguments(module)
    return _arguments[type(module)][1]


_arguments: dict[type, tuple[tuple[str, ...], bool]] = {}


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

    Two axes: causal. Four: as it is. `[B, n]` and `[B, 1, 1, n]`, bool, are key padding, where keys from n on are
    unused slots of a static cache; one number expanded to that says that there is no padding. `generate` makes masks
    ahead of the model's forward and passes them to it, so this function may meet its own result. Anything else (packed
    sequences, a prompt longer than one token in a compiled static cache, what may not be skipped, as the model may
    rework it) is the explicit `[B, 1, L, S]` of transformers, which contains causality.
    """
    windowed = _within_window(kv_length, kv_offset, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
    causal = mask_function is causal_mask_function or windowed
    tracing = torch.compiler.is_compiling()
    on_device = isinstance(q_offset, Tensor)
    attention_mask = _checked(attention_mask, kv_length, kv_offset, q_length, q_offset, mask_function)
    if causal:
        # a compiled decoding step may not skip a mask, and gets one all the same
        plain = (allow_is_causal_skip or q_length == 1) and not (on_device and q_length > 1 and tracing)
    else:
        plain = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if not plain or kv_offset:
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
    if causal and q_length == 1 and (on_device or not allow_is_causal_skip):
        # One query, perhaps at a position only the device knows: the filled slots are those up to it.
        filled = torch.arange(kv_length, device=device)[None] <= q_offset  # [1, S]
        if attention_mask is None:
            visible = filled.expand(batch_size, kv_length)
        else:
            missing = max(kv_length - attention_mask.shape[-1], 0)
            visible = filled & nn.functional.pad(attention_mask[:, :kv_length], (0, missing))
        # a model that may not skip a mask may rework it, and knows four axes
        return visible if allow_is_causal_skip else visible[:, None, None, :]
    end = int(q_offset) + q_length if causal else kv_length
    # Looking for padding would stop a GPU until its queue is empty; there the mask is simply read.
    looked_at = attention_mask is not None and attention_mask.device.type == "cpu" and not tracing
    if attention_mask is None or (looked_at and bool(attention_mask[:, :end].all())):
        padding = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, end)
    else:
        padding = attention_mask[:, :end]
    return padding if causal else padding[:, None, None, :]


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
        raise ValueError(_columns(columns, int(q_offset) + q_length if known else keys))
    return attention_mask


def _columns(found: int, expected: int) -> str:
    return (
        f"attention_mask has {found} columns, expected {expected}: one for each token in the cache and in the input (a "
        "prefix has none)"
    )


def _explicit_mask(form: Callable[..., Any], **kwargs: Any) -> Tensor | None:
    """The mask in the form that transformers' own attention `form` gets, never left out."""
    function = kwargs.get("mask_function", causal_mask_function)
    offsets = kwargs.get("kv_offset", 0), kwargs["q_length"], kwargs.get("q_offset", 0)
    mask = _checked(kwargs.get("attention_mask"), kwargs["kv_length"], *offsets, function)
    never = {"attention_mask": mask, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Tensor | None = form(**{**kwargs, **never})
    return made


def _within_window(
    kv_length: int, kv_offset: int, local_size: int | None = None, allow_is_causal_skip: bool = True, **_: Any
) -> bool:
    """True if a sliding window is all that a mask adds to causality, and hides nothing."""
    return local_size is not None and allow_is_causal_skip and not kv_offset and kv_length <= local_size


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,  # Gemma 2's
    position_bias: Tensor | None = None,  # T5's, added to the scores
    s_aux: Tensor | None = None,  # gpt-oss' sinks [H]
    prefix_call: PrefixCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' `AttentionInterface`; returns `[B, L, H, D]` and no weights."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError("attention with a prefix does not take cache")
    if key.shape[3] != value.shape[3]:
        raise NotImplementedError(
            f"a {type(module).__name__} has keys of width {key.shape[3]} and values of width {value.shape[3]}; "
            "attention with a prefix takes one width for both"
        )
    slot = getattr(module, "prefix_slot", None)
    if slot is not None and prefix_call is None:
        raise NotImplementedError(
            f"a {type(module).__name__} with a prefix was run without it: the call passed the model's hooks by. Call "
            "the model, or its encoder or decoder, itself: model(...), not model.forward(...) and not a layer alone; "
            "without the prefix: disabled() or detach()"
        )
    call = prefix_call or PLAIN
    attention_mask, causal = _read(attention_mask, is_causal, module)
    if not torch.compiler.is_compiling() and _watching.calls is not None:
        carried, used = prefix_call is not None, call.has(slot)
        _, H, L, _ = query.shape
        seen = Watched(module, H, L, key, value, carried, used, causal or _hides_later(attention_mask))
        _watching.calls.append(seen)
    if attention_mask is not None:
        if (columns := attention_mask.shape[-1]) != key.shape[2]:
            if not causal or columns > key.shape[2]:
                raise ValueError(_columns(columns, key.shape[2]))
            key, value = key[:, :, :columns], value[:, :, :columns]  # without unused slots of a static cache
        if not any(attention_mask.stride()):
            attention_mask = None  # one number, which says that all are visible
    if position_bias is not None:
        attention_mask = _biased(position_bias[..., : key.shape[2]], attention_mask)
    options: dict[str, Any] = {}
    found, memory = call.prefixes.get(slot), call.memories.get(slot)  # type: ignore[arg-type]
    if found is None:
        prefix_k = prefix_v = key.new_empty(key.shape[1], 0, key.shape[3])
    else:
        prefix_k, prefix_v, options = _placed(found, call, query)
    if memory is not None and memory.inside:
        options |= {"memory": memory.matrix.to(query.dtype), "phi": memory.phi}
    want_mass = call.masses is not None and found is not None
    out = prefix_attention(
        query,
        key,
        value,
        prefix_k,
        prefix_v,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        return_prefix_mass=want_mass,
        **options,
    )
    if want_mass:
        out, call.masses[slot] = out  # type: ignore[index]
    assert isinstance(out, Tensor)
    if memory is not None and not memory.inside:
        out = out + memory.added(query)
    return out.transpose(1, 2).contiguous(), None  # [B, L, H, D]


def _read(mask: Tensor | None, is_causal: bool | None, module: nn.Module) -> tuple[Tensor | None, bool]:
    """What a mask says: which keys are visible (None: all), and causality besides.

    The mask was made by the function that the model asked for, so it knows. Where a model asked for none, the layer
    says it, as it says it to transformers' own attention.
    """
    if mask is None:
        return None, bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    return (mask[:, None, None, :], True) if mask.ndim == 2 else (mask, False)


def _hides_later(mask: Tensor | None) -> bool:
    """Whether an explicit mask hides every later token from an earlier one."""
    if mask is None or mask.shape[-2] < 2 or mask.shape[-2] != mask.shape[-1] or mask.device.type == "meta":
        return False
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not bool(visible.triu(1).any())


def _placed(found: LayerPrefix, call: PrefixCall, query: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The prefixes in the query's type and on its device, with the keyword arguments that go with them."""
    key, value = found
    ids, lengths = call.prefix_ids, call.lengths
    if ids is not None and (key.device != query.device or key.dtype != query.dtype):
        # a layer on another device, or of another type than the model: the whole bank is not to follow it there
        key, value = key[ids], value[ids]
        ids, lengths = None, None if lengths is None else lengths[ids]
    options = {
        "prefix_dropout_p": call.dropout_p,
        "prefix_ids": ids,
        "prefix_lengths": None if lengths is None else lengths.to(query.device),
    }
    return key.to(query.device, query.dtype), value.to(query.device, query.dtype), options


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """One float mask of a bias [1 or B, H, L, S] and a mask of what is visible."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


AttentionInterface.register(NAME, attention_with_prefix)
AttentionMaskInterface.register(NAME, smallest_mask)
for _form, _make in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(EXPLICIT[_form], attention_with_prefix)
    AttentionMaskInterface.register(EXPLICIT[_form], partial(_explicit_mask, _make))
