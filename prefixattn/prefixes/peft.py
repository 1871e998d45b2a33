"""PEFT's adapters PREFIX_TUNING and CARTRIDGE: a prefix's keys and values in one tensor, and a JSON file.

PEFT hands a decoder the prefix as a cache of P tokens that were seen before. So the sequence's positions start at P,
and in a layer with a sliding window the prefix slides out of sight of the tokens past it, in training and in
generation: `prefix_in_window=True`.

Of an encoder-decoder only the decoder's self-attention gets a prefix, and not the layer's own: PEFT 0.21 repeats the L
layers' pairs of key and value and deals them out in twos, to self-attention and to cross-attention, which drops its
own. So layer l attends to pair 2l mod L. With an even L, layers l and l + L/2 share one, and the odd ones are unused.

Layers that attend to keys and values of another (Gemma 3n and 4) get that one's prefix with them, and not their own.
Where layers differ in size (Gemma 4), PEFT 0.21 makes rows for one with the widest heads. Others take the first heads
and numbers of theirs; what has more heads than it gets no prefix. Positions start at P only if the first layer has one,
for PEFT's cache is as long as its first layer says.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixattn.prefixes import files, saving
from prefixattn.prefixes.config import MOST, Defaults, PrefixConfig
from prefixattn.prefixes.geometry import Geometry

JSON = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
NAME = "prompt_embeddings"  # [P, layers * 2 * Hkv * D]: of a token, layer after layer, key before value
TYPES = ("PREFIX_TUNING", "CARTRIDGE")
# what a model is used for says nothing of its prefix, but through the number of stacks, which a field of its own gives
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None)
EMBEDDED = "adapter_config"  # in the header of the tensors' file, so that it can stand alone


def is_there(folder: Path) -> bool:
    return (folder / JSON).is_file() or _embedded(folder / TENSORS) is not None


def _embedded(weights: Path) -> str | None:
    try:
        return files.read_header(weights).metadata.get(EMBEDDED)
    except ValueError:
        return None


def read(folder: Path, geometry: Geometry, defaults: Defaults) -> tuple[PrefixConfig, Tensor]:
    """Config and kv of an adapter for such a model; an error in words if anything is wrong.

    All rows can be trained, those that a CARTRIDGE freezes (`num_frozen_tokens`) too.
    """
    _check_widths(geometry)
    weights = folder / TENSORS
    before = saving.stamp(folder, (JSON, TENSORS))
    path, values = _description(folder)
    if values.get("peft_type") not in TYPES:
        words = " or ".join(map(repr, TYPES))
        raise ValueError(
            f"{path} has peft_type {files.shown(values.get('peft_type'))}, expected {words}: keys and values"
        )
    if not defaults.can_shift:
        raise NotImplementedError(
            f"{path}: PEFT counts a prefix among the positions, and {geometry.model_type} has none that a prefix could "
            "shift; a bias by distance, as T5's, falls on PEFT's prefix too, and here on no prefix"
        )
    if defaults.slides is None:
        warnings.warn(
            f"{path}: {geometry.model_type} has sliding windows, out of which PEFT's prefix slides; the model "
            "makes its masks itself, and here the prefix stays in sight of all tokens",
            stacklevel=2,
        )
    _check_model(path, values, geometry)
    length: Any = values.get("num_virtual_tokens")
    if type(length) is not int or not 1 <= length <= MOST:
        raise ValueError(f"{path} has num_virtual_tokens {files.shown(length)}, expected an integer from 1 to {MOST}")
    _check_frozen(path, values, length)
    if not weights.is_file() and (folder / PICKLE).is_file():
        raise ValueError(f"{folder} holds {PICKLE}, a pickle, and is not read: save the adapter as {TENSORS} with PEFT")
    layers, (Hkv, D) = _layers(geometry), _widest(geometry)
    tensors = files.read_tensors(weights, {NAME: [length, layers * 2 * Hkv * D]})
    if saving.stamp(folder, (JSON, TENSORS)) != before:
        raise ValueError(f"{folder} was written to while it was read")
    kinds: Any = ("decoder",) if _seq2seq(geometry) else "all"
    reached = _reached(geometry)
    chosen: Any = "all" if len(reached) == layers else reached
    config = PrefixConfig(
        *(length, "none", chosen),
        attentions=kinds,
        positions=_positions(geometry),
        prefix_in_window=bool(defaults.slides),
    ).resolved(defaults)
    pairs = tensors[NAME].view(length, layers, 2, Hkv, D).permute(1, 2, 3, 0, 4)[_pairs(geometry)]
    if not geometry.sizes:
        return config, pairs.contiguous()
    kv = pairs.new_zeros(geometry.kv_shape(len(reached), length))
    for of_layer, slot in zip(kv, reached, strict=True):
        h, d, _ = geometry.of(slot)
        of_layer[:, :h, :, :d] = pairs[slot, :, :h, :, :d]
    return config, kv


def export(folder: Path, config: PrefixConfig, geometry: Geometry, kv: Tensor) -> None:
    """Writes a PREFIX_TUNING adapter with the keys and values of `kv`, [N, 2, Hkv, P, D].

    Where an adapter with another JSON file is there, that file goes first and the new one comes last: to PEFT the
    folder is the old adapter, none for a moment, or the new one. `read` meets the old or the new one at any time, if
    this function wrote the old one, as the tensors' file holds the description too.
    """
    _check_widths(geometry)
    if config.positions != (theirs := _positions(geometry)):
        how = "always shifts positions by" if theirs == "shifted" else "shifts no position of such a model by"
        raise ValueError(f"positions is {config.positions!r}; PEFT {how} the prefix's length")
    if _seq2seq(geometry) and set(config.counts(geometry.kinds)) != {"decoder"}:
        raise ValueError(
            f"attentions is {config.attentions!r}; a PEFT adapter of an encoder-decoder has a prefix in its decoder's "
            "self-attention alone: ('decoder',)"
        )
    reached = _reached(geometry)
    if not _seq2seq(geometry) and list(config.slots(geometry.kinds)) != reached:
        where = "every layer" if len(reached) == _layers(geometry) else f"the layers {reached} of such a model"
        raise ValueError(f"layers is {config.layers!r}; a PEFT adapter has a prefix in {where}")
    if len(kv) != len(reached):
        raise ValueError(f"layers is {config.layers!r}; a PEFT adapter has a prefix in every layer")
    if len(set(config.lengths(len(kv)))) > 1:
        raise ValueError(f"length is {config.length!r}; a PEFT adapter has one length for all layers")
    half, odd = divmod(len(kv), 2)
    if _seq2seq(geometry) and not odd and not torch.equal(kv[:half], kv[half:]):
        raise ValueError(
            f"the decoder has {len(kv)} layers; with an even number PEFT gives layers l and l + {half} the same "
            "prefix, and here they differ"
        )
    Hkv, D = _widest(geometry)
    pairs, placed = kv.new_zeros(_layers(geometry), *kv.shape[1:]), dict[int, Tensor]()
    for slot, of_layer in zip(reached, kv, strict=True):
        source = _pairs(geometry)[slot]
        if source in placed and not torch.equal(placed[source], of_layer):
            raise ValueError(
                f"layers {source} and {slot} of a {geometry.model_type} attend to the same keys, to which PEFT adds "
                "one prefix, and here they have two"
            )
        pairs[source] = placed[source] = of_layer
    pairs = pairs[:, :, :Hkv, :, :D]
    description = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "encoder_hidden_size": geometry.width,
        "inference_mode": True,
        "init_weights": None,
        "modules_to_save": None,
        "num_virtual_tokens": config.longest,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "revision": None,
        "task_type": "SEQ_2_SEQ_LM" if _seq2seq(geometry) else "CAUSAL_LM",
        **_sizes(geometry),
    }
    text = files.json_bytes(description)
    rows = pairs.permute(3, 0, 1, 2, 4).reshape(config.longest, -1)
    chunks = files.tensor_chunks({NAME: rows}, {"format": "pt", EMBEDDED: text.decode()})
    with saving.saver(folder) as saver:
        saver.write(TENSORS, chunks)
        saver.write(JSON, [text])
        other = not (folder / JSON).is_file() or (folder / JSON).read_bytes() != text
        if other:
            saver.remove(JSON)
        saver.place(TENSORS)
        if other:
            saver.place(JSON)


def _description(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter's config and the file that it is in."""
    text = None if (folder / JSON).is_file() else _embedded(folder / TENSORS)
    if text is None:
        return folder / JSON, files.read_json(folder / JSON)
    return folder / TENSORS, files.parsed(folder / TENSORS, text)


def _seq2seq(geometry: Geometry) -> bool:
    return "decoder" in geometry.kinds


def _layers(geometry: Geometry) -> int:
    return geometry.kinds["decoder"] if _seq2seq(geometry) else geometry.layers


def _pairs(geometry: Geometry) -> list[int]:
    """The pair of key and value that each layer attends to."""
    L = _layers(geometry)
    return [2 * l % L for l in range(L)] if _seq2seq(geometry) else list(geometry.sources or range(L))


def _widest(geometry: Geometry) -> tuple[int, int]:
    """Hkv and D of the rows that PEFT makes: those of the first layer with the widest heads."""
    return (
        max(geometry.sizes, key=lambda sizes: sizes[1])[:2]
        if geometry.sizes
        else (geometry.kv_heads, geometry.head_dim)
    )


def _reached(geometry: Geometry) -> list[int]:
    """The layers that get a prefix: those with no more heads than the rows have."""
    Hkv, _ = _widest(geometry)
    return [slot for slot in range(_layers(geometry)) if geometry.of(slot)[0] <= Hkv]


def _positions(geometry: Geometry) -> str:
    return "shifted" if 0 in _reached(geometry) else "unshifted"


def _sizes(geometry: Geometry) -> dict[str, Any]:
    """What PEFT's config says of the model."""
    Hkv, D = _widest(geometry)
    return {
        "num_layers": _layers(geometry),
        "num_attention_heads": Hkv,
        "token_dim": Hkv * D,
        "num_transformer_submodules": 2 if _seq2seq(geometry) else 1,
    }


def _check_widths(geometry: Geometry) -> None:
    if geometry.sizes and _seq2seq(geometry):
        raise NotImplementedError(
            f"the layers of {geometry.model_type} have keys of several sizes, and how PEFT cuts a prefix for those of "
            "an encoder-decoder is not known here: save_pretrained and load keep such a prefix"
        )
    if geometry.two_widths or any(d != dv for _, d, dv in geometry.sizes):
        raise NotImplementedError(
            f"{geometry.model_type} has keys of width {geometry.head_dim} and values of width {geometry.value_dim}; "
            "an adapter of PEFT has one width for both: save_pretrained and load keep such a prefix"
        )


def _check_model(path: Path, values: dict[str, Any], geometry: Geometry) -> None:
    task, modules = values.get("task_type"), values.get("modules_to_save")
    if task not in TASKS:
        raise ValueError(f"{path} has task_type {files.shown(task)}, expected one of {', '.join(map(repr, TASKS))}")
    if modules:
        raise ValueError(
            f"{path} has modules_to_save {files.shown(modules)} (task_type {task!r}): beside a prefix the adapter "
            "holds weights of the model's own modules, trained with it, and here a prefix alone is read"
        )
    here = _sizes(geometry)
    differing = [
        f"{name}={files.shown(values.get(name))}, here {here[name]!r}"
        for name in here
        if values.get(name) != here[name]
    ]
    if differing:
        raise ValueError(f"{path} is of a prefix for another model: {'; '.join(differing)}")


def _check_frozen(path: Path, values: dict[str, Any], length: int) -> None:
    frozen = values.get("num_frozen_tokens", 0)
    if type(frozen) is not int or not 0 <= frozen <= length:
        raise ValueError(f"{path} has num_frozen_tokens {files.shown(frozen)}, expected an integer from 0 to {length}")
