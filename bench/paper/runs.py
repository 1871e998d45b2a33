"""What lets a run survive a kill and be told from another: atomic files, fingerprints, provenance."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import record
from bench.harness.command import Refusal
from bench.harness.files import replacing


def move_in(new: Path, folder: Path, last: str) -> None:
    """Moves the files of `new` into `folder` and removes it; the file `last`, whose presence says "finished", last."""
    for file in sorted(new.iterdir(), key=lambda f: f.name == last):
        os.replace(file, folder / file.name)
    new.rmdir()


def replace_file(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    replace_file(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, otherwise: str = "delete it and start again") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not readable as JSON ({error}); {otherwise}") from None


def save_state(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    save_tensors(path, {"fingerprint": fingerprint, **state})


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all; a disk that takes no more is an OSError, as of any other file."""
    import torch

    with replacing(path) as temporary:  # not through a buffer, which would count as the run's memory
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's writer tells what it noticed last, not what happened
            if not any(word in str(error) for word in ("inline_container", "iostream", "writing file")):
                raise
            free = shutil.disk_usage(path.parent).free / 2**20
            raise OSError(errno.ENOSPC, f"cut short; the disk has {free:,.0f} MiB left") from error


def load_state(path: Path, fingerprint: str, keys: set[str]) -> dict[str, Any] | None:
    """The state saved by `save_state` for the same run, None if there is none yet."""
    import torch

    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor errors of many kinds, and all of them mean the same
        why = str(error).strip().splitlines()
        raise Refusal(
            f"{path}: damaged checkpoint ({type(error).__name__}: {why[0][:80] if why else ''}); "
            "delete it to start this method again"
        ) from None
    missing = sorted({"fingerprint", *keys} - set(state)) if isinstance(state, dict) else ["everything"]
    if missing:
        raise Refusal(f"{path}: not a checkpoint of this program (lacks {', '.join(missing)}); delete it")
    if state["fingerprint"] != fingerprint:
        raise Refusal(
            f"{path}: checkpoint of another run (fingerprint {str(state['fingerprint'])[:12]}, expected "
            f"{fingerprint[:12]}: settings, data or weights differ); delete it or choose another --out"
        )
    return state


def digest(*parts: Any) -> str:
    """sha256 over files (Path), bytes and anything JSON can write."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        elif not isinstance(part, bytes | memoryview):
            part = json.dumps(part, sort_keys=True, default=str).encode()
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def room(positions: int, length: int, max_new: int) -> int:
    """The positions that the prefix leaves to prompt and text."""
    limit = positions - length
    if limit - max_new < 1:
        raise Refusal(
            f"a prefix of length {length} and --max-new {max_new} leave no room for a prompt in the {positions} "
            "positions of the model"
        )
    return limit


def thinned(values: list[float], points: int = 500) -> list[tuple[int, float]]:
    """(last step, mean over the window) of at most `points` equal windows; steps count from 1."""
    window = -(-len(values) // points) if values else 1
    cuts = range(0, len(values), window)
    return [(min(at + window, len(values)), sum(part) / len(part)) for at in cuts if (part := values[at : at + window])]


PACKAGES = ("torch", "transformers", "tokenizers", "prefixattn", "sacrebleu", "pycocoevalcap", "numpy")


def provenance(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Versions of `packages`, commit and device; no name of a machine, a user or a folder."""
    found = record.provenance(packages)
    return {
        "date": found.time.date().isoformat(),
        "python": found.python,
        "versions": found.versions,
        "commit": found.commit,
        "tree": found.tree(),
        "device": device_name(),
    }


def device_name() -> str:
    """The processor (and the GPU, where torch is loaded and sees one) in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{record.cpu_name()}, {cores} cores"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}; {name}"
    return name


def parent_alive(parent: int | None) -> Callable[[], bool]:
    """False once `parent`, which started this process, is gone: a killed run must not leave a writer behind."""
    return lambda: parent is None or os.getppid() == parent
