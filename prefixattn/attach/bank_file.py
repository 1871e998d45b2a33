"""A bank on disk: one safetensors file, whose rows can be used where they lie.

There is no digest: to look at one would read the whole file, and so would a search for values that are not finite.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefixattn.prefixes import checkpoint, files, saving
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.geometry import Geometry

NAME = checkpoint.BANK
FORMAT, VERSION = "prefixattn-bank", "1"
PIECE = 2**20  # lengths looked at together


def save(folder: Path, config: PrefixConfig, geometry: Geometry, rows: Tensor, lengths: Tensor) -> None:
    """Writes rows [T, *kv] and lengths [T], in the place of a bank or a prefix that is there.

    A process that dies meanwhile leaves what was there before.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(config.to_dict()),
        "model": json.dumps(geometry.to_dict()),
    }
    chunks = files.tensor_chunks({"rows": rows, "lengths": lengths}, metadata)
    with saving.saver(folder) as saver:
        saver.write(NAME, chunks)
        saver.place(NAME)
        saver.tidy(lambda name: name == checkpoint.JSON or checkpoint.WEIGHTS.fullmatch(name) is not None)


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
    with files.described(path):
        return saving.whole(path.parent, (path.name,), lambda: _read(path, geometry, mapped))


def _read(path: Path, geometry: Geometry, mapped: bool) -> tuple[PrefixConfig, Tensor, Tensor]:
    before = saving.stamp(path.parent, (path.name,))
    header = files.read_header(path)
    config = _config(path, header.metadata, geometry)
    names = sorted(header.shapes)
    if names != ["lengths", "rows"]:
        raise ValueError(f"{path} holds tensors {files.shown(names)}, expected ['lengths', 'rows']")
    slots, T, P = config.slots(geometry.kinds), config.count, config.longest
    shapes = {"rows": [T, *geometry.kv_shape(len(slots), P)], "lengths": [T]}
    for name, shape in shapes.items():
        if header.shapes[name] != shape:
            raise ValueError(f"{path} holds {name} {files.shown(header.shapes[name])}, expected {files.shown(shape)}")
    try:
        with safe_open(path, framework="pt") as file:
            rows, lengths = file.get_tensor("rows"), file.get_tensor("lengths")
    except (SafetensorError, KeyError) as error:  # KeyError: an element type that safetensors knows and torch does not
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    except RuntimeError as error:  # torch's, who opens the file once more to map it
        raise OSError(f"{path} cannot be mapped into memory ({error})") from None
    if saving.stamp(path.parent, (path.name,)) != before:  # the header of one file and the map of another
        raise ValueError(f"{path} was written to while it was read")
    if rows.dtype not in files.FLOATS:
        raise ValueError(f"{path} holds rows {rows.dtype}, expected a floating-point type")
    if lengths.dtype != torch.int64:
        raise ValueError(f"{path} holds lengths {lengths.dtype}, expected torch.int64")
    for at, piece in enumerate(lengths.split(PIECE)):  # a file may claim more rows than memory has room for lengths
        bad = ((piece < 1) | (piece > P)).nonzero()
        if bad.numel():
            i = int(bad[0])
            raise ValueError(f"{path} has length {int(piece[i])} for row {at * PIECE + i}, expected 1 to {P}")
    if not mapped:
        rows = rows.clone()
        if not files.finite(rows):
            raise ValueError(f"{path} holds values that are infinite or not a number")
    return config, rows, lengths.clone()  # not part of the map, which keeps the file open


def _config(path: Path, metadata: dict[str, str], geometry: Geometry) -> PrefixConfig:
    if metadata.get("format") != FORMAT:
        words = files.shown(metadata.get("format"))
        raise ValueError(f"{path} has format {words}, expected {FORMAT!r}: not a bank of prefixattn")
    if metadata.get("version") != VERSION:
        words = files.shown(metadata.get("version"))
        raise ValueError(f"{path} has version {words}; this prefixattn reads version {VERSION}")
    config, model = (_json(path, metadata, name) for name in ("config", "model"))
    checkpoint.check_geometry(path, model, geometry)
    found = PrefixConfig.from_dict(config)
    found.slots(geometry.kinds)
    if found.count is None:
        raise ValueError(f"{path} has count None, expected the number of its prefixes")
    return found


def _json(path: Path, metadata: dict[str, str], name: str) -> Any:
    try:
        return json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no readable {name} in its header ({error})") from None
