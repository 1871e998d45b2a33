"""A bank on disk: one safetensors file, whose rows can be used where they lie.

There is no digest: to look at one would read the whole file, and so would a search for values that are not finite.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefixattn import checkpoint, files
from prefixattn.config import PrefixConfig
from prefixattn.prefix import Geometry

NAME = "bank.safetensors"
FORMAT, VERSION = "prefixattn-bank", "1"


def save(folder: Path, config: PrefixConfig, geometry: Geometry, rows: Tensor, lengths: Tensor) -> None:
    """Writes rows [T, N, 2, Hkv, P, D] and lengths [T]; a process that dies meanwhile leaves what was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    temporary = path.with_name(f"{NAME}.{os.getpid()}.tmp")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(config.to_dict()),
        "model": json.dumps(asdict(geometry)),
    }
    try:
        save_file({"rows": rows.cpu().contiguous(), "lengths": lengths.cpu()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find(path: Path) -> Path:
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is missing; expected a bank that save_pretrained wrote")
    return file


def read(path: Path, geometry: Geometry, mapped: bool) -> tuple[PrefixConfig, Tensor, Tensor]:
    """Config, rows and lengths of a saved bank for a model of this geometry; ValueError if anything is wrong.

    Rows that are `mapped` are a private map of the file: what is not looked at is not read, what is written stays in
    memory. Whether they are finite is then the reader's affair.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = _config(path, file.metadata() or {}, geometry)
            names = sorted(file.keys())
            if names != ["lengths", "rows"]:
                raise ValueError(f"{path} holds tensors {names}, expected ['lengths', 'rows']")
            rows, lengths = file.get_tensor("rows"), file.get_tensor("lengths")
    except (SafetensorError, KeyError) as error:  # KeyError: an element type that safetensors knows and torch does not
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    slots, T, P = config.slots(geometry.kinds), config.count, config.longest
    shape = [T, len(slots), 2, geometry.kv_heads, P, geometry.head_dim]
    if list(rows.shape) != shape or rows.dtype not in files.FLOATS:
        raise ValueError(f"{path} holds rows {rows.dtype} {list(rows.shape)}, expected a float type and {shape}")
    if list(lengths.shape) != [T] or lengths.dtype != torch.int64:
        raise ValueError(f"{path} holds lengths {lengths.dtype} {list(lengths.shape)}, expected torch.int64 [{T}]")
    bad = ((lengths < 1) | (lengths > P)).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(f"{path} has length {int(lengths[i])} for row {i}, expected 1 to {P}")
    if not mapped:
        rows = rows.clone()
        if not rows.isfinite().all():
            raise ValueError(f"{path} holds values that are infinite or not a number")
    return config, rows, lengths.clone()  # not part of the map, which keeps the file open


def _config(path: Path, metadata: dict[str, str], geometry: Geometry) -> PrefixConfig:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}: not a bank of prefixattn")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} has version {metadata.get('version')!r}; this prefixattn reads version {VERSION}")
    config, model = (_json(path, metadata, name) for name in ("config", "model"))
    checkpoint.check_geometry(path, model, geometry)
    try:
        found = PrefixConfig.from_dict(config)
        found.slots(geometry.kinds)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if found.count is None:
        raise ValueError(f"{path} has count None, expected the number of its prefixes")
    return found


def _json(path: Path, metadata: dict[str, str], name: str) -> Any:
    try:
        return json.loads(metadata[name])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} has no readable {name} in its header ({error})") from None
