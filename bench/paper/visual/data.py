"""What a vision task is: named parts of labelled images. Readers make it, training takes it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from bench.paper.runs import Refusal

SEARCH, SELECT, TEST = "train", "val", "test"


class Part(Protocol):
    """Labelled images of one split."""

    labels: np.ndarray  # int64 [n]

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image:
        """RGB of any size; Refusal, in one line with file and row, if it cannot be read."""
        ...


@dataclass(frozen=True)
class Arrays:
    """Images that lie in memory: `pixels` uint8 [n, height, width, 3] or [n, height, width]."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i]).convert("RGB")


@dataclass(frozen=True)
class Files:
    """Images that lie in files: `paths` of one list, whose rows `rows` an error names."""

    root: Path
    paths: Sequence[str]
    labels: np.ndarray
    source: str  # the list's file
    rows: Sequence[int]  # where in it, from 1

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        path = self.root / self.paths[i]
        try:
            return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        except Exception as error:  # PIL's decoders have errors of many kinds for a damaged file
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Refusal(f"{self.source}, row {self.rows[i]}: {path}: not a readable image ({why})") from None


@dataclass(frozen=True)
class Task:
    """`parts` has "train", "val" (to choose rates by) and "test"; `final` names the part of the last runs.

    `style` says how images are cropped (transforms.py): "fgvc" or "vtab".
    """

    name: str
    suite: str
    classes: int
    parts: Mapping[str, Part]
    style: str
    final: str = "train"
    notes: Sequence[str] = field(default_factory=tuple)  # for the report, such as "rendered anew"
