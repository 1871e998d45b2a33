"""Prefixes on disk: a JSON file that names a safetensors file, and PEFT's prefix adapters."""

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from prefixattn.config import MOST, PrefixConfig
from prefixattn.prefix import FreePrefix, Geometry, make_encoder

FORMAT = "prefixattn"
VERSION = 2  # 1 was never released
JSON = "prefix.json"
WEIGHTS = re.compile(r"prefix-[0-9a-f]{12}\.safetensors")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PEFT_JSON = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"


def _write(path: Path, data: bytes) -> None:
    """All of the file or, if the process dies, what was there before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def save(folder: Path, config: PrefixConfig, geometry: Geometry, tensors: dict[str, Tensor], folded: bool) -> None:
    """Writes a prefix: with `folded`, `tensors` is its bank; otherwise its encoder's `state_dict`, and its gate."""
    folder.mkdir(parents=True, exist_ok=True)
    data = dump_tensors(_cpu(tensors))
    digest = hashlib.sha256(data).hexdigest()
    # The tensors' file is named after its content and the JSON, written last, names it: a process killed at any moment
    # leaves the old checkpoint or the new one, never a mixture.
    weights = f"prefix-{digest[:12]}.safetensors"
    _write(folder / weights, data)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "model": asdict(geometry),
        "folded": folded,
        "weights": weights,
        "sha256": digest,
    }
    _write(folder / JSON, (json.dumps(description, indent=2) + "\n").encode())
    for stale in folder.iterdir():
        if WEIGHTS.fullmatch(stale.name) and stale.name != weights:
            stale.unlink()


Read = tuple[PrefixConfig, nn.Module, Tensor | None]


def read(folder: Path, geometry: Geometry) -> Read:
    """Config, encoder and gate of a saved prefix for a model of this geometry; ValueError if anything is wrong.

    The encoder is trainable if it was saved unfolded. So is that of a PEFT adapter, which holds keys and values only,
    PEFT having dropped the network: it is one of share="none".
    """
    if (folder / JSON).is_file():
        return _read(folder, geometry)
    if (folder / PEFT_JSON).is_file():
        return _read_peft(folder, geometry)
    raise ValueError(f"{folder} holds neither {JSON} nor {PEFT_JSON}; expected a folder with a saved prefix")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it is damaged or was not written in full") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def _read_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    data = path.read_bytes()
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} is damaged or was not written in full: its SHA-256 is not the one in {JSON}")
    try:
        return load_tensors(data)
    except (SafetensorError, KeyError) as error:  # KeyError: an element type that safetensors knows and torch does not
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def _check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    found = {name: list(t.shape) for name, t in tensors.items()}
    if found != shapes:
        raise ValueError(f"{path} holds tensors {found}, expected {shapes}")
    types = sorted({str(t.dtype) for t in tensors.values()})
    if len(types) != 1 or next(iter(tensors.values())).dtype not in FLOATS:
        raise ValueError(f"{path} holds tensors of {', '.join(types)}, expected one floating-point type for all")
    bad = [name for name, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds values that are infinite or not a number, in {', '.join(bad)}")


def _read(folder: Path, geometry: Geometry) -> Read:
    path = folder / JSON
    values = _read_json(path)
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {values.get('format')!r}, expected {FORMAT!r}: not a prefixattn checkpoint"
        )
    if values.get("version") != VERSION:
        raise ValueError(f"{path} has version {values.get('version')!r}; this prefixattn reads version {VERSION}")
    missing = sorted({"config", "model", "folded", "weights", "sha256"} - set(values))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    check_geometry(path, values["model"], geometry)
    try:
        config = PrefixConfig.from_dict(values["config"])
        slots = config.slots(geometry.kinds)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values["weights"], str) or not WEIGHTS.fullmatch(values["weights"]):
        raise ValueError(f"{path} names the weights {values['weights']!r}, expected a file {WEIGHTS.pattern} beside it")
    for name, kind in (("sha256", str), ("folded", bool)):
        if not isinstance(values[name], kind):
            raise ValueError(f"{path} has {name} {values[name]!r}, expected a {kind.__name__}")
    weights = folder / values["weights"]
    tensors = _read_tensors(weights, values["sha256"])
    with torch.device("meta"):  # no memory, and no random numbers drawn
        encoder = make_encoder(config, geometry)
        if values["folded"]:
            encoder = FreePrefix(torch.empty(len(slots), 2, geometry.kv_heads, config.longest, geometry.head_dim))
    gated = {"gate": [len(slots)]} if config.gate and not values["folded"] else {}
    _check_tensors(weights, tensors, {name: list(t.shape) for name, t in encoder.state_dict().items()} | gated)
    gate = tensors.pop("gate") if gated else None
    # Assigned, not copied: a float64 prefix does not come back rounded.
    encoder.load_state_dict(tensors, assign=True)
    return config, encoder.requires_grad_(not values["folded"]), gate


def check_geometry(path: Path, saved: Any, geometry: Geometry) -> None:
    here = asdict(geometry)
    if not isinstance(saved, dict) or set(saved) != set(here):
        raise ValueError(f"{path} describes the model as {saved!r}, expected the fields {', '.join(here)}")
    differing = [f"{name}={saved[name]!r}, here {here[name]!r}" for name in here if saved[name] != here[name]]
    if differing:
        raise ValueError(f"{path} is of a prefix for another model: {'; '.join(differing)}")


def _read_peft(folder: Path, geometry: Geometry) -> Read:
    path, weights = folder / PEFT_JSON, folder / PEFT_TENSORS
    values = _read_json(path)
    if values.get("peft_type") != "PREFIX_TUNING":
        raise ValueError(f"{path} has peft_type {values.get('peft_type')!r}, expected 'PREFIX_TUNING'")
    sizes = {"num_layers": geometry.layers, "num_attention_heads": geometry.kv_heads}
    differing = [
        f"{name}={values.get(name)!r}, here {size}" for name, size in sizes.items() if values.get(name) != size
    ]
    if differing:
        raise ValueError(f"{path} is of a prefix for another model: {'; '.join(differing)}")
    tensors = _read_tensors(weights, None)
    length: Any = values.get("num_virtual_tokens")  # PrefixConfig refuses what is no integer
    row = geometry.layers * 2 * geometry.kv_heads * geometry.head_dim
    try:
        config = PrefixConfig(length=length, share="none", positions="shifted")
    except ValueError:
        raise ValueError(f"{path} has num_virtual_tokens {length!r}, expected an integer from 1 to {MOST}") from None
    _check_tensors(weights, tensors, {"prompt_embeddings": [config.longest, row]})
    rows = tensors["prompt_embeddings"].view(config.longest, geometry.layers, 2, geometry.kv_heads, geometry.head_dim)
    bank = rows.permute(1, 2, 3, 0, 4).contiguous()
    return config, FreePrefix(bank), None


def export_peft(folder: Path, config: PrefixConfig, geometry: Geometry, bank: Tensor) -> None:
    """Writes a PEFT prefix-tuning adapter with the keys and values of `bank`, [N, 2, Hkv, P, D]."""
    if len(bank) != geometry.layers:
        raise ValueError(f"layers is {config.layers!r}; a PEFT adapter has a prefix in every layer")
    if not isinstance(config.length, int):
        raise ValueError(f"length is {config.length!r}; a PEFT adapter has one length for all layers")
    if config.positions != "shifted":
        raise ValueError(f"positions is {config.positions!r}; PEFT always shifts positions by the prefix's length")
    rows = bank.permute(3, 0, 1, 2, 4).reshape(config.longest, -1)
    description = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "encoder_hidden_size": geometry.width,
        "inference_mode": True,
        "init_weights": None,
        "modules_to_save": None,
        "num_attention_heads": geometry.kv_heads,
        "num_layers": geometry.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.length,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": geometry.kv_heads * geometry.head_dim,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PEFT_TENSORS, dump_tensors(_cpu({"prompt_embeddings": rows}), metadata={"format": "pt"}))
    _write(folder / PEFT_JSON, (json.dumps(description, indent=2) + "\n").encode())
