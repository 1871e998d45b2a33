"""A prefix as a cache of transformers', for models and engines that begin with one and know no prefix.

Such an engine holds P tokens for seen. So the sequence's positions start at P, every layer has as many rows, and in a
layer with a sliding window the rows slide out of sight (`prefix_in_window`). What differs from that is refused here.
Keys in a cache are rotated already, and those of a prefix are never rotated: both go to the queries as they are.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from prefixattn.attach.hf import probe, sliding
from prefixattn.attach.hf.adapter import HuggingFaceAdapter
from prefixattn.attach.records import Host, PrefixCall
from prefixattn.prefixes import files, saving
from prefixattn.prefixes.config import PrefixConfig

FILE = "prefix_cache.safetensors"
FORMAT = "prefixattn.cache/1"
LAYOUT = (
    "layers.{l}.key and layers.{l}.value: [Hkv, P, D] of layer l's self-attention, of an encoder-decoder its "
    "decoder's; cross.layers.{l}.key and .value: of its cross-attention, ahead of the encoder's; keys are used as "
    "they are, without rotation; where self-attention has rows, they are positions 0 to P - 1, and tokens begin at P"
)


class _Row(NamedTuple):
    """What one layer gets."""

    slot: int
    kind: str  # "self", "decoder" or "cross"
    layer: int  # in the cache
    key: Tensor  # [B, Hkv, P, D]
    value: Tensor


def make(host: Host, config: PrefixConfig, kv: Tensor, tokens: int | None) -> Cache:
    """The cache of the keys and values [B, *kv] of a prefix with this config; see `Prefix.to_cache`."""
    adapter = _generating(host)
    return _filled(adapter, _checked(adapter, config, kv, tokens))


def export(folder: Path, host: Host, config: PrefixConfig, kv: Tensor, tokens: int | None) -> None:
    """Writes what `make` makes of the keys and values [1, *kv]; see `Prefix.export_cache`."""
    adapter = _generating(host)
    tensors: dict[str, Tensor] = {}
    for row in _checked(adapter, config, kv, tokens):
        name = f"{'cross.' if row.kind == 'cross' else ''}layers.{row.layer}"
        tensors |= {f"{name}.key": row.key[0], f"{name}.value": row.value[0]}
    metadata = {
        "format": FORMAT,
        "layout": LAYOUT,
        "length": str(config.longest),
        "model_type": adapter.geometry.model_type,
    }
    chunks = files.tensor_chunks(tensors, metadata)
    with saving.saver(folder) as saver:
        saver.write(FILE, chunks)
        saver.place(FILE)


def windows(adapter: HuggingFaceAdapter) -> list[int]:
    """How many tokens the layers see that do not see all, of which transformers' own cache knows."""
    layers = DynamicCache(config=adapter.base.config).layers
    return sorted({int(layer.sliding_window) for layer in layers if getattr(layer, "is_sliding", False)})


def _generating(host: Host) -> HuggingFaceAdapter:
    assert isinstance(host, HuggingFaceAdapter)
    if not host.decodes and "decoder" not in host.geometry.kinds:
        raise NotImplementedError(
            f"{type(host.base).__name__} is no decoder, and has no cache; its prefix is served by this library alone"
        )
    if not host.active:
        raise ValueError(f"{type(host.base).__name__} runs without its prefix, inside disabled(); call this outside")
    return host


def _checked(adapter: HuggingFaceAdapter, config: PrefixConfig, kv: Tensor, tokens: int | None) -> list[_Row]:
    rows = _rows(adapter, config, kv)
    _check_windows(adapter, config, tokens)
    _try(adapter, config, rows, tokens)
    return rows


def _rows(adapter: HuggingFaceAdapter, config: PrefixConfig, kv: Tensor) -> list[_Row]:
    """What each layer gets, in the type and on the device of the layer; ValueError for what no cache holds."""
    kinds = adapter.geometry.kinds
    own = next(kind for kind in ("self", "decoder") if kind in kinds)
    chosen = config.counts(kinds)
    if "encoder" in chosen:
        raise ValueError(
            f"attentions is {config.attentions!r}; an encoder has no cache: a prefix of ('decoder', 'cross') or of one "
            "of the two can be served from one"
        )
    if any(count != kinds[kind] for kind, count in chosen.items()):
        raise ValueError(f"layers is {config.layers!r}; a cache has as many rows in every layer")
    if len(set(config.lengths(kv.shape[1]))) > 1:
        raise ValueError(f"length is {config.length!r}; a cache has as many rows in every layer")
    expected = "shifted" if own in chosen else "unshifted"  # cross-attention's rows are no tokens of the decoder's
    if config.positions != expected:
        raise ValueError(
            f"positions is {config.positions!r}; with rows in {own!r} attention a cache counts them among the "
            f"positions, and without none: this prefix would have to be {expected!r}"
        )
    found, slots = [], config.slots(kinds)
    for slot, pair in zip(slots, adapter.geometry.by_layer(kv, slots, 1), strict=True):
        site = adapter.sites[slot]
        module = adapter.base.get_submodule(site.path)
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise NotImplementedError(f"{site.path} has no layer_idx, which is its place in a cache")
        key, value = (t.to(probe.execution_device(module), adapter.base.dtype) for t in pair)
        found.append(_Row(slot, site.kind, layer, key, value))
    return found


def _check_windows(adapter: HuggingFaceAdapter, config: PrefixConfig, tokens: int | None) -> None:
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise ValueError(f"tokens is {tokens!r}, expected None or an integer from 1")
    if not {"self", "decoder"} & config.counts(adapter.geometry.kinds).keys() or not (found := windows(adapter)):
        return  # the encoder's tokens do not slide
    if config.prefix_in_window:
        return
    name, most = type(adapter.base).__name__, found[0] - config.longest
    if tokens is None or tokens > most:
        can = f"at most {most} tokens can follow it" if most > 0 else "no token could follow it"
        raise ValueError(
            f"tokens is {tokens}; {name} has layers with a window of {found[0]}, from which a cache's "
            f"P={config.longest} rows slide out, and this prefix does not: {can}, and tokens says how many will"
        )


def _try(adapter: HuggingFaceAdapter, config: PrefixConfig, rows: list[_Row], tokens: int | None) -> None:
    """Runs some tokens with the prefix and with its cache; NotImplementedError if the model makes two things of them.

    A bias by distance, as ALiBi, falls on a cache and not on a prefix.
    """
    whole, one = adapter.whole, [row._replace(key=row.key[:1], value=row.value[:1]) for row in rows]
    inputs = probe.example(whole)
    if tokens is not None and adapter.decodes:
        inputs["input_ids"] = inputs["input_ids"][:, :tokens]
    shift = config.longest if config.positions == "shifted" else 0
    ours = PrefixCall({row.slot: (row.key[0], row.value[0]) for row in one}, 0.0, shift=shift)
    ours = sliding.placed(ours, config, adapter.windows, inputs)
    with adapter.overriding(ours):
        expected, _ = probe.run(whole, inputs)
    trial = probe.Trial(inputs, expected, None, probe.tolerance(expected))
    with adapter.disabled():
        try:
            found, _ = probe.run(whole, inputs | {"past_key_values": _filled(adapter, one), "use_cache": True})
        except Exception as error:  # whatever a model does whose cache holds something else
            raise NotImplementedError(
                f"{type(whole).__name__} does not run with the prefix in its cache, which may hold something else than "
                f"keys and values: {probe.brief(error)}; serve this prefix with this library"
            ) from error
    if (apart := probe.differs(trial, found)) is not None:
        raise NotImplementedError(
            f"{type(whole).__name__} computes something else with the prefix in its cache: its output differs by "
            f"{apart:.1e} of its size; serve this prefix with this library"
        )


def _filled(adapter: HuggingFaceAdapter, rows: list[_Row]) -> Cache:
    config = adapter.base.config
    own = DynamicCache(config=config)
    if not config.is_encoder_decoder:
        for row in rows:
            own.update(row.key, row.value, row.layer)
        return own
    cross = DynamicCache()  # whose layers slide in no model
    for row in rows:
        (cross if row.kind == "cross" else own).update(row.key, row.value, row.layer)
    cache = EncoderDecoderCache(own, cross)
    # there is something in it, but not yet what the encoder adds
    cache.is_updated.update((row.layer, False) for row in rows if row.kind == "cross")
    return cache
