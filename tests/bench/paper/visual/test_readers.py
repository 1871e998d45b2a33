"""The readers of FGVC and VTAB-1K on made folders and on VPT's real splits: labels, layouts, and what is refused."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.paper.visual import fgvc, vtab
from bench.paper.visual.testing_data import COUNTS, Lists, refused, small_cub, write_lists, write_vtab
from tests.support import ROOT


def splits_folder() -> Path | None:
    places = [os.environ.get("PREFIXATTN_DATA"), ROOT.parent / "shared" / "data"]
    folders = [Path(place) / "fgvc_splits" for place in places if place] + [Path(place) for place in places if place]
    return next((folder for folder in folders if (folder / "cub" / "train.json").exists()), None)


needs_splits = pytest.mark.skipif(
    splits_folder() is None, reason="no splits of VPT: set PREFIXATTN_DATA to a folder that holds fgvc_splits/"
)


# --- FGVC ---


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Lists:
    return small_cub(monkeypatch)


@pytest.mark.parametrize(
    "folder, images, splits",
    [
        ("cub200", "cub200/images", ""),  # DIR/<set>/{train,val,test}.json beside the images
        ("lists/cub", "CUB_200_2011/images", "lists"),
        ("lists", "images", "lists"),
    ],
)
def test_reads_fgvc_from_either_layout(folder: str, images: str, splits: str, tmp_path: Path, lists: Lists) -> None:
    write_lists(tmp_path / folder, lists, tmp_path / images)
    task = fgvc.read("cub200", tmp_path / splits, tmp_path)
    assert (task.suite, task.style, task.final, task.classes) == ("fgvc", "fgvc", "train", 3)
    assert {part: len(of) for part, of in task.parts.items()} == COUNTS
    assert task.parts["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert task.parts["val"].labels.tolist() == [1, 2, 2]
    assert task.parts["test"].labels.tolist() == [0, 2, 1, 1]
    assert task.parts["test"].labels.dtype == np.int64
    assert task.notes == ("val has 2 of 3 classes, numbered as in training",)
    at = tmp_path / images / "test" / "2.jpg"
    assert np.array_equal(np.asarray(task.parts["test"].image(2)), np.asarray(Image.open(at)))


def test_shifts_labels_as_vpt_does_when_asked(tmp_path: Path, lists: Lists) -> None:
    write_lists(tmp_path / "cub200", lists, tmp_path / "cub200" / "images")
    task = fgvc.read("cub200", tmp_path, tmp_path, shifted_labels=True)
    assert task.parts["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert task.parts["val"].labels.tolist() == [0, 1, 1]
    assert task.notes == ("val has 2 of 3 classes, numbered by its own ids, as in VPT's code",)


def test_an_image_is_sought_where_the_first_one_lies(tmp_path: Path, lists: Lists) -> None:
    write_lists(tmp_path / "cub", lists, tmp_path / "CUB_200_2011" / "images")
    (tmp_path / "cub" / "images").mkdir()
    assert fgvc.read("cub200", tmp_path, tmp_path).parts["val"].image(0).size == (36, 32)


def put(part: str, row: int, path: str, found: Any) -> Callable[[Lists], None]:
    """Replaces a row."""

    def change(lists: Lists) -> None:
        rows = list(lists[part].items())
        rows[row - 1] = (path, found)
        lists[part] = dict(rows)

    return change


BAD_ROWS = {
    "overlap": (put("test", 2, "train/3.jpg", "007"), "test.json, row 2: train/3.jpg is also in {}/train.json, row 4"),
    "overlap_respelt": (put("val", 2, "./train//3.jpg", "007"), "val.json, row 2: ./train//3.jpg is also in {}/train"),
    "twice": (put("test", 4, "test/./0.jpg", "007"), "test.json, row 4: 'test/./0.jpg' is in row 1 too"),
    "parent": (put("val", 1, "a/../../b.jpg", "007"), "val.json, row 1: 'a/../../b.jpg' leaves the folder of images"),
    "absolute": (put("val", 3, "/b.jpg", "007"), "val.json, row 3: '/b.jpg' leaves the folder of images"),
    "drive": (put("val", 3, "C:/b.jpg", "007"), "val.json, row 3: 'C:/b.jpg' leaves the folder of images"),
    "no_path": (put("train", 5, "", "007"), "train.json, row 5: '' is no path of an image"),
    "backslash": (put("train", 5, "a\\b.jpg", "007"), "train.json, row 5: 'a\\\\b.jpg' is no path of an image"),
    "two_lines": (put("train", 5, "a\nb.jpg", "007"), "train.json, row 5: 'a\\nb.jpg' is no path of an image"),
    "unknown_id": (put("test", 3, "x.jpg", "008"), "test.json, row 3: x.jpg: class id '008' is not in train.json"),
    "other_type": (put("val", 2, "x.jpg", 21), "val.json, row 2: 'x.jpg': class id 21, but row 1 has '021'"),
    "no_id": (put("val", 2, "x.jpg", None), "val.json, row 2: 'x.jpg': 'None' is no class id"),
    "a_list": (put("val", 2, "x.jpg", ["021"]), "val.json, row 2: 'x.jpg': \"['021']\" is no class id"),
    "truth": (put("val", 2, "x.jpg", True), "val.json, row 2: 'x.jpg': 'True' is no class id"),
    "short": (lambda lists: lists["train"].popitem(), "train.json: ends at row 5; 5 images, published are 6"),
    "long": (lambda lists: lists["val"].update(a="007"), "val.json: goes on after row 3; 4 images, published are 3"),
    "classes": (
        lambda lists: lists["train"].update(dict.fromkeys(lists["train"], "007")),
        "train.json: 1 class ids in 6 rows, expected 3",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_of_fgvc_is_named(case: str, tmp_path: Path, lists: Lists) -> None:
    change, words = BAD_ROWS[case]
    change(lists)
    write_lists(tmp_path, lists)
    (tmp_path / "images").mkdir()
    said = refused(lambda: fgvc.read("cub200", tmp_path, tmp_path))
    assert said.startswith(f"{tmp_path}/{words.format(tmp_path)}")


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"a.jpg": "1",\n "b.jpg" "2"}', ", line 2: not JSON (Expecting ':' delimiter)"),
        (b'{"a.jpg": "1", "b.jpg": "1", "a.jpg": "2"}', ", row 3: 'a.jpg' is in row 1 too"),
        (b'["a.jpg"]', ": expected an object of image paths and class ids, found \"['a.jpg']\""),
        (b"[" * 100_000, ": not a list of images (maximum recursion depth exceeded"),
        (b'{"a.jpg": ' + b"9" * 9_999 + b"}", ": not a list of images (Exceeds the limit"),
        (b'{"a.jpg": "\xff"}', ", line 1: not UTF-8 (byte 0xff)"),
        (b"", ", line 1: not JSON (Expecting value)"),
        (b"{}", ": ends at row 0; 0 images, published are 6"),
    ],
)
def test_a_bad_list_of_fgvc_is_named(content: bytes, words: str, tmp_path: Path, lists: Lists) -> None:
    write_lists(tmp_path, lists)
    (tmp_path / "train.json").write_bytes(content)
    assert refused(lambda: fgvc.read("cub200", tmp_path, tmp_path)).startswith(f"{tmp_path / 'train.json'}{words}")


def test_what_is_missing_of_fgvc_is_named_with_its_source(tmp_path: Path, lists: Lists) -> None:
    said = refused(lambda: fgvc.read("cub200", tmp_path, tmp_path))
    assert said.startswith(f"{tmp_path}: no train.json, val.json and test.json here or in cub200 or cub")
    write_lists(tmp_path, lists)
    said = refused(lambda: fgvc.read("cub200", tmp_path, tmp_path))
    assert said.startswith(f"{tmp_path}: no folder cub200/images with the images of CUB-200-2011; to be had: https://")
    (tmp_path / "val.json").unlink()
    said = refused(lambda: fgvc.read("cub200", tmp_path, tmp_path))
    assert said.startswith(f"{tmp_path / 'val.json'}: cannot be read (No such file or directory); VPT's splits")
    assert refused(lambda: fgvc.read("cub", tmp_path, tmp_path)).startswith("no FGVC set 'cub'; there are cub200, ")


def test_a_list_of_another_size_is_not_read(tmp_path: Path, lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fgvc, "MOST", 10)
    write_lists(tmp_path, lists)
    assert "train.json: has " in refused(lambda: fgvc.read("cub200", tmp_path, tmp_path))


def test_an_image_that_is_not_there_is_named_with_its_row(tmp_path: Path, lists: Lists) -> None:
    write_lists(tmp_path, lists, tmp_path / "images")
    (tmp_path / "images" / "test" / "1.jpg").unlink()
    task = fgvc.read("cub200", tmp_path, tmp_path)
    said = refused(lambda: task.parts["test"].image(1))
    assert said.startswith(f"{tmp_path}/test.json, row 2: {tmp_path}/images/test/1.jpg: ")


@needs_splits
@pytest.mark.parametrize("name", fgvc.SETS)
def test_the_splits_of_vpt_are_the_published(name: str, tmp_path: Path) -> None:
    splits, the = splits_folder(), fgvc.SETS[name]
    assert splits is not None
    (tmp_path / the.images).mkdir(exist_ok=True)
    task = fgvc.read(name, splits, tmp_path)
    assert {part: len(of) for part, of in task.parts.items()} == the.counts
    for part in task.parts.values():
        assert part.labels.min() >= 0 and part.labels.max() == the.classes - 1


@needs_splits
def test_nabirds_is_numbered_as_in_training_unless_shifted(tmp_path: Path) -> None:
    splits = splits_folder()
    assert splits is not None
    (tmp_path / "images").mkdir()
    right = fgvc.read("nabirds", splits, tmp_path).parts
    shifted = fgvc.read("nabirds", splits, tmp_path, shifted_labels=True).parts
    assert [len(set(right[part].labels.tolist())) for part in fgvc.PARTS] == [555, 553, 555]
    assert sorted(set(shifted["val"].labels.tolist())) == list(range(553))
    assert np.array_equal(right["test"].labels, shifted["test"].labels)
    off = right["val"].labels - shifted["val"].labels
    assert set(off.tolist()) == {0, 1, 2}
    # the folder is the class id: labels have to agree with it across parts
    both = ((right[part].paths, right[part].labels) for part in ("train", "val"))
    train, val = ({path.split("/")[0]: y for path, y in zip(paths, ys, strict=True)} for paths, ys in both)
    assert all(train[folder] == label for folder, label in val.items())


# --- VTAB-1K ---


@pytest.fixture
def small_vtab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vtab, "TRAINING", dict(train=4, val=2, trainval=6))
    monkeypatch.setitem(vtab.TASKS, "cifar", dataclasses.replace(vtab.TASKS["cifar"], classes=2, test=3))


@pytest.mark.usefixtures("small_vtab")
def test_reads_vtab(tmp_path: Path) -> None:
    write_vtab(tmp_path / "cifar")
    (tmp_path / "cifar" / "val200.txt").write_bytes(b"\xef\xbb\xbfimages/b/0.png\t1\r\n\r\na b/1.png 0\r\n")
    task = vtab.read("cifar", tmp_path)
    assert (task.suite, task.style, task.final, task.classes) == ("vtab", "vtab", "trainval", 2)
    assert {part: len(of) for part, of in task.parts.items()} == dict(train=4, val=2, trainval=6, test=3)
    assert task.parts["val"].labels.tolist() == [1, 0]
    assert task.parts["val"].paths == ["images/b/0.png", "a b/1.png"]
    assert task.parts["val"].rows == [1, 3]
    assert task.notes == ()
    assert task.parts["trainval"].image(5).size == (16, 12)
    (tmp_path / "cifar" / "val200.txt").write_text("d 0\ne 0\n")
    assert vtab.read("cifar", tmp_path).notes == (
        "train800val200.txt has other labels than train800.txt and val200.txt together",
    )


@pytest.mark.usefixtures("small_vtab")
@pytest.mark.parametrize(
    "file, row, line, words",
    [
        ("train800.txt", 2, "images/a/1.png", "expected a path and a label, found 'images/a/1.png'"),
        ("train800.txt", 2, "images/a/1.png x", "expected a path and a label, found 'images/a/1.png x'"),
        ("train800.txt", 2, "images/a/1.png 1.0", "expected a path and a label"),
        ("train800.txt", 2, "a.png -1", "expected a path and a label, found 'a.png -1'"),
        ("train800.txt", 2, "7", "expected a path and a label, found '7'"),
        ("val200.txt", 2, "a.png 2", "a.png: label 2, expected 0 to 1"),
        ("val200.txt", 2, "a.png " + "9" * 9_999, "a.png: label 99999999999999999999, expected 0 to 1"),
        ("test.txt", 3, "images/c/0.png 1", "'images/c/0.png' is in row 1 too"),
        ("test.txt", 1, "../a.png 1", "'../a.png' leaves the folder of images"),
        ("test.txt", 1, "/a.png 1", "'/a.png' leaves the folder of images"),
        ("test.txt", 1, "images/a/2.png 1", "images/a/2.png is also in {}/train800.txt, row 3"),
        ("test.txt", 1, "images/ab/2.png 1", "images/ab/2.png is also in {}/train800val200.txt, row 3"),
        ("val200.txt", 1, "images/a/2.png 1", "images/a/2.png is also in {}/train800.txt, row 3"),
    ],
)
def test_a_bad_row_of_vtab_is_named(file: str, row: int, line: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    write_vtab(folder, images=False)
    lines = (folder / file).read_text().splitlines()
    lines[row - 1] = line
    (folder / file).write_text("\n".join(lines))
    said = refused(lambda: vtab.read("cifar", tmp_path))
    assert said.startswith(f"{folder / file}, row {row}: {words.format(folder)}")


@pytest.mark.usefixtures("small_vtab")
def test_what_is_missing_of_vtab_is_named(tmp_path: Path) -> None:
    said = refused(lambda: vtab.read("cifar", tmp_path))
    assert said.startswith(f"{tmp_path / 'cifar'}: no such folder; expected one with train800.txt, val200.txt")
    write_vtab(tmp_path / "cifar", images=False)
    (tmp_path / "cifar" / "test.txt").write_text("a.png 0\n")
    said = refused(lambda: vtab.read("cifar", tmp_path))
    assert said == f"{tmp_path / 'cifar' / 'test.txt'}: ends at row 1; 1 images, published are 3"
    (tmp_path / "cifar" / "test.txt").unlink()
    said = refused(lambda: vtab.read("cifar", tmp_path))
    assert said.startswith(f"{tmp_path / 'cifar' / 'test.txt'}: cannot be read (No such file or directory); vtab")
    assert refused(lambda: vtab.read("cifar100", tmp_path)).startswith("no VTAB-1K task 'cifar100'; there are cifar, ")


def test_the_tasks_of_vtab_are_those_of_the_paper() -> None:
    tasks = vtab.TASKS.values()
    assert [sum(task.group == group for task in tasks) for group in vtab.GROUPS] == [7, 4, 8]
    assert [task.classes for task in tasks] == [
        100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9,
    ]  # fmt: skip
    assert [task.test for task in tasks] == [
        10_000, 6_084, 1_880, 6_149, 3_669, 26_032, 21_750, 32_768, 5_400, 6_300, 42_670, 15_000, 15_000, 22_735, 711,
        73_728, 73_728, 12_150, 12_150,
    ]  # fmt: skip
    assert all(task.counts == dict(train=800, val=200, trainval=1_000, test=task.test) for task in tasks)
