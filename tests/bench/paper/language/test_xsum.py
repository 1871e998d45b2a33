"""XSUM in both of its forms: documents as they are, what is left out, and what is refused with file and line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.paper.language import xsum
from bench.paper.language.data import Prompt
from bench.paper.runs import Refusal

BOM = b"\xef\xbb\xbf"


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(Refusal) as refusal:
        read()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


ARTICLES = {"train": 3, "dev": 2, "test": 1}


def xsum_lines(folder: Path, end: str = "\n", start: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    for split, stem in xsum.STEMS.items():
        for column, words in (("source", ' An article,\u2028 "quoted" {}  '), ("target", "Summary of {} .")):
            text = "".join(words.format(f"{split} {at}") + end for at in range(ARTICLES[split]))
            (folder / f"{stem}.{column}").write_bytes(start + text.encode())
    return folder


def xsum_rows(folder: Path, name: str = "{}.jsonl", start: bytes = b"") -> Path:
    for split, stem in (("train", "train"), ("dev", "validation"), ("test", "test")):
        rows = [{"id": at, "summary": f"Summary {at}.", "document": f"One.\nTwo {at}"} for at in range(ARTICLES[split])]
        path = folder / name.format(stem)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(start + b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return folder


def test_xsum_is_read_line_by_line_as_it_is(tmp_path: Path) -> None:
    task = xsum.load(str(xsum_lines(tmp_path / "xsum").parent))
    assert task.where == "XSUM: 3 train, 2 dev, 1 test documents"
    assert task.train.pairs()[1] == (' An article,\u2028 "quoted" train 1  ', "Summary of train 1 .")
    assert task.dev.records[1].row == "val.source, line 2"
    assert task.test.prompts() == [Prompt(' An article,\u2028 "quoted" test 0  ', ("Summary of test 0 .",))]


@pytest.mark.parametrize("end, start", [("\r\n", b""), ("\n", BOM), ("\r\n", BOM)])
def test_xsum_lines_are_the_same_with_crlf_and_a_byte_order_mark(end: str, start: bytes, tmp_path: Path) -> None:
    plain, other = xsum_lines(tmp_path / "a"), xsum_lines(tmp_path / "b", end, start)
    assert xsum.load(str(other)).train == xsum.load(str(plain)).train
    assert xsum.load(str(other)).sha256 != xsum.load(str(plain)).sha256


def test_xsum_takes_a_last_line_without_an_end(tmp_path: Path) -> None:
    folder = xsum_lines(tmp_path)
    plain = xsum.read(folder, "train")
    for name in ("train.source", "train.target"):
        (folder / name).write_bytes((folder / name).read_bytes().removesuffix(b"\n"))
    assert xsum.read(folder, "train") == plain


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.json", "data/{}.jsonl", "default/{}-00000-of-00001.json"])
def test_xsum_rows_have_the_columns_document_and_summary(name: str, tmp_path: Path) -> None:
    task = xsum.load(str(xsum_rows(tmp_path, name)))
    assert task.train.pairs() == [(f"One. Two {at}", f"Summary {at}.") for at in range(3)]
    assert task.dev.records[1].row == f"{Path(name).name.format('validation')}, line 2"
    assert (len(task.dev.records), len(task.test.records), task.notes) == (2, 1, [])


def test_xsum_rows_are_the_same_with_a_byte_order_mark(tmp_path: Path) -> None:
    plain, other = xsum_rows(tmp_path / "a"), xsum_rows(tmp_path / "b", start=BOM)
    assert xsum.read(other, "train") == xsum.read(plain, "train")


def test_xsum_rows_without_a_document_are_left_out_and_told(tmp_path: Path) -> None:
    folder = xsum_rows(tmp_path)
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"document": "", "summary": "S."}\n{"document": "\\n", "summary": "S."}\n')
    task = xsum.load(str(folder))
    assert (len(task.train.records), task.train.left_out) == (3, 2)
    assert xsum.count("train", task.train) == {"rows": 5}
    assert task.notes == ["rows of train that have no document and are left out: 2"]


def test_xsum_decodes_equal_documents_each(tmp_path: Path) -> None:
    (tmp_path / "test.source").write_text("Same.\nSame.\n")
    (tmp_path / "test.target").write_text("One.\nTwo.\n")
    assert [prompt.references for prompt in xsum.read(tmp_path, "test").prompts()] == [("One.",), ("Two.",)]


@pytest.mark.parametrize(
    "source, target, words",
    [
        (b"a\nb\n", b"a\n", "val.target: has 1 lines, val.source has 2; expected as many"),
        (b"a\n \nc\n", b"a\nb\nc\n", "val.source, line 2: the line is empty"),
        (b"a\nb\n", b"a\n\n", "val.target, line 2: the line is empty"),
        (b"a\nb\xff\n", b"a\nb\n", "val.source, line 2: not UTF-8 (byte 0xff)"),
        (b"a\nb\n", b"a\nb\0\n", "val.target, line 2: a NUL character"),
        (b"a\rb\n", b"a\n", "val.source, line 1: a carriage return inside it"),
        (b"", b"", "val.source: no documents"),
    ],
)
def test_xsum_names_the_line_that_it_cannot_read(source: bytes, target: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "val.source").write_bytes(source)
    (tmp_path / "val.target").write_bytes(target)
    assert refused(lambda: xsum.read(tmp_path, "dev")).startswith(f"{tmp_path}/{words}")


def test_xsum_names_the_missing_half(tmp_path: Path) -> None:
    (tmp_path / "val.source").write_text("a\n")
    assert f"{tmp_path}/val.target: cannot be read (No such file or directory); XSUM: https" in refused(
        lambda: xsum.read(tmp_path, "dev")
    )
    assert f"{tmp_path}/test.source: cannot be read" in refused(lambda: xsum.read(tmp_path, "test"))


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"document": "a"}', "the row has no summary"),
        ('{"summary": "a"}', "the row has no document"),
        ('{"document": null, "summary": "a"}', "the document of the row is not text"),
        ('{"document": "a", "summary": "\\n"}', "the summary of the row is empty"),
        ('{"document": "a\\u0000", "summary": "a"}', "the document of the row holds a NUL character"),
        ('{"document": "a", "summary": "\\udfff"}', "the summary of the row holds half of a surrogate pair"),
        ("[", "not JSON (Expecting value: line 1 column 2 (char 1)); expected an object a line"),
        ("", "not JSON (Expecting value"),
        ("[" * 200_000, "not JSON (maximum recursion depth"),
        ("[]", "the row is not a JSON object"),
    ],
)
def test_xsum_names_the_row_that_it_cannot_read(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"document": "a", "summary": "b"}\n' + line + "\n")
    assert refused(lambda: xsum.read(tmp_path, "test")).startswith(f"{path}, line 2: {words}")


def test_xsum_says_what_it_looked_for(tmp_path: Path) -> None:
    assert f"{tmp_path}: has no file of train; expected train.source" in refused(lambda: xsum.load(str(tmp_path)))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").touch()
    assert f"{tmp_path}: holds Arrow files; make JSON lines" in refused(lambda: xsum.load(str(tmp_path)))


def test_xsum_wants_all_files_of_a_split(tmp_path: Path) -> None:
    for number in range(3):
        row = json.dumps({"document": f"D{number}", "summary": "S"})
        (tmp_path / f"train-0000{number}-of-00003.jsonl").write_text(row + "\n")
    assert [record.source for record in xsum.read(tmp_path, "train").records] == ["D0", "D1", "D2"]
    (tmp_path / "train-00001-of-00003.jsonl").unlink()
    assert f"{tmp_path}: of 3 files train-*.jsonl 2 are there; XSUM" in refused(lambda: xsum.read(tmp_path, "train"))
    (tmp_path / "train-00002-of-00003.jsonl").unlink()
    assert "of 3 files train-*.jsonl 1 are there" in refused(lambda: xsum.read(tmp_path, "train"))


def test_xsum_reads_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install pyarrow")
    path = tmp_path / "test-00000-of-00001.parquet"
    rows = {"document": ["One.\nTwo", ""], "summary": ["S.", "T."], "id": ["1", "2"]}
    parquet.write_table(pyarrow.table(rows), path)
    part = xsum.read(tmp_path, "test")
    assert (part.pairs(), part.left_out) == ([("One. Two", "S.")], 1)
    assert part.records[0].row == "test-00000-of-00001.parquet, row 1"
    parquet.write_table(pyarrow.table({**rows, "summary": ["S.", None]}), path)
    assert refused(lambda: xsum.read(tmp_path, "test")) == f"{path}, row 2: the summary of the row is not text"
    parquet.write_table(pyarrow.table({"document": ["a"]}), path)
    assert refused(lambda: xsum.read(tmp_path, "test")) == f"{path}: has no column summary"
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(lambda: xsum.read(tmp_path, "test")).startswith(f"{path}: not readable as parquet (")


def test_xsum_says_what_parquet_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (path := tmp_path / "test.parquet").touch()
    assert refused(lambda: xsum.read(tmp_path, "test")).startswith(f"{path}: needs pyarrow (pip install pyarrow)")
