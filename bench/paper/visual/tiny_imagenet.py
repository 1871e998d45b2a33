"""Tiny ImageNet: 200 classes of 64 x 64 pixels, 250 for training and 50 for validation of each in the folder read here.

150 classes train the small ViT (vit.py). The 50 of GROUPS are held out, so that a group is a fine-grained task whose
classes the backbone never saw, and neither anything close to them.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.paper.runs import Refusal, digest

SIDE = 64
FILES = ("train_a.zip", "train_b.zip", "val.zip")
PER_CLASS = {"train": 250, "val": 50}

# WordNet ids of the classes held out, by what they have in common
GROUPS: dict[str, tuple[str, ...]] = {
    "dogs": ("n02085620", "n02094433", "n02099601", "n02099712", "n02106662", "n02113799"),
    "cats": ("n02123045", "n02123394", "n02124075", "n02125311", "n02129165"),
    "insects": (
        "n02165456", "n02190166", "n02206856", "n02226429", "n02231487",
        "n02233338", "n02236044", "n02268443", "n02279972", "n02281406",
    ),
    "hoofed": ("n02403003", "n02410509", "n02415577", "n02423022", "n02437312"),
    "vehicles": (
        "n02814533", "n03100240", "n03670208", "n03796401", "n03977966", "n04146614", "n04285008", "n04487081",
    ),
    "clothes": (
        "n02669723", "n02963159", "n03404251", "n03617480", "n03763968", "n03770439", "n03980874", "n04532106",
    ),
    "produce": (
        "n07715103", "n07720875", "n07734744", "n07747607", "n07749582", "n07753592", "n07768694", "n12267677",
    ),
}  # fmt: skip
HELD_OUT = tuple(sorted(wnid for group in GROUPS.values() for wnid in group))


@dataclass(frozen=True)
class Images:
    """`pixels` uint8 [n, 64, 64, 3] and `labels` [n], places in `classes` (WordNet ids)."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def read(folder: Path, part: str, classes: Sequence[str]) -> Images:
    """The images of `classes` in the part "train" or "val", each class in the order of its files' numbers."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {wnid: [] for wnid in classes}
    for name in FILES:
        if name.split("_")[0].removesuffix(".zip") == part:
            _read_zip(folder / name, found)
    for wnid, images in found.items():
        if len(images) != PER_CLASS[part]:
            raise Refusal(f"{folder}: {len(images)} images of {wnid} for {part}, expected {PER_CLASS[part]}")
    pixels = np.stack([image for wnid in classes for _, image in sorted(found[wnid], key=lambda pair: pair[0])])
    labels = np.repeat(np.arange(len(classes)), PER_CLASS[part])
    return Images(pixels, labels, tuple(classes))


def _read_zip(path: Path, found: dict[str, list[tuple[int, np.ndarray]]]) -> None:
    """Members are WNID/NUMBER.webp or WNID/val_NUMBER.webp."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise Refusal(f"{path}: not a readable zip of Tiny ImageNet ({error})") from None
    with archive:
        for member in archive.namelist():
            wnid, _, file = member.partition("/")
            if wnid not in found or not file.endswith(".webp"):
                continue
            try:
                image = Image.open(io.BytesIO(archive.read(member))).convert("RGB")
                number = int(Path(file).stem.rpartition("_")[2])
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise Refusal(f"{path}: {member}: not a readable image ({error})") from None
            if image.size != (SIDE, SIDE):
                raise Refusal(f"{path}: {member}: {image.size[0]} x {image.size[1]} pixels, expected {SIDE} x {SIDE}")
            found[wnid].append((number, np.asarray(image)))


def all_classes(folder: Path) -> tuple[str, ...]:
    """WordNet ids of words.txt, sorted."""
    path = folder / "words.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: not readable ({error}); it lists the classes, an id and its words a line") from None
    classes = tuple(sorted(line.split("\t")[0] for line in lines if line.strip()))
    if missing := sorted(set(HELD_OUT) - set(classes)):
        raise Refusal(f"{path}: lacks the class {missing[0]} and {len(missing) - 1} more")
    return classes


def fingerprint(folder: Path) -> dict[str, str]:
    """sha256 of each file, for records."""
    return {name: digest(folder / name) for name in (*FILES, "words.txt")}
