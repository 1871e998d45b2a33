"""What checkpoints, banks and PEFT's adapters share: JSON and safetensors alone, looked at before they are read."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
MOST = 2**24  # bytes of a JSON file or a safetensors header: a text's token ids, as many as a prefix may have rows, fit
WIDEST = 16  # bytes of a number
WORDS = 1_000  # characters of a message


def json_bytes(values: dict[str, Any]) -> bytes:
    data = (json.dumps(values, indent=2) + "\n").encode()
    if len(data) > MOST:
        raise ValueError(
            f"the description of the prefix takes {len(data):,} bytes, expected at most {MOST:,}: not saved"
        )
    return data


def tensor_chunks(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> list[Any]:
    """A safetensors file in pieces; ValueError, before anything is written, if no reader would take it."""
    bad = [name for name, t in tensors.items() if not finite(t)]
    if bad:
        raise ValueError(f"the prefix holds values that are infinite or not a number, in {', '.join(bad)}: not saved")
    if other := {t.dtype for t in tensors.values()} - set(NAMES):
        raise ValueError(
            f"the prefix holds {', '.join(map(str, other))}, expected {', '.join(map(str, FLOATS))}: not saved"
        )
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    pieces: list[Any] = []
    end = 0
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):  # aligned
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
        pieces.append(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST:
        raise ValueError(f"the header of the prefix takes {len(text):,} bytes, expected at most {MOST:,}: not saved")
    return [len(text).to_bytes(8, "little") + text, *pieces]


def digest_of(chunks: list[Any]) -> str:
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def shown(value: object, most: int = 200) -> str:
    """`repr`, cut in its middle if it is long."""
    try:
        return _cut(repr(value), most)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


@contextmanager
def described(path: Path) -> Iterator[None]:
    """Inside, whatever a file that is none of ours leads to is a short ValueError that names it, or one beside it."""
    try:
        yield
    except ValueError as error:
        named = tuple(str(path.with_name(start)) for start in (path.name, "prefix-", "adapter_"))
        words = str(error) if str(error).startswith(named) else f"{path}: {error}"
        raise ValueError(_cut(words, WORDS + 2 * len(str(path))).replace("\n", " ")) from None
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        words = f"{path} does not describe a prefix ({type(error).__name__}: {error})"
        raise ValueError(_cut(words, WORDS + 2 * len(str(path))).replace("\n", " ")) from error


def read_json(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        data = file.read(MOST + 1)
    if len(data) > MOST:
        raise ValueError(f"{path} has more than {MOST:,} bytes, expected the short description of a prefix")
    return parsed(path, data)


def parsed(path: Path, data: bytes | str) -> dict[str, Any]:
    """The object that the JSON text `data`, which was found in the file `path`, says."""
    return _object(path, data, f"{path} is not JSON: it is damaged or was not written in full")


def _object(path: Path, data: bytes | str, words: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{words} ({_cut(str(error), 200)})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


class Header(NamedTuple):
    """Of a safetensors file."""

    shapes: dict[str, list[int]]
    metadata: dict[str, str]
    size: int  # bytes of the file


def read_header(path: Path) -> Header:
    """What a safetensors file says of itself, read without its tensors; its size is what that leads to."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    words = f"{path} is not a whole safetensors file"
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST, size - 8):
            raise ValueError(f"{words} (its header has {length:,} bytes, of {size:,} of the file)")
        header = _object(path, file.read(length), words)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{words} (its metadata are not texts)")
    end = 0
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ValueError(f"{words} (its entry {shown(name, 80)} is {shown(entry)})")
        end = max(end, entry["data_offsets"][1])
    if 8 + length + end != size:
        found = f"it has {size:,} bytes, and its header tells of {8 + length + end:,}"
        raise ValueError(f"{path} is damaged or was not written in full: it is not a whole safetensors file ({found})")
    return Header({name: entry["shape"] for name, entry in header.items()}, metadata, size)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return False
    numbers = (entry["shape"], entry["data_offsets"])
    whole = all(isinstance(n, list) and all(type(i) is int and 0 <= i < 2**63 for i in n) for n in numbers)
    return whole and isinstance(entry["dtype"], str) and len(entry["data_offsets"]) == 2


def read_tensors(path: Path, shapes: dict[str, list[int]], digest: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file that are exactly `shapes`, finite and of one floating-point type.

    With `digest`, of the file with that SHA-256.
    """
    header = read_header(path)
    if header.shapes != shapes:
        raise ValueError(f"{path} holds tensors {shown(header.shapes, 400)}, expected {shown(shapes, 400)}")
    if header.size > 8 + MOST + WIDEST * sum(math.prod(shape) for shape in shapes.values()):
        raise ValueError(f"{path} is not a whole safetensors file ({header.size:,} bytes are too many for its shapes)")
    data = path.read_bytes()
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} is damaged or was not written in full: its SHA-256 is not the one saved beside it")
    try:
        tensors: dict[str, Tensor] = load_tensors(data)
    except (SafetensorError, KeyError) as error:  # KeyError: an element type that safetensors knows and torch does not
        raise ValueError(f"{path} is not a whole safetensors file ({_cut(str(error), 200)})") from None
    types = sorted({str(t.dtype) for t in tensors.values()})
    if len(types) != 1 or next(iter(tensors.values())).dtype not in FLOATS:
        raise ValueError(f"{path} holds tensors of {', '.join(types)}, expected one floating-point type for all")
    bad = [name for name, t in tensors.items() if not finite(t)]
    if bad:
        raise ValueError(f"{path} holds values that are infinite or not a number, in {_cut(', '.join(bad), 200)}")
    return tensors


def finite(t: Tensor) -> bool:
    """In pieces: a bank may lie in a file that is larger than memory."""
    return all(bool(piece.isfinite().all()) for piece in t.detach().reshape(-1).split(2**24))
