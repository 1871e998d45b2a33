"""What checkpoints and PEFT's adapters share: files written whole, and read as JSON and safetensors alone."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write(path: Path, data: bytes) -> None:
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


def write_json(path: Path, values: dict[str, Any]) -> None:
    write(path, (json.dumps(values, indent=2) + "\n").encode())


def dump(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file; ValueError, before anything is written, if no reader would take it."""
    bad = [name for name, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"the prefix holds values that are infinite or not a number, in {', '.join(bad)}: not saved")
    data: bytes = dump_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
    return data


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it is damaged or was not written in full") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def read_tensors(path: Path, digest: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file; with `digest`, of the one with that SHA-256."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    data = path.read_bytes()
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} is damaged or was not written in full: its SHA-256 is not the one saved beside it")
    try:
        return load_tensors(data)
    except (SafetensorError, KeyError) as error:  # KeyError: an element type that safetensors knows and torch does not
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    """ValueError unless these are exactly the tensors `shapes`, finite and of one floating-point type."""
    found = {name: list(t.shape) for name, t in tensors.items()}
    if found != shapes:
        raise ValueError(f"{path} holds tensors {found}, expected {shapes}")
    types = sorted({str(t.dtype) for t in tensors.values()})
    if len(types) != 1 or next(iter(tensors.values())).dtype not in FLOATS:
        raise ValueError(f"{path} holds tensors of {', '.join(types)}, expected one floating-point type for all")
    bad = [name for name, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds values that are infinite or not a number, in {', '.join(bad)}")
