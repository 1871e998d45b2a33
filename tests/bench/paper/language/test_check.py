"""`check_task`: counts beside the published ones, what is missing and where it is to be had, and never a traceback."""

import json
import os
from pathlib import Path

import pytest

from bench.paper.language import e2e, webnlg, xsum
from bench.paper.language.check import check_task
from bench.paper.runs import Refusal
from tests.support import ROOT

ROWS = '"name[A], food[X], near[B]",One.\n"name[C], food[X]",Two.\n"name[D], area[Y]",Three.\n'


def e2e_folder(folder: Path, test: str = ROWS) -> Path:
    for file, rows in (("trainset.csv", ROWS), ("devset.csv", ROWS), ("testset_w_refs.csv", test)):
        (folder / file).write_text("mr,ref\n" + rows, encoding="utf-8")
    return folder


def webnlg_folder(folder: Path, categories: tuple[str, ...]) -> Path:
    for file in webnlg.FILES.values():
        entries = [
            {
                str(at): {
                    "modifiedtripleset": [{"subject": "s", "property": "p", "object": str(at % 2)}],
                    "lexicalisations": [{"lex": "A.", "comment": "good"}, {"lex": "B.", "comment": "toFix"}],
                    "category": category,
                }
            }
            for at, category in enumerate(categories, 1)
        ]
        (folder / file).write_text(json.dumps({"entries": entries}))
    return folder


def xsum_folder(folder: Path, train: int = 3, dev: int = 2, test: int = 1) -> Path:
    for stem, rows in (("train", train), ("val", dev), ("test", test)):
        for column in ("source", "target"):
            (folder / f"{stem}.{column}").write_text("Words.\n" * rows)
    return folder


def publish(monkeypatch: pytest.MonkeyPatch, module: object, published: dict[str, dict[str, int]]) -> None:
    monkeypatch.setattr(module, "PUBLISHED", published)


def test_e2e_as_published_says_so_and_how_near_test_is_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"rows": 3, "distinct sources": 3}
    publish(monkeypatch, e2e, {"train": counts, "dev": counts, "test": {"rows": 4, "distinct sources": 3}})
    test = '"name[E], food[X]",Five.\n"name[F], food[X]",Six.\n"name[G], food[Z]",Seven.\n"name[G], food[Z]",Eight.\n'
    lines, well = check_task("e2e", e2e_folder(tmp_path, test))
    assert well
    assert lines == [
        "part   count             found  published",
        "train  rows                  3          3",
        "train  distinct sources      3          3",
        "dev    rows                  3          3",
        "dev    distinct sources      3          3",
        "test   rows                  4          4",
        "test   distinct sources      3          3",
        "E2E NLG: 0 of the 3 distinct test sources occur in train; without name and near 2 are distinct, of which 1 "
        "occur in train (2 of the 3 sources)",
        "E2E NLG: all counts are as published",
    ]


def test_a_count_that_is_not_the_published_one_is_told_with_where_to_get_the_data(tmp_path: Path) -> None:
    lines, well = check_task("e2e", e2e_folder(tmp_path))
    assert not well
    assert "E2E NLG: train has 3 rows, published are 42,061" in lines
    assert "E2E NLG: test has 3 distinct sources, published are 630" in lines
    assert lines[-1] == e2e.WHERE
    assert "CC BY-SA 4.0" in e2e.WHERE


def test_a_missing_and_a_broken_file_are_told_beside_what_is_there(tmp_path: Path) -> None:
    folder = e2e_folder(tmp_path)
    (folder / "trainset.csv").unlink()
    (folder / "devset.csv").write_text("mr,ref\nnonsense,text\n")
    lines, well = check_task("e2e", folder)
    assert not well
    assert any(f"{folder}/trainset.csv: cannot be read (No such file or directory)" in line for line in lines)
    assert any(f"{folder}/devset.csv, row 1 (line 2): the record does not parse" in line for line in lines)
    assert "train  rows                  -     42,061" in lines
    assert "test   rows                  3      4,693" in lines
    assert not any("without name and near" in line for line in lines)


def test_webnlg_counts_seen_and_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = webnlg_folder(tmp_path, ("City", "Artist", "Food", "Politician", "Athlete"))
    texts = {"entries": 5, "good texts": 5}
    test = {"entries": 5, "seen entries": 2, "unseen entries": 3}
    publish(monkeypatch, webnlg, {"train": texts, "dev": texts, "test": test})
    lines, well = check_task("webnlg", folder)
    assert well
    assert [line.split() for line in lines[7:11]] == [
        ["test", "entries", "5", "5"],
        ["test", "seen", "entries", "2", "2"],
        ["test", "unseen", "entries", "3", "3"],
        ["test", "distinct", "sources", "2", "-"],
    ]
    publish(monkeypatch, webnlg, {"train": texts, "dev": texts, "test": {**test, "seen entries": 4}})
    lines, well = check_task("webnlg", folder)
    assert not well
    assert lines[-2:] == ["WebNLG 2017: test has 2 seen entries, published are 4", webnlg.WHERE]
    assert "CC BY-NC-SA 4.0" in webnlg.WHERE


def test_xsum_is_held_against_the_form_that_it_has(tmp_path: Path) -> None:
    lines, well = check_task("xsum", xsum_folder(tmp_path))
    assert not well
    assert "XSUM: train has 3 rows, published are 204,017" in lines
    (tmp_path / "train.jsonl").write_text("{}")  # the lines are looked for first
    assert check_task("xsum", tmp_path) == (lines, well)
    for stem in ("train", "val", "test"):
        (tmp_path / f"{stem}.source").unlink()
        (tmp_path / f"{stem}.jsonl").write_text('{"document": "", "summary": "S."}\n{"document": "a", "summary": "S."}')
    lines, well = check_task("xsum", tmp_path)
    assert not well
    assert "XSUM: test has 2 rows, published are 11,334" in lines
    assert "XSUM: rows of dev that have no document and are left out: 1" in lines
    assert "licence: none is stated" in lines[-1]


@pytest.mark.parametrize("form", [xsum.LINES, xsum.ROWS])
def test_xsum_lines_may_have_the_counts_of_either_form(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"train": {"rows": 3}, "dev": {"rows": 2}, "test": {"rows": 1}}
    monkeypatch.setitem(xsum.PUBLISHED, form, few)
    lines, well = check_task("xsum", xsum_folder(tmp_path))
    assert well
    assert lines[-1] == "XSUM: all counts are as published"
    lines, well = check_task("xsum", xsum_folder(tmp_path, train=4))
    assert not well


@pytest.mark.parametrize("name", ["e2e", "webnlg", "xsum"])
def test_a_folder_without_the_data_lacks_each_part(name: str, tmp_path: Path) -> None:
    lines, well = check_task(name, tmp_path)
    assert not well
    assert sum(str(tmp_path) in line for line in lines) == 3
    assert "https://" in lines[-1] and "licence" in lines[-1]
    assert [line for line in lines if lines[-1] in line] == lines[-1:]
    (missing, where), well = check_task(name, tmp_path / "nowhere")
    assert not well
    assert f"{tmp_path}/nowhere: no such folder; expected one with" in missing
    assert where == lines[-1]


def test_a_task_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no task 'dart'; there are e2e, webnlg, xsum"):
        check_task("dart", tmp_path)


def real(name: str, file: str) -> Path:
    places = [os.environ.get("PREFIXATTN_DATA"), ROOT.parent / "shared" / "data"]
    found = next((Path(place) for place in places if place and (Path(place) / name / file).exists()), None)
    if found is None:
        pytest.skip(f"no {name}/{file}: set PREFIXATTN_DATA to a folder that holds {name}/")
    return found


def test_the_published_e2e_is_whole() -> None:
    lines, well = check_task("e2e", real("e2e", "trainset.csv"))
    assert well
    assert (
        "E2E NLG: 0 of the 630 distinct test sources occur in train; without name and near 554 are distinct, of which "
        "142 occur in train (156 of the 630 sources)" in lines
    )


def test_the_published_webnlg_is_whole() -> None:
    lines, well = check_task("webnlg", real("webnlg", "train.json"))
    assert well
    assert ["train", "good", "texts", "18,025", "18,025"] in [line.split() for line in lines]
