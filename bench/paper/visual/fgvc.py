"""The five fine-grained sets (FGVC), split as VPT split them: a JSON file a part, {image path: class id}.

Also what every list of images needs: its rows are checked once, and a refusal names the file and the row. Of a JSON
file a row is an entry, counted from 1.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from posixpath import normpath

import numpy as np

from bench.paper.runs import Refusal
from bench.paper.visual.data import SEARCH, SELECT, TEST, Files, Task

SUITE = STYLE = "fgvc"
PARTS = (SEARCH, SELECT, TEST)
MOST = 2**26  # bytes of a list: the longest has 7 million
SPLITS = "VPT's splits (CC BY-NC 4.0): json.zip of the Hugging Face dataset XiN0919/FGVC, or see github.com/KMnP/vpt"

Id = int | str


@dataclass(frozen=True)
class Set:
    """`folders`: names under which splits or images may lie; `images`: where in such a folder the paths begin."""

    display: str
    folders: tuple[str, ...]
    images: str
    classes: int
    counts: Mapping[str, int]  # images of each part, as published
    where: str
    licence: str


SETS: dict[str, Set] = {
    "cub200": Set(
        "CUB-200-2011", ("cub200", "cub", "CUB_200_2011"), "images", 200, dict(train=5_394, val=600, test=5_794),
        "https://www.vision.caltech.edu/datasets/cub_200_2011/ (CUB_200_2011.tgz)",
        "photographs of others; non-commercial research",
    ),
    "nabirds": Set(
        "NABirds", ("nabirds", "nabird"), "images", 555, dict(train=21_536, val=2_393, test=24_633),
        "https://dl.allaboutbirds.org/nabirds (after its form)",
        "terms of the Cornell Lab of Ornithology; non-commercial research",
    ),
    "flowers": Set(
        "Oxford Flowers", ("flowers", "oxford_flowers"), "", 102, dict(train=1_020, val=1_020, test=6_149),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz)",
        "none stated",
    ),
    "dogs": Set(
        "Stanford Dogs", ("dogs", "stanford_dogs"), "Images", 120, dict(train=10_800, val=1_200, test=8_580),
        "http://vision.stanford.edu/aditya86/ImageNetDogs/ (images.tar)",
        "ImageNet's terms; non-commercial research",
    ),
    "cars": Set(
        "Stanford Cars", ("cars", "stanford_cars"), "", 196, dict(train=7_329, val=815, test=8_041),
        "car_ims.tgz of the Hugging Face dataset XiN0919/FGVC (the page of its authors is gone)",
        "none stated; non-commercial research",
    ),
}  # fmt: skip


def read(name: str, splits: Path, images: Path, shifted_labels: bool = False) -> Task:
    """The set `name` of SETS, its lists checked against the published counts; images are opened when they are needed.

    `splits` holds train.json, val.json and test.json, and `images` the folder of images, itself or in a folder of
    the set's name; both may be the same. Class ids become labels by their order among the ids of train.json.
    `shifted_labels` takes, as VPT's code does, the order among the ids of each part instead: validation of NABirds,
    which lacks 2 classes, is then scored against labels that are shifted by up to 2.

    Raises:
        Refusal: a list is missing or wrong (one line, with file and row), or there is no folder of images.
    """
    the = known(name)
    lists = {part: splits_folder(name, splits) / f"{part}.json" for part in PARTS}
    rows = {part: entries(path) for part, path in lists.items()}
    for part in PARTS:
        counted(lists[part], len(rows[part]), the.counts[part])
    first = next((path for _, path, _ in rows[SEARCH]), "")
    root = images_folder(name, images, first)
    ids = ordered(lists[SEARCH], rows[SEARCH])
    if len(ids) != the.classes:
        raise Refusal(f"{lists[SEARCH]}: {len(ids)} class ids in {len(rows[SEARCH])} rows, expected {the.classes}")
    parts, notes = {}, []
    for part in PARTS:
        own = ordered(lists[part], rows[part])
        for row, path, found in rows[part]:
            if found not in ids:
                raise Refusal(f"{lists[part]}, row {row}: {path}: class id {found!r} is not in {SEARCH}.json")
        labels = own if shifted_labels else ids
        parts[part] = files(lists[part], root, [(row, path, labels[found]) for row, path, found in rows[part]])
        if len(own) != len(ids):
            how = "numbered by its own ids, as in VPT's code" if shifted_labels else "numbered as in training"
            notes.append(f"{part} has {len(own)} of {len(ids)} classes, {how}")
    disjoint(parts)
    return Task(name, SUITE, the.classes, parts, STYLE, final=SEARCH, notes=tuple(notes))


def known(name: str) -> Set:
    if name not in SETS:
        raise Refusal(f"no FGVC set {name!r}; there are {', '.join(SETS)}")
    return SETS[name]


def splits_folder(name: str, splits: Path) -> Path:
    """The folder with the set's lists: `splits`, or the one of the set's name in it."""
    for folder in (*(splits / inner for inner in known(name).folders), splits):
        if any((folder / f"{part}.json").is_file() for part in PARTS):
            return folder
    lists = "train.json, val.json and test.json"
    raise Refusal(f"{splits}: no {lists} here or in {' or '.join(known(name).folders)}; {SPLITS}")


def images_folder(name: str, images: Path, first: str) -> Path:
    """The folder in which the paths of the lists begin: where the image `first` lies, else the likeliest."""
    the = known(name)
    folders = [folder for inner in (*the.folders, "") if (folder := images / inner / the.images).is_dir()]
    if not folders:
        wanted = f"{the.folders[0]}/{the.images}".rstrip("/")
        raise Refusal(f"{images}: no folder {wanted} with the images of {the.display}; to be had: {the.where}")
    return next((folder for folder in folders if first and (folder / first).is_file()), folders[0])


def entries(source: Path) -> list[tuple[int, str, Id]]:
    """(row, path, class id) of each entry of a JSON list, in the order of the file; Refusal for a wrong one."""
    written = text(source, SPLITS)
    try:
        content = json.loads(written, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise Refusal(f"{source}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise Refusal(f"{source}: not a list of images ({error})") from None
    if not isinstance(content, _Pairs):
        raise Refusal(f"{source}: expected an object of image paths and class ids, found {str(content)[:40]!r}")
    rows: list[tuple[int, str, Id]] = []
    for row, (path, its) in enumerate(content, 1):
        if isinstance(its, bool) or not isinstance(its, int | str):
            raise Refusal(f"{source}, row {row}: {path[:200]!r}: {str(its)[:40]!r} is no class id")
        if type(its) is not type(content[0][1]):
            raise Refusal(f"{source}, row {row}: {path[:200]!r}: class id {its!r}, but row 1 has {content[0][1]!r}")
        rows.append((row, path, its))
    sound(source, ((row, path) for row, path, _ in rows))
    return rows


class _Pairs(list):
    """The members of a JSON object: a dict would keep only the last of two of the same name."""


def ordered(source: Path, rows: Sequence[tuple[int, str, Id]]) -> dict[Id, int]:
    """Labels of the class ids in `rows`: their places in sorted order."""
    if not rows:
        raise Refusal(f"{source}: no rows")
    return {found: at for at, found in enumerate(sorted({found for _, _, found in rows}))}


# --- of every list ---


def text(source: Path, where: str) -> str:
    """The list's text; a Refusal ends with `where` it is to be had."""
    try:
        size = source.stat().st_size
        if size > MOST:
            raise Refusal(f"{source}: has {size:,} bytes, a list has at most {MOST:,}")
        content = source.read_bytes()
    except OSError as error:
        raise Refusal(f"{source}: cannot be read ({error.strerror}); {where}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise Refusal(f"{source}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def sound(source: Path, rows: Iterable[tuple[int, str]]) -> None:
    """Refuses a path that leaves the folder of images, or that a row before it has."""
    seen: dict[str, int] = {}
    for row, path in rows:
        inner, plain = path.split("/"), normpath(path)
        if plain == "." or not path.isprintable() or "\\" in path:
            raise Refusal(f"{source}, row {row}: {path[:200]!r} is no path of an image")
        if path.startswith("/") or ".." in inner or inner[0].endswith(":"):
            raise Refusal(f"{source}, row {row}: {path[:200]!r} leaves the folder of images")
        if plain in seen:
            raise Refusal(f"{source}, row {row}: {path[:200]!r} is in row {seen[plain]} too")
        seen[plain] = row


def counted(source: Path, found: int, expected: int) -> None:
    if found != expected:
        row = f"ends at row {found:,}" if found < expected else f"goes on after row {expected:,}"
        raise Refusal(f"{source}: {row}; {found:,} images, published are {expected:,}")


def files(source: Path, root: Path, rows: Sequence[tuple[int, str, int]]) -> Files:
    """A part of (row, path under `root`, label)."""
    labels = np.array([label for _, _, label in rows], dtype=np.int64)
    return Files(root, [path for _, path, _ in rows], labels, str(source), [row for row, _, _ in rows])


def disjoint(parts: Mapping[str, Files]) -> None:
    """Refuses an image that is in two of `parts`."""
    for a, b in combinations(parts.values(), 2):
        there = {normpath(path): row for path, row in zip(a.paths, a.rows, strict=True)}
        for path, row in zip(b.paths, b.rows, strict=True):
            if other := there.get(normpath(path)):
                raise Refusal(f"{b.source}, row {row}: {path} is also in {a.source}, row {other}")
