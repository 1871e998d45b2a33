"""Hugging Face models through their registered attention and mask functions, both named "prefixattn".

The prefixes of a forward travel as a keyword argument (`prefix_call`) through the model's layers to the attention
function: no cache and no mask knows of them, nothing is kept on the modules between calls, and a layer that gradient
checkpointing runs again meets the tensors it met the first time.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prefixattn.attach.attached import LayerPrefix, PrefixCall
from prefixattn.functional import prefix_attention

NAME = "prefixattn"
PLAIN = PrefixCall({}, 0.0)


class Watched(NamedTuple):
    """A call of the attention function while it is watched."""

    module: nn.Module
    heads: int
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor
    carried: bool  # the prefixes came along
    used: bool  # and there was one for this layer


_watching: list[Watched] | None = None


@contextmanager
def watched() -> Iterator[list[Watched]]:
    """Collects the calls of the attention function inside."""
    global _watching
    before, _watching = _watching, []
    try:
        yield _watching
    finally:
        _watching = before


def arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of a forward's arguments."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def padding_and_causality(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,  # [B, tokens seen]
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward, in the smallest form that says it.

    None: no padding. `[B, n]`, bool: key padding; keys from n on are unused slots of a static cache. For both,
    causality is the attention's own affair. `generate` makes masks ahead of the model's forward and passes them to it,
    so this function may meet its own result. Anything else (packed sequences, a prompt longer than one token in a
    compiled static cache) is the explicit `[B, 1, L, S]` of transformers, which contains causality.
    """
    causal = mask_function is causal_mask_function or _within_window(kv_length, kv_offset, **kwargs)
    plain = causal or mask_function is bidirectional_mask_function
    tracing = torch.compiler.is_compiling()
    if not plain or kv_offset or (causal and isinstance(q_offset, Tensor) and q_length > 1 and tracing):
        explicit = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **explicit,
        )
    if causal and isinstance(q_offset, Tensor) and q_length == 1:
        # One query at a position only the device knows: the filled slots are those up to it.
        filled = torch.arange(kv_length, device=device)[None] <= q_offset  # [1, S]
        if attention_mask is None:
            return filled.expand(batch_size, kv_length)
        missing = max(kv_length - attention_mask.shape[-1], 0)
        return filled & nn.functional.pad(attention_mask[:, :kv_length], (0, missing))
    end = int(q_offset) + q_length if causal else kv_length
    if attention_mask is None:
        return None if end == kv_length else torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, end)
    if attention_mask.shape[-1] < end:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns, expected {end}: one for each token in the cache "
            f"and in the input (a prefix has none)"
        )
    padding = attention_mask[:, :end]
    # Looking for padding would stop a GPU until its queue is empty; there the mask is simply read.
    if end == kv_length and padding.device.type == "cpu" and not tracing and bool(padding.all()):
        return None
    return padding


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
    prefix_call: PrefixCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' `AttentionInterface`; returns `[B, L, H, D]` and no weights."""
    for name in ("s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with a prefix does not take {name}")
    slot = getattr(module, "prefix_slot", None)
    call = prefix_call or PLAIN
    if _watching is not None:
        _watching.append(Watched(module, query.shape[1], key, value, prefix_call is not None, call.has(slot)))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None:
        if attention_mask.ndim == 2:
            width = attention_mask.shape[1]
            key, value = key[:, :, :width], value[:, :, :width]
            attention_mask = attention_mask[:, None, None, :]
        else:
            causal = False
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
        return_prefix_mass=want_mass,
        **options,
    )
    if want_mass:
        out, call.masses[slot] = out  # type: ignore[index]
    assert isinstance(out, Tensor)
    if memory is not None and not memory.inside:
        out = out + memory.added(query)
    return out.transpose(1, 2).contiguous(), None  # [B, L, H, D]


def _placed(found: LayerPrefix, call: PrefixCall, query: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The prefixes in the query's type and on its device, with the keyword arguments that go with them."""
    key, value = found
    ids, lengths = call.ids, call.lengths
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
AttentionMaskInterface.register(NAME, padding_and_causality)
