"""The check of the vision data: what it counts, what it finds wrong, and in which words."""

import dataclasses
from pathlib import Path

import pytest

from bench.paper.visual import check, vtab
from bench.paper.visual.testing_data import Lists, refused, small_cub, write_lists, write_vtab


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Lists:
    return small_cub(monkeypatch)


@pytest.fixture
def small_vtab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vtab, "TRAINING", dict(train=4, val=2, trainval=6))
    monkeypatch.setitem(vtab.TASKS, "cifar", dataclasses.replace(vtab.TASKS["cifar"], classes=2, test=3))


def test_check_of_whole_sets(tmp_path: Path, lists: Lists, capsys: pytest.CaptureFixture[str]) -> None:
    write_lists(tmp_path / "cub200", lists, tmp_path / "cub200" / "images")
    rows = check.check("fgvc", check.Folders(tmp_path), ["cub200"], deep=True)
    assert check.well(rows)
    assert rows[0].parts["val"] == check.Count(3, 3, 2, 0, 0)
    assert rows[0].parts["test"] == check.Count(4, 4, 3, 0, 0)
    table = check.table(rows)
    assert "CUB-200-2011  test        4         4        3         3        0        0" in table
    assert table.endswith("CUB-200-2011: val has 2 of 3 classes, numbered as in training\n1 of 1 sets are whole\n")
    assert "CUB-200-2011, test.json: 4 of 4 decoded\n" in capsys.readouterr().err


def test_check_of_fgvc_says_what_is_wrong(tmp_path: Path, lists: Lists, capsys: pytest.CaptureFixture[str]) -> None:
    lists["test"]["train/3.jpg"] = "007"
    images = tmp_path / "images"
    write_lists(tmp_path / "lists", lists, images)
    (images / "train" / "2.jpg").unlink()
    (images / "train" / "5.jpg").unlink()
    cut_short(images / "val" / "1.jpg")
    (tmp_path / "CUB_200_2011.tgz").write_bytes(b"cut short")
    folders = check.Folders(tmp_path, tmp_path / "lists")
    rows = check.check("fgvc", folders, ["cub200"])
    assert not check.well(rows)
    assert rows[0].parts["train"] == check.Count(6, 6, 3, 2)
    assert rows[0].parts["val"] == check.Count(3, 3, 2, 0)  # not decoded
    assert rows[0].parts["test"] == check.Count(4, 5, 3, 0)
    lines = check.table(rows).splitlines()
    missing = f"lists/train.json, row 3: {images}/train/2.jpg: no such file (2 of 6 are missing)"
    assert f"CUB-200-2011: {tmp_path}/{missing}" in lines
    assert f"CUB-200-2011: {tmp_path}/lists/test.json: goes on after row 4; 5 images, published are 4" in lines
    assert any("CUB_200_2011.tgz: 9 bytes, published are 1,150,585,339: cut short" in line for line in lines)
    assert any("images: https://" in line and "licence" in line for line in lines)
    assert lines[-1] == "0 of 1 sets are whole, 1 are not"
    assert capsys.readouterr().err == ""
    deep = check.check("fgvc", folders, ["cub200"], deep=True)[0]
    assert deep.parts["val"] == check.Count(3, 3, 2, 0, 1)
    (damaged,) = [line for line in deep.problems if line.endswith("(1 of 3 are damaged)")]
    assert damaged.startswith(f"{tmp_path}/lists/val.json, row 2: {images}/val/1.jpg: not a readable image (")


@pytest.mark.usefixtures("lists")
def test_check_of_nothing_says_where_all_is(tmp_path: Path) -> None:
    for suite, names in (("fgvc", ()), ("vtab", ())):
        rows = check.check(suite, check.Folders(tmp_path / "nowhere"), names)
        assert [row.name for row in rows] == list(check.SUITES[suite])
        assert not check.well(rows)
        for row in rows:
            assert row.problems and row.where
            assert all(count.found is None for count in row.parts.values())
            assert not any("\n" in line for line in row.problems)
    assert refused(lambda: check.check("imagenet", check.Folders(tmp_path))).startswith("no suite 'imagenet'")
    assert refused(lambda: check.check("vtab", check.Folders(tmp_path), ["cub200"])).startswith("no VTAB-1K task")


@pytest.mark.usefixtures("small_vtab")
def test_check_of_vtab(tmp_path: Path) -> None:
    write_vtab(tmp_path / "cifar")
    assert check.well(check.check("vtab", check.Folders(tmp_path), ["cifar"], deep=True))
    (tmp_path / "cifar" / "val200.txt").write_text("images/b/0.png 0\nimages/b/1.png 2\n")
    (tmp_path / "cifar" / "images" / "c" / "2.png").unlink()
    (row,) = check.check("vtab", check.Folders(tmp_path), ["cifar"])
    assert row.parts["val"] == check.Count(2)
    assert row.parts["test"] == check.Count(3, 3, 2, 1)
    assert list(row.problems) == [
        f"{tmp_path}/cifar/val200.txt, row 2: images/b/1.png: label 2, expected 0 to 1",
        f"{tmp_path}/cifar/test.txt, row 3: {tmp_path}/cifar/images/c/2.png: no such file (1 of 3 are missing)",
    ]


def test_archives_are_told_by_their_size(tmp_path: Path) -> None:
    for name, size in {"vtab-1k.zip": 4_661_000_000, "images.tar": 5}.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    assert check.archives("vtab", [tmp_path]) == [f"{tmp_path}/vtab-1k.zip: 4,661,000,000 bytes, as published"]
    assert "cut short" in check.archives("dogs", [tmp_path])[0]
    assert check.archives("cars", [tmp_path]) == check.archives("flowers", [tmp_path]) == []
