"""Hugging Face models through registered attention and mask functions.

The prefixes of a forward travel as a keyword argument (`prefix_call`) through the model's layers to the attention
function: no cache and no mask knows of them, nothing is kept on the modules between calls, and a layer that gradient
checkpointing runs again meets the tensors it met the first time.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from prefixattn.attach.hf.masks import columns_differ, explicit_mask, hides_later, read, smallest_mask, with_window
from prefixattn.attach.hf.packed import packed_rows
from prefixattn.attach.records import LayerPrefix, PrefixCall
from prefixattn.attention.functional import prefix_attention, prefix_attention_varlen
from prefixattn.attention.sequences import Sequences

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
    window: tuple[int, int] = (-1, -1)
    small: bool = True  # no mask, or one without a row for each query


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


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, Dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,  # Gemma 2's
    position_bias: Tensor | None = None,  # T5's, added to the scores
    s_aux: Tensor | None = None,  # gpt-oss' sinks [H]
    indices: Tensor | None = None,  # DeepSeek V3.2's: the keys that each query may see, [B, L, n]
    prefix_call: PrefixCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' `AttentionInterface`; returns `[B, L, H, Dv]` and no weights."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError("attention with a prefix does not take cache")
    slot = getattr(module, "prefix_slot", None)
    if slot is not None and prefix_call is None:
        raise NotImplementedError(
            f"a {type(module).__name__} with a prefix was run without it: the call passed the model's hooks by. Call "
            "the model, or its encoder or decoder, itself: model(...), not model.forward(...) and not a layer alone; "
            "without the prefix: disabled() or detach()"
        )
    call = prefix_call or PLAIN
    _check_blocks(module, kwargs.get("block_indices"), key.shape[2])
    if indices is not None and indices.shape[-1] < key.shape[2]:
        attention_mask = _of_chosen(attention_mask, indices, key.shape[2], module)
    said = read(attention_mask, is_causal, module, key.shape[2], kwargs.get("sliding_window"))
    small = attention_mask is None or attention_mask.ndim != 4 or attention_mask.shape[2] == 1
    attention_mask = said.visible
    if not torch.compiler.is_compiling() and _watching.calls is not None:
        carried, used = prefix_call is not None, call.has(slot)
        _, H, L, _ = query.shape
        causal = said.causal or hides_later(attention_mask)
        seen = Watched(module, H, L, key, value, carried, used, causal, said.window, small)
        _watching.calls.append(seen)
    if attention_mask is not None:
        if (columns := attention_mask.shape[-1]) != key.shape[2]:
            if not said.causal or columns > key.shape[2]:
                raise ValueError(columns_differ(columns, key.shape[2]))
            key, value = key[:, :, :columns], value[:, :, :columns]  # without unused slots of a static cache
        if not any(attention_mask.stride()) or (call.packed is not None and small):
            attention_mask = None  # one number, which says that all are visible; and packed sequences have no padding
    slides = slot in call.prefixes and slot in call.windows
    if slides and said.window[0] < 0:
        window = call.windows[slot]  # type: ignore[index]
        if said.causal:  # it hides no key yet, but perhaps a part of the prefix
            said = said._replace(window=(window - 1, -1))
        else:
            key, value, said = with_window(key, value, said, window, call.seen, query.shape[2], module)
            attention_mask = said.visible
    if position_bias is not None:
        attention_mask = _biased(position_bias[..., : key.shape[2]], attention_mask)
    options: dict[str, Any] = {}
    found, memory = call.prefixes.get(slot), call.memories.get(slot)  # type: ignore[arg-type]
    if found is None:
        prefix_k, prefix_v = (t.new_empty(t.shape[1], 0, t.shape[3]) for t in (key, value))
    else:
        prefix_k, prefix_v, options = _placed(found, call, query)
    if memory is not None and memory.inside:
        options |= {"memory": memory.matrix.to(query.dtype), "phi": memory.phi}
    want_mass = call.masses is not None and found is not None
    options |= {
        "dropout_p": dropout,
        "is_causal": said.causal,
        "window_size": said.window,
        "prefix_in_window": slides,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
        "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.to(query.dtype),
        "return_prefix_mass": want_mass,
    }
    if call.packed is not None and attention_mask is None:
        out = _of_sequences(query, key, value, prefix_k, prefix_v, call.packed, options)
    else:
        if call.packed is not None:
            _check_one_for_all(module, prefix_k, options)
        out = prefix_attention(query, key, value, prefix_k, prefix_v, attn_mask=attention_mask, **options)
    if want_mass:
        out, call.masses[slot] = out  # type: ignore[index]
    assert isinstance(out, Tensor)
    if memory is not None and not memory.inside:
        out = out + memory.added(query)
    return out.transpose(1, 2).contiguous(), None  # [B, L, H, Dv]


def _of_sequences(
    query: Tensor, key: Tensor, value: Tensor, prefix_k: Tensor, prefix_v: Tensor, packed: Sequences, options: Any
) -> Tensor | tuple[Tensor, ...]:
    """Attention of packed sequences, with the axes of the rows that they lie in."""
    (B, H, L, _), Dv = query.shape, value.shape[3]
    made = prefix_attention_varlen(
        *(packed_rows(query), packed_rows(key), packed_rows(value), prefix_k, prefix_v),
        *(packed.cu_seqlens_q.to(query.device), packed.cu_seqlens_k.to(query.device)),
        *(packed.max_seqlen_q, packed.max_seqlen_k),
        **options,
    )
    if isinstance(made, Tensor):
        return made.view(B, L, H, Dv).transpose(1, 2)
    out, mass = made  # [B * L, H, Dv], [H, B * L]
    return out.view(B, L, H, Dv).transpose(1, 2), mass.view(H, B, L).transpose(0, 1)


def _check_one_for_all(module: nn.Module, prefix_k: Tensor, options: dict[str, Any]) -> None:
    """NotImplementedError if packed sequences under a mask of the model's own have a prefix each."""
    if prefix_k.dim() == 4 or options.get("prefix_ids") is not None or options.get("prefix_lengths") is not None:
        raise NotImplementedError(
            f"a {type(module).__name__} got a mask of its own for packed sequences, which does not say whose a token "
            "is; pad the sequences, or use one prefix for all"
        )


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


def _check_blocks(module: nn.Module, blocks: Tensor | None, S: int) -> None:
    """NotImplementedError if a query may see some blocks of keys only, [B, heads, L, blocks], as MiniMax M3's do."""
    if blocks is None:
        return
    size = getattr(getattr(module, "indexer", None), "block_size", 0)
    if S > blocks.shape[-1] * size:
        raise NotImplementedError(
            f"a {type(module).__name__} lets a query see {blocks.shape[-1]} blocks of {size} keys; attention with a "
            f"prefix sees all keys, so it takes no more than these, and there are {S}"
        )


def _of_chosen(mask: Tensor | None, indices: Tensor, S: int, module: nn.Module) -> Tensor:
    """The mask [B, 1, L, S] without the keys that are in no `indices` of their query."""
    if mask is None or mask.ndim != 4:
        raise NotImplementedError(
            f"a {type(module).__name__} chooses keys for each query, and has no mask with a row for each"
        )
    chosen = indices.new_zeros((*indices.shape[:2], S), dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, float("-inf"))


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
    AttentionMaskInterface.register(EXPLICIT[_form], partial(explicit_mask, _make))
