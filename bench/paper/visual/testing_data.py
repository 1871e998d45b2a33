"""What tests of the vision data share: made pictures and lists of small sets, refusals in one line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.paper.runs import Refusal
from bench.paper.visual import fgvc, vtab

COUNTS = dict(train=6, val=3, test=4)
Lists = dict[str, dict[str, Any]]


def refused(work: Callable[[], Any]) -> str:
    """The words of its refusal, which are one line."""
    with pytest.raises(Refusal) as refusal:
        work()
    words = str(refusal.value)
    assert "\n" not in words
    return words


def picture(path: Path, number: int = 0, side: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def small_cub(monkeypatch: pytest.MonkeyPatch) -> Lists:
    """Makes CUB a set of three classes, whose validation lacks the first; its lists."""
    small = dataclasses.replace(fgvc.SETS["cub200"], classes=3, counts=COUNTS)
    monkeypatch.setitem(fgvc.SETS, "cub200", small)
    ids = dict(train=["007", "021", "100"] * 2, val=["021", "100", "100"], test=["007", "100", "021", "021"])
    return {part: {f"{part}/{at}.jpg": found for at, found in enumerate(column)} for part, column in ids.items()}


def write_lists(folder: Path, lists: Lists, images: Path | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in lists.items():
        (folder / f"{part}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    if images:
        for number, path in enumerate(path for content in lists.values() for path in content):
            picture(images / path, number, side=32)


def write_vtab(folder: Path, images: bool = True) -> None:
    """Two classes; the images of the 1,000 are files of their own."""
    for file, part, count in zip(vtab.LISTS.values(), ("a", "b", "ab", "c"), (4, 2, 6, 3), strict=True):
        rows = [f"images/{part}/{at}.png {at % 2}" for at in range(count)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(rows) + "\n", encoding="utf-8")
        for at in range(count) if images else ():
            picture(folder / "images" / part / f"{at}.png", at)
