"""PEFT's adapters PREFIX_TUNING and CARTRIDGE: a prefix's keys and values in one tensor, and a JSON file.

PEFT hands a decoder the prefix as a cache of P tokens that were seen before. So the sequence's positions start at P,
and in a layer with a sliding window the prefix slides out of sight of the tokens past it. Here all of a prefix stays in
sight: for such layers the two are equal as long as P and the sequence together fit into the window.

Of an encoder-decoder only the decoder's self-attention gets a prefix, and not the layer's own: PEFT 0.21 repeats the L
layers' pairs of key and value and deals them out in twos, to self-attention and to cross-attention, which drops its
own. So layer l attends to pair 2l mod L. With an even L, layers l and l + L/2 share one, and the odd ones are unused.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixattn import files
from prefixattn.config import MOST, Defaults, PrefixConfig
from prefixattn.prefix import Geometry

JSON = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
NAME = "prompt_embeddings"  # [P, layers * 2 * Hkv * D]: of a token, layer after layer, key before value
TYPES = ("PREFIX_TUNING", "CARTRIDGE")


def read(folder: Path, geometry: Geometry, defaults: Defaults) -> tuple[PrefixConfig, Tensor]:
    """Config and bank of an adapter for such a model; an error in words if anything is wrong.

    All rows can be trained, those that a CARTRIDGE freezes (`num_frozen_tokens`) too.
    """
    path, weights = folder / JSON, folder / TENSORS
    values = files.read_json(path)
    if values.get("peft_type") not in TYPES:
        words = " or ".join(map(repr, TYPES))
        raise ValueError(f"{path} has peft_type {values.get('peft_type')!r}, expected {words}: keys and values")
    if not defaults.can_shift:
        raise NotImplementedError(
            f"{path}: PEFT counts a prefix among the positions, and {geometry.model_type} has none that a prefix could "
            "shift; a bias by distance, as T5's, falls on PEFT's prefix too, and here on no prefix"
        )
    _check_model(path, values, geometry)
    length: Any = values.get("num_virtual_tokens")
    if type(length) is not int or not 1 <= length <= MOST:
        raise ValueError(f"{path} has num_virtual_tokens {length!r}, expected an integer from 1 to {MOST}")
    _check_frozen(path, values, length)
    if not weights.is_file() and (folder / PICKLE).is_file():
        raise ValueError(f"{folder} holds {PICKLE}, a pickle, and is not read: save the adapter as {TENSORS} with PEFT")
    tensors = files.read_tensors(weights)
    layers, Hkv, D = _layers(geometry), geometry.kv_heads, geometry.head_dim
    files.check_tensors(weights, tensors, {NAME: [length, layers * 2 * Hkv * D]})
    kinds: Any = ("decoder",) if _seq2seq(geometry) else "all"
    config = PrefixConfig(length=length, share="none", attentions=kinds, positions="shifted").resolved(defaults)
    pairs = tensors[NAME].view(length, layers, 2, Hkv, D).permute(1, 2, 3, 0, 4)
    return config, pairs[_pairs(geometry)].contiguous()


def export(folder: Path, config: PrefixConfig, geometry: Geometry, bank: Tensor) -> None:
    """Writes a PREFIX_TUNING adapter with the keys and values of `bank`, [N, 2, Hkv, P, D]."""
    if config.positions != "shifted":
        raise ValueError(f"positions is {config.positions!r}; PEFT always shifts positions by the prefix's length")
    if _seq2seq(geometry) and set(config.counts(geometry.kinds)) != {"decoder"}:
        raise ValueError(
            f"attentions is {config.attentions!r}; a PEFT adapter of an encoder-decoder has a prefix in its decoder's "
            "self-attention alone: ('decoder',)"
        )
    if len(bank) != _layers(geometry):
        raise ValueError(f"layers is {config.layers!r}; a PEFT adapter has a prefix in every layer")
    if len(set(config.lengths(len(bank)))) > 1:
        raise ValueError(f"length is {config.length!r}; a PEFT adapter has one length for all layers")
    half, odd = divmod(len(bank), 2)
    if _seq2seq(geometry) and not odd and not torch.equal(bank[:half], bank[half:]):
        raise ValueError(
            f"the decoder has {len(bank)} layers; with an even number PEFT gives layers l and l + {half} the same "
            "prefix, and here they differ"
        )
    pairs = torch.zeros_like(bank)
    pairs[_pairs(geometry)] = bank
    data = files.dump({NAME: pairs.permute(3, 0, 1, 2, 4).reshape(config.longest, -1)}, metadata={"format": "pt"})
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
        **_sizes(geometry),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / TENSORS, data)
    files.write_json(folder / JSON, description)


def _seq2seq(geometry: Geometry) -> bool:
    return "decoder" in geometry.kinds


def _layers(geometry: Geometry) -> int:
    return geometry.kinds["decoder"] if _seq2seq(geometry) else geometry.layers


def _pairs(geometry: Geometry) -> list[int]:
    """The pair of key and value that each layer attends to."""
    L = _layers(geometry)
    return [2 * l % L for l in range(L)] if _seq2seq(geometry) else list(range(L))


def _sizes(geometry: Geometry) -> dict[str, Any]:
    """What PEFT's config says of the model."""
    return {
        "num_layers": _layers(geometry),
        "num_attention_heads": geometry.kv_heads,
        "token_dim": geometry.kv_heads * geometry.head_dim,
        "num_transformer_submodules": 2 if _seq2seq(geometry) else 1,
        "task_type": "SEQ_2_SEQ_LM" if _seq2seq(geometry) else "CAUSAL_LM",
    }


def _check_model(path: Path, values: dict[str, Any], geometry: Geometry) -> None:
    here = _sizes(geometry)
    differing = [f"{name}={values.get(name)!r}, here {here[name]!r}" for name in here if values.get(name) != here[name]]
    if differing:
        raise ValueError(f"{path} is of a prefix for another model: {'; '.join(differing)}")
    if values.get("modules_to_save"):
        raise ValueError(
            f"{path} has modules_to_save {values['modules_to_save']!r}: the adapter changes the model's own modules too"
        )


def _check_frozen(path: Path, values: dict[str, Any], length: int) -> None:
    frozen = values.get("num_frozen_tokens", 0)
    if type(frozen) is not int or not 0 <= frozen <= length:
        raise ValueError(f"{path} has num_frozen_tokens {frozen!r}, expected an integer from 0 to {length}")
