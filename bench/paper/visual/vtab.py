"""The 19 tasks of VTAB-1K: from the folder of images and lists that is passed around, or through TensorFlow Datasets.

Parts are "train" (800 images), "val" (200), "trainval" (the 1,000 of both) and "test" (the whole test set).
"""

import io
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.paper.runs import Refusal
from bench.paper.visual.data import SEARCH, SELECT, TEST, Files, Part, Task
from bench.paper.visual.fgvc import counted, disjoint, files, sound, text

SUITE = STYLE = "vtab"
FINAL = "trainval"
LISTS = {SEARCH: "train800.txt", SELECT: "val200.txt", FINAL: "train800val200.txt", TEST: "test.txt"}
TRAINING = {SEARCH: 800, SELECT: 200, FINAL: 1_000}
GROUPS = ("natural", "specialized", "structured")
WHERE = "vtab-1k.zip of the Hugging Face dataset XiN0919/VTAB-1k (4.66 GB)"
LICENCE = "of each set its own; Retinopathy and Resisc45 come with terms to accept"
NEEDED = 'pip install "tensorflow-datasets>=4.9" tensorflow'

Example = Mapping[str, Any]  # of a tfds dataset, as numpy


@dataclass(frozen=True)
class Source:
    """Where task_adaptation takes a task from.

    `train`, `val` and `test` are parts of tfds; one that is a share of a part is (part, from %, to %).
    """

    dataset: str
    train: "str | Share" = ("train", 0, 90)
    val: "str | Share" = ("train", 90, 100)
    test: "str | Share" = "test"
    label: Callable[[Example], int] = operator.itemgetter("label")
    scale: int = 1  # of pixels


Share = tuple[str, int, int]


def _beyond(thresholds: Sequence[float], distance: float) -> int:
    """The last of the rising `thresholds` that `distance` exceeds."""
    return int(np.flatnonzero(np.asarray(thresholds) < distance).max())


def _clevr_count(x: Example) -> int:
    return len(x["objects"]["size"]) - 3  # a scene has 3 to 10 objects


def _clevr_distance(x: Example) -> int:
    nearest = np.asarray(x["objects"]["pixel_coords"])[:, 2].min()
    return _beyond((0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0), nearest)


def _kitti_distance(x: Example) -> int:
    kinds, depths = np.asarray(x["objects"]["type"]), np.asarray(x["objects"]["location"]).reshape(-1, 3)[:, 2]
    vehicles = depths[kinds < 3]  # car, van, truck
    return _beyond((-100.0, 8.0, 20.0, 999.0), vehicles.min() if len(vehicles) else 1_000.0)


def _sixteenth(field: str, values: int) -> Callable[[Example], int]:
    return lambda x: int(int(x[field]) // (values / 16))


_OWN: dict[str, Any] = dict(train="train", val="validation")  # the dataset has a validation part
_SHARES: dict[str, Any] = dict(train=("train", 0, 60), val=("train", 60, 80), test=("train", 80, 100))
_SPRITES: dict[str, Any] = dict(train=("train", 0, 80), val=("train", 80, 90), test=("train", 90, 100), scale=255)
_NORB: dict[str, Any] = dict(train="train", val=("test", 0, 50), test=("test", 50, 100))


@dataclass(frozen=True)
class Benchmark:
    """`test`: the images of the test part, as published."""

    display: str
    group: str
    classes: int
    test: int
    source: Source

    @property
    def counts(self) -> dict[str, int]:
        return {**TRAINING, TEST: self.test}


TASKS: dict[str, Benchmark] = {
    "cifar": Benchmark("CIFAR-100", "natural", 100, 10_000, Source("cifar100:3.*.*")),
    "caltech101": Benchmark("Caltech101", "natural", 102, 6_084, Source("caltech101:3.*.*")),
    "dtd": Benchmark("DTD", "natural", 47, 1_880, Source("dtd:3.*.*", **_OWN)),
    "oxford_flowers102": Benchmark("Flowers102", "natural", 102, 6_149, Source("oxford_flowers102:2.*.*", **_OWN)),
    "oxford_iiit_pet": Benchmark(
        "Pets", "natural", 37, 3_669, Source("oxford_iiit_pet:3.*.*", ("train", 0, 80), ("train", 80, 100))
    ),
    "svhn": Benchmark("SVHN", "natural", 10, 26_032, Source("svhn_cropped:3.*.*")),
    "sun397": Benchmark("Sun397", "natural", 397, 21_750, Source("sun397/tfds:4.*.*", **_OWN)),
    "patch_camelyon": Benchmark("Patch Camelyon", "specialized", 2, 32_768, Source("patch_camelyon:2.*.*", **_OWN)),
    "eurosat": Benchmark("EuroSAT", "specialized", 10, 5_400, Source("eurosat/rgb:2.*.*", **_SHARES)),
    "resisc45": Benchmark("Resisc45", "specialized", 45, 6_300, Source("resisc45:3.*.*", **_SHARES)),
    "diabetic_retinopathy": Benchmark(
        "Retinopathy", "specialized", 5, 42_670, Source("diabetic_retinopathy_detection/btgraham-300:3.*.*", **_OWN)
    ),
    "clevr_count": Benchmark(
        "Clevr/count", "structured", 8, 15_000, Source("clevr:3.*.*", test="validation", label=_clevr_count)
    ),
    "clevr_dist": Benchmark(
        "Clevr/distance", "structured", 6, 15_000, Source("clevr:3.*.*", test="validation", label=_clevr_distance)
    ),
    "dmlab": Benchmark("DMLab", "structured", 6, 22_735, Source("dmlab:2.0.1", **_OWN)),
    "kitti": Benchmark("KITTI/distance", "structured", 4, 711, Source("kitti:3.2.0", **_OWN, label=_kitti_distance)),
    "dsprites_loc": Benchmark(
        "dSprites/loc", "structured", 16, 73_728,
        Source("dsprites:2.*.*", **_SPRITES, label=_sixteenth("label_x_position", 32)),
    ),
    "dsprites_ori": Benchmark(
        "dSprites/ori", "structured", 16, 73_728,
        Source("dsprites:2.*.*", **_SPRITES, label=_sixteenth("label_orientation", 40)),
    ),
    "smallnorb_azi": Benchmark(
        "SmallNORB/azi", "structured", 18, 12_150,
        Source("smallnorb:2.*.*", **_NORB, label=operator.itemgetter("label_azimuth")),
    ),
    "smallnorb_ele": Benchmark(
        "SmallNORB/ele", "structured", 9, 12_150,
        Source("smallnorb:2.*.*", **_NORB, label=operator.itemgetter("label_elevation")),
    ),
}  # fmt: skip


def known(name: str) -> Benchmark:
    if name not in TASKS:
        raise Refusal(f"no VTAB-1K task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def read(name: str, root: Path) -> Task:
    """The task `name` of TASKS from `root`/`name`, its lists checked; images are opened when they are needed.

    A row of a list is a path under `root`/`name`, a space and a label from 0. The images of train800val200.txt may be
    files of their own: that they are those of both other lists is told only from the labels, in a note.

    Raises:
        Refusal: a list is missing or wrong, in one line with file and row.
    """
    the = known(name)
    folder = root / name
    if not folder.is_dir():
        raise Refusal(f"{folder}: no such folder; expected one with {', '.join(LISTS.values())}; {WHERE}")
    parts: dict[str, Files] = {}
    for part, file in LISTS.items():
        rows = entries(folder / file, the.classes)
        counted(folder / file, len(rows), the.counts[part])
        parts[part] = files(folder / file, folder, rows)
    disjoint({part: parts[part] for part in (SEARCH, SELECT, TEST)})
    disjoint({part: parts[part] for part in (FINAL, TEST)})
    notes = []
    both = np.concatenate([parts[SEARCH].labels, parts[SELECT].labels])
    if not np.array_equal(np.sort(parts[FINAL].labels), np.sort(both)):
        notes.append(f"{LISTS[FINAL]} has other labels than {LISTS[SEARCH]} and {LISTS[SELECT]} together")
    return Task(name, SUITE, the.classes, parts, STYLE, final=FINAL, notes=tuple(notes))


def entries(source: Path, classes: int) -> list[tuple[int, str, int]]:
    """(row, path, label) of each line of a list; rows are lines from 1, and empty ones are passed over."""
    rows: list[tuple[int, str, int]] = []
    for row, line in enumerate(text(source, WHERE).split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        path, label = line.rsplit(None, 1) if len(line.split(None, 1)) == 2 else (line, "")
        if not (label.isascii() and label.isdigit()):
            raise Refusal(f"{source}, row {row}: expected a path and a label, found {line[:80]!r}")
        if len(label) > 9 or int(label) >= classes:
            raise Refusal(f"{source}, row {row}: {path}: label {label[:20]}, expected 0 to {classes - 1}")
        rows.append((row, path, int(label)))
    sound(source, ((row, path) for row, path, _ in rows))
    return rows


# --- TensorFlow Datasets ---


@dataclass(frozen=True)
class Encoded:
    """Images as the bytes of their files; `scale` multiplies pixels (those of dSprites are 0 and 1)."""

    content: Sequence[bytes]
    labels: np.ndarray
    source: str  # dataset and part
    scale: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(self.content[i])).convert("RGB")
        except Exception as error:  # PIL's decoders have errors of many kinds for a damaged file
            raise Refusal(f"{self.source}, row {i + 1}: not a readable image ({error})") from None
        return image if self.scale == 1 else Image.fromarray(np.asarray(image) * np.uint8(self.scale))


def read_tfds(name: str, data_dir: Path | None = None) -> Task:
    """The task `name` of TASKS as task_adaptation cuts it: the first 800 of its train part, the first 200 of val.

    `data_dir` is tfds's own folder (None: its default); what it lacks, tfds downloads and prepares. Retinopathy and
    Resisc45 have to be put there by hand, as tfds then says. The encoded images of all parts are held in memory.
    This was tried against a stand-in for tfds alone, with no dataset of it.

    Raises:
        Refusal: tfds is not installed or cannot prepare the dataset, or its counts or labels are not the published.
    """
    the = known(name)
    tfds = _tfds()
    try:
        builder = tfds.builder(the.source.dataset, data_dir=None if data_dir is None else str(data_dir))
        builder.download_and_prepare()
    except Exception as error:  # tfds and TensorFlow have no class in common for what goes wrong here
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise Refusal(f"{the.source.dataset}: tfds cannot prepare it ({type(error).__name__}: {why})") from None
    sizes = {part: builder.info.splits[part].num_examples for part in builder.info.splits}
    train, val, test = (_span(share, sizes) for share in (the.source.train, the.source.val, the.source.test))
    spans = {SEARCH: (train[0], train[1], train[1] + 800), SELECT: (val[0], val[1], val[1] + 200), TEST: test}
    parts: dict[str, Part] = {}
    for part, (of, start, end) in spans.items():
        where = f"{of}[{start}:{end}]"
        examples = builder.as_dataset(split=where, shuffle_files=False, decoders={"image": tfds.decode.SkipDecoding()})
        parts[part] = _held(the, f"{the.source.dataset} {where}", tfds.as_numpy(examples))
        counted(Path(f"{the.source.dataset} {where}"), len(parts[part]), the.counts[part])
    parts[FINAL] = _joined(parts[SEARCH], parts[SELECT])
    return Task(name, SUITE, the.classes, parts, STYLE, final=FINAL, notes=("read through TensorFlow Datasets",))


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        lacks = f"TensorFlow Datasets cannot be imported ({str(error).splitlines()[0][:200]})"
        raise Refusal(f"{lacks}: {NEEDED}; or take {WHERE}") from None
    return tensorflow_datasets


def _span(share: str | Share, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """(part of tfds, first, last + 1): percentages are rounded down, as task_adaptation does."""
    part, start, end = (share, 0, 100) if isinstance(share, str) else share
    if part not in sizes:
        raise Refusal(f"tfds has no part {part!r} of this dataset, only {', '.join(sizes)}")
    return part, _percent(start, sizes[part]), _percent(end, sizes[part])


def _percent(percent: int, size: int) -> int:
    return percent * size // 100


def _held(the: Benchmark, source: str, examples: Iterable[Example]) -> Encoded:
    content, labels = [], []
    for row, example in enumerate(examples, 1):
        label = int(the.source.label(example))
        if not 0 <= label < the.classes:
            raise Refusal(f"{source}, row {row}: label {label}, expected 0 to {the.classes - 1}")
        content.append(bytes(example["image"]))
        labels.append(label)
    return Encoded(content, np.array(labels, dtype=np.int64), source, the.source.scale)


def _joined(a: Encoded, b: Encoded) -> Encoded:
    labels = np.concatenate([a.labels, b.labels])
    return Encoded([*a.content, *b.content], labels, f"{a.source} + {b.source}", a.scale)
