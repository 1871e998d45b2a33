"""VTAB-1K through a stand-in for TensorFlow Datasets: which examples are asked for, and what their labels become."""

import dataclasses
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.paper.visual import vtab
from bench.paper.visual.testing_data import refused


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (2, 2), value).save(file, "png")
    return file.getvalue()


class Tfds(types.ModuleType):
    """`sizes` of the parts of the one dataset; `example(part, i)` without its image."""

    def __init__(self, sizes: dict[str, int], example: Callable[[str, int], dict], fails: str = "") -> None:
        super().__init__("tensorflow_datasets")
        self.sizes, self.example, self.fails, self.asked = sizes, example, fails, []
        self.decode = types.SimpleNamespace(SkipDecoding=lambda: "as it is")
        counts = {part: types.SimpleNamespace(num_examples=size) for part, size in sizes.items()}
        self.info = types.SimpleNamespace(splits=counts)

    def builder(self, name: str, data_dir: str | None) -> "Tfds":
        self.asked.append((name, data_dir))
        return self

    def download_and_prepare(self) -> None:
        if self.fails:
            raise AssertionError(self.fails)

    def as_dataset(self, split: str, shuffle_files: bool, decoders: dict[str, str]) -> Iterator[dict]:
        assert not shuffle_files and decoders == {"image": "as it is"}
        self.asked.append(split)
        part, _, span = split.removesuffix("]").partition("[")
        start, end = (int(number) for number in span.split(":"))
        rows = range(start, min(end, self.sizes[part]))
        return ({"image": f"{part} {i}".encode()} | self.example(part, i) for i in rows)  # says which example it is

    @staticmethod
    def as_numpy(examples: Iterator[dict]) -> Iterator[dict]:
        return examples


@pytest.fixture
def tfds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tfds]:
    def made(*arguments: Any, **options: Any) -> Tfds:
        module = Tfds(*arguments, **options)
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
        return module

    return made


SPANS = {  # as task_adaptation's num_samples and tfds_splits work out
    "cifar": (dict(train=50_000, test=10_000), "train[0:800] train[45000:45200] test[0:10000]"),
    "caltech101": (dict(train=3_059, test=6_084), "train[0:800] train[2753:2953] test[0:6084]"),
    "dtd": (dict(train=1_880, validation=1_880, test=1_880), "train[0:800] validation[0:200] test[0:1880]"),
    "oxford_iiit_pet": (dict(train=3_680, test=3_669), "train[0:800] train[2944:3144] test[0:3669]"),
    "svhn": (dict(train=73_257, test=26_032), "train[0:800] train[65931:66131] test[0:26032]"),
    "eurosat": (dict(train=27_000), "train[0:800] train[16200:16400] train[21600:27000]"),
    "resisc45": (dict(train=31_500), "train[0:800] train[18900:19100] train[25200:31500]"),
    "kitti": (dict(train=6_347, validation=423, test=711), "train[0:800] validation[0:200] test[0:711]"),
    "dsprites_loc": (dict(train=737_280), "train[0:800] train[589824:590024] train[663552:737280]"),
    "smallnorb_azi": (dict(train=24_300, test=24_300), "train[0:800] test[0:200] test[12150:24300]"),
    "clevr_count": (
        dict(train=70_000, validation=15_000, test=15_000), "train[0:800] train[63000:63200] validation[0:15000]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPANS)
def test_cuts_tfds_as_task_adaptation(name: str, tfds: Callable[..., Tfds], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, spans = SPANS[name]
    source = dataclasses.replace(vtab.TASKS[name].source, label=lambda x: 0)
    monkeypatch.setitem(vtab.TASKS, name, dataclasses.replace(vtab.TASKS[name], source=source))
    module = tfds(sizes, lambda part, i: {})
    task = vtab.read_tfds(name, Path("some/where"))
    assert module.asked == [(vtab.TASKS[name].source.dataset, "some/where"), *spans.split()]
    assert {part: len(of) for part, of in task.parts.items()} == vtab.TASKS[name].counts
    assert (task.style, task.final) == ("vtab", "trainval")
    both = [*task.parts["train"].content, *task.parts["val"].content]
    assert task.parts["trainval"].content == both
    assert both[0] == b"train 0"
    assert {part.scale for part in task.parts.values()} == {255 if name == "dsprites_loc" else 1}


def objects(*depths: float, kinds: tuple[int, ...] = ()) -> dict:
    """`objects` of CLEVR and of KITTI at these depths."""
    places = np.array([(0, 0, depth) for depth in depths], dtype=np.float32).reshape(-1, 3)
    kinds = kinds or (0,) * len(depths)
    return {"objects": {"size": np.zeros(len(depths)), "pixel_coords": places, "location": places, "type": kinds}}


@pytest.mark.parametrize(
    "name, example, label",
    [
        ("clevr_count", objects(9, 9, 9), 0),
        ("clevr_count", objects(*[9] * 10), 7),
        ("clevr_dist", objects(12, 7.9, 20), 0),
        ("clevr_dist", objects(8.0), 0),  # not beyond 8
        ("clevr_dist", objects(8.1), 1),
        ("clevr_dist", objects(9.4), 3),
        ("clevr_dist", objects(11, 50), 5),
        ("kitti", objects(7.9, 30), 0),
        ("kitti", objects(8.0, 30), 0),
        ("kitti", objects(5.0, 19, kinds=(3, 2)), 1),  # a pedestrian stands nearer
        ("kitti", objects(5.0, 21, kinds=(4, 1)), 2),
        ("kitti", objects(5.0, kinds=(3,)), 3),
        ("kitti", objects(), 3),
        ("dsprites_loc", {"label_x_position": 0}, 0),
        ("dsprites_loc", {"label_x_position": 31}, 15),
        ("dsprites_loc", {"label_x_position": 17}, 8),
        ("dsprites_ori", {"label_orientation": 2}, 0),
        ("dsprites_ori", {"label_orientation": 3}, 1),
        ("dsprites_ori", {"label_orientation": 5}, 2),
        ("dsprites_ori", {"label_orientation": 39}, 15),
        ("smallnorb_azi", {"label_azimuth": 17, "label_elevation": 3}, 17),
        ("smallnorb_ele", {"label_azimuth": 17, "label_elevation": 3}, 3),
        ("dmlab", {"label": 5}, 5),
    ],
)
def test_labels_of_tfds_are_those_of_task_adaptation(name: str, example: dict, label: int) -> None:
    assert vtab.TASKS[name].source.label(example) == label


def test_sprites_of_tfds_become_black_and_white() -> None:
    part = vtab.Encoded([png(0), png(1), b"no"], np.zeros(3, dtype=np.int64), "dsprites:2.*.* train[0:3]", scale=255)
    assert [np.unique(np.asarray(part.image(at))).tolist() for at in (0, 1)] == [[0], [255]]
    assert refused(lambda: part.image(2)).startswith("dsprites:2.*.* train[0:3], row 3: not a readable image (")
    assert len(pickle.loads(pickle.dumps(part))) == 3  # for workers that are not forked


def test_what_tfds_cannot_do_is_a_refusal(tfds: Callable[..., Tfds], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    said = refused(lambda: vtab.read_tfds("dtd"))
    assert "TensorFlow Datasets cannot be imported" in said and vtab.NEEDED in said
    own = dict(train=1_880, validation=1_880, test=1_880)
    tfds(own, lambda part, i: {"label": 0}, fails="Manual directory does not exist\nor is empty")
    said = refused(lambda: vtab.read_tfds("dtd"))
    assert said == "dtd:3.*.*: tfds cannot prepare it (AssertionError: Manual directory does not exist)"
    tfds(own, lambda part, i: {"label": 47 if (part, i) == ("validation", 4) else 46})
    said = refused(lambda: vtab.read_tfds("dtd"))
    assert said == "dtd:3.*.* validation[0:200], row 5: label 47, expected 0 to 46"
    tfds(own | dict(test=1_879), lambda part, i: {"label": 0})
    said = refused(lambda: vtab.read_tfds("dtd"))
    assert said == "dtd:3.*.* test[0:1879]: ends at row 1,879; 1,879 images, published are 1,880"
    tfds(dict(train=1_880), lambda part, i: {"label": 0})
    assert refused(lambda: vtab.read_tfds("dtd")) == "tfds has no part 'validation' of this dataset, only train"
