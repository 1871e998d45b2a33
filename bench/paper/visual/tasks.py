"""Tasks by name: "fgvc-cub200", "vtab-cifar", or one of the small suite's ("cifar10", "tiny-dogs")."""

import os
from pathlib import Path

from bench.paper.runs import Refusal
from bench.paper.visual import fgvc, small, vtab
from bench.paper.visual.data import Task


def folder(name: str) -> Path | None:
    """Where PREFIXATTN_`name` says."""
    value = os.environ.get(f"PREFIXATTN_{name}")
    return Path(value) if value else None


def names(suite: str) -> tuple[str, ...]:
    """The tasks of "fgvc", "vtab1k" or "small"."""
    if suite == "fgvc":
        return tuple(f"fgvc-{name}" for name in fgvc.SETS)
    if suite == "vtab1k":
        return tuple(f"vtab-{name}" for name in vtab.TASKS)
    return tuple(small.NAMES)


def load(name: str, seed: int = 0, tfds: bool = False, shifted_labels: bool = False) -> Task:
    """Reads a task; Refusal, in one line, if its data are missing or wrong.

    PREFIXATTN_DATA names the folder; VTAB's tasks are in its vtab-1k/ (with `tfds`, read by tensorflow_datasets from
    PREFIXATTN_TFDS), FGVC's in fgvc/ with splits in PREFIXATTN_SPLITS, fgvc_splits/ or beside the images.
    """
    data = folder("DATA")
    suite, _, rest = name.partition("-")
    if suite == "fgvc":
        return _fgvc(rest, data, shifted_labels)
    if suite == "vtab":
        return _vtab(rest, data, tfds)
    if name not in small.NAMES:
        raise Refusal(f"no task {name!r}; there are {', '.join([*names('fgvc'), *names('vtab1k'), *small.NAMES])}")
    return small.small_task(name, data, seed)


def _needed(data: Path | None, name: str) -> Path:
    if data is None:
        raise Refusal(f"{name}: no data folder; give --data or set PREFIXATTN_DATA")
    return data


def _fgvc(name: str, data: Path | None, shifted_labels: bool) -> Task:
    if name not in fgvc.SETS:
        raise Refusal(f"no task 'fgvc-{name}'; there are {', '.join(names('fgvc'))}")
    root = _needed(data, name)
    splits = folder("SPLITS") or root / "fgvc_splits"
    return fgvc.read(name, splits, root / "fgvc", shifted_labels=shifted_labels)


def _vtab(name: str, data: Path | None, tfds: bool) -> Task:
    if name not in vtab.TASKS:
        raise Refusal(f"no task 'vtab-{name}'; there are {', '.join(names('vtab1k'))}")
    if tfds:
        return vtab.read_tfds(name, folder("TFDS"))
    return vtab.read(name, _needed(data, name) / "vtab-1k")
