"""Prefixes on disk: a JSON file that names a safetensors file. Nothing is ever unpickled."""

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn import files, peft
from prefixattn.config import Defaults, PrefixConfig
from prefixattn.plus import Memories, PrefixPlusConfig
from prefixattn.prefix import FreePrefix, Geometry, make_encoder

FORMAT = "prefixattn"
VERSION = 2  # 1 was never released
JSON = "prefix.json"
WEIGHTS = re.compile(r"prefix-[0-9a-f]{12}\.safetensors")
METHODS = "prefix", "prefix_plus"
FIELDS = {
    "format": str,
    "version": int,
    "method": str,
    "config": dict,
    "model": dict,
    "folded": bool,
    "weights": str,
    "sha256": str,
}


Config = PrefixConfig | PrefixPlusConfig


def save(folder: Path, config: Config, geometry: Geometry, tensors: dict[str, Tensor], folded: bool) -> None:
    """Writes a prefix: with `folded`, `tensors` is its bank; otherwise its encoder's `state_dict`, and its gate."""
    folder.mkdir(parents=True, exist_ok=True)
    data = files.dump(tensors)
    digest = hashlib.sha256(data).hexdigest()
    # The tensors' file is named after its content and the JSON, written last, names it: a process killed at any moment
    # leaves the old checkpoint or the new one, never a mixture.
    weights = f"prefix-{digest[:12]}.safetensors"
    files.write(folder / weights, data)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "method": METHODS[isinstance(config, PrefixPlusConfig)],
        "config": config.to_dict(),
        "model": asdict(geometry),
        "folded": folded,
        "weights": weights,
        "sha256": digest,
    }
    files.write_json(folder / JSON, description)
    for stale in folder.iterdir():
        if WEIGHTS.fullmatch(stale.name) and stale.name != weights:
            stale.unlink()


Read = tuple[Config, nn.Module, Tensor | None]


def read(folder: Path, geometry: Geometry, defaults: Defaults) -> Read:
    """Config, encoder and gate of a saved prefix for such a model; an error in words if anything is wrong.

    The encoder is trainable if it was saved unfolded. So is that of a PEFT adapter, which holds keys and values only,
    PEFT having dropped the network: it is one of share="none".
    """
    if (folder / JSON).is_file():
        return _read(folder, geometry, defaults)
    if (folder / peft.JSON).is_file():
        config, bank = peft.read(folder, geometry, defaults)
        return config, FreePrefix(bank), None
    raise ValueError(f"{folder} holds neither {JSON} nor {peft.JSON}; expected a folder with a saved prefix")


def _read(folder: Path, geometry: Geometry, defaults: Defaults) -> Read:
    path = folder / JSON
    values = files.read_json(path)
    _check_fields(path, values)
    check_geometry(path, values["model"], geometry)
    if values["method"] == "prefix_plus":
        return _read_plus(folder, path, values, geometry)
    try:
        config = PrefixConfig.from_dict(values["config"])
        slots = config.slots(geometry.kinds)
        resolved = config.resolved(defaults)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    open_ = [name for name, value in config.to_dict().items() if value != resolved.to_dict()[name]]
    if open_:
        raise ValueError(f"{path} leaves {', '.join(open_)} of the prefix to the model; a saved config says it")
    weights = folder / values["weights"]
    tensors = files.read_tensors(weights, values["sha256"])
    with torch.device("meta"):  # no memory, and no random numbers drawn
        encoder = make_encoder(config, geometry)
        if values["folded"]:
            encoder = FreePrefix(torch.empty(len(slots), 2, geometry.kv_heads, config.longest, geometry.head_dim))
    gated = {"gate": [len(slots)]} if config.gate and not values["folded"] else {}
    files.check_tensors(weights, tensors, {name: list(t.shape) for name, t in encoder.state_dict().items()} | gated)
    gate = tensors.pop("gate") if gated else None
    # Assigned, not copied: a float64 prefix does not come back rounded.
    encoder.load_state_dict(tensors, assign=True)
    return config, encoder.requires_grad_(not values["folded"]), gate


def _read_plus(folder: Path, path: Path, values: dict[str, Any], geometry: Geometry) -> Read:
    try:
        config = PrefixPlusConfig.from_dict(values["config"])
        with torch.device("meta"):
            encoder = Memories(config, geometry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    weights = folder / values["weights"]
    tensors = files.read_tensors(weights, values["sha256"])
    files.check_tensors(weights, tensors, {name: list(t.shape) for name, t in encoder.state_dict().items()})
    encoder.load_state_dict(tensors, assign=True)
    return config, encoder, None


def _check_fields(path: Path, values: dict[str, Any]) -> None:
    # what it is, before what is wrong with it
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {values.get('format')!r}, expected {FORMAT!r}: not a prefixattn checkpoint"
        )
    if values.get("version") != VERSION:
        raise ValueError(f"{path} has version {values.get('version')!r}; this prefixattn reads version {VERSION}")
    if set(values) != set(FIELDS):
        missing, unknown = sorted(set(FIELDS) - set(values)), sorted(set(values) - set(FIELDS))
        raise ValueError(f"{path} lacks the fields {missing} and has unknown fields {unknown}")
    for name, kind in FIELDS.items():
        if type(values[name]) is not kind:
            raise ValueError(f"{path} has {name} {values[name]!r}, expected a {kind.__name__}")
    if values["method"] not in METHODS:
        raise ValueError(f"{path} has method {values['method']!r}, expected one of {', '.join(map(repr, METHODS))}")
    if not WEIGHTS.fullmatch(values["weights"]):
        raise ValueError(f"{path} names the weights {values['weights']!r}, expected a file {WEIGHTS.pattern} beside it")


def check_geometry(path: Path, saved: dict[str, Any], geometry: Geometry) -> None:
    here = asdict(geometry)
    if set(saved) != set(here):
        raise ValueError(f"{path} describes the model as {saved!r}, expected the fields {', '.join(here)}")
    differing = [f"{name}={saved[name]!r}, here {here[name]!r}" for name in here if saved[name] != here[name]]
    if differing:
        raise ValueError(f"{path} is of a prefix for another model: {'; '.join(differing)}")
