"""bench/paper/score.py: the table and the record of each task, and what is refused, with its row."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.paper import meteor, score
from tests.data_folder import data_path
from tests.support import ROOT

SCRIPT = ROOT / "bench" / "paper" / "score.py"
REFERENCES, OUTPUTS = b"a b\na c\n\nd e\n", b"a b\nd e\n"


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds to start, and is compared with the official one in the tests of the tasks' metrics."""
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def run(task: str, outputs: Path, references: Path, *more: str) -> int:
    return score.main([task, "--outputs", str(outputs), "--references", str(references), *more])


def cells(printed: str) -> list[list[str]]:
    """Words of the table's lines, notes left out."""
    return [re.split("  (?:own code|sacrebleu|pycocoevalcap)", line)[0].split() for line in printed.splitlines()]


# --- tables


def test_e2e_example_by_its_folder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    folder = data_path("metrics", "e2e_example")
    assert run("e2e", folder / "baseline-output.txt", folder) == 0
    printed = capsys.readouterr().out
    assert cells(printed)[:3] == [["all"], ["BLEU", "0.7203"], ["NIST", "7.7889"]]
    assert cells(printed)[4:] == [["ROUGE_L", "0.7910"], ["CIDEr", "2.3039"]]
    assert cells(printed)[3][:3] == ["METEOR", "needs", "Java"]


def test_values_end_where_their_heads_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("e2e", write(tmp_path, "outputs", OUTPUTS), write(tmp_path, "refs", REFERENCES))
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("all")
    assert all(row[len(head) - 1] != " " and row[len(head) : len(head) + 2] == "  " for row in rows)


def webnlg_folder(folder: Path) -> Path:
    for name, lines in {"old0": "a b c d e\n", "old1": "\n", "old2": "\n", "new0": "f g h i\nj k\n"}.items():
        write(folder, f"gold-{name[:3]}-cat-reference{name[3:]}.lex", lines)
    for i in (1, 2):
        write(folder, f"gold-old-cat-reference{i}.lex", "x y\n")
        write(folder, f"gold-new-cat-reference{i}.lex", "x y\n\n")
    return folder


def test_webnlg_prints_seen_unseen_and_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = write(tmp_path, "outputs", "\ufeffA b c d é\r\nf g h i\r\n\r\n")  # a mark, CRLF, an empty text
    out = tmp_path / "deep" / "scores.json"
    assert run("webnlg", outputs, webnlg_folder(tmp_path / "references"), "--out", str(out)) == 0
    table = cells(capsys.readouterr().out)
    assert table[0] == ["seen", "unseen", "all"]
    assert table[1] == ["BLEU", "100.00", "100.00", "100.00"]  # of lengths 5 and 4, and 0: nearest to a blank one
    assert table[2][:7] == ["METEOR", *["needs", "Java"] * 3]
    assert table[3] == ["TER", "0.0000", "0.4286", "0.2609"]  # 2 edits; (5 + 2 + 2) / 3, (4 + 2 + 2) / 3 and 2 words


def test_the_record_holds_values_notes_and_versions_and_no_folder(tmp_path: Path) -> None:
    outputs, references = write(tmp_path, "texts.txt", OUTPUTS), write(tmp_path, "refs.txt", REFERENCES)
    out = tmp_path / "scores.json"
    assert run("e2e", outputs, references, "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["task"] == "e2e"
    assert list(found["outputs"]) == ["texts.txt"] and list(found["references"]) == ["refs.txt"]
    assert found["scores"]["ROUGE_L"] == {"all": 1.0} and found["scores"]["METEOR"] == {"all": None}
    assert found["notes"]["ROUGE_L"].startswith("pycocoevalcap") and "no java on the PATH" in found["notes"]["METEOR"]
    assert set(found["versions"]) == set(score.PACKAGES)
    assert str(tmp_path) not in out.read_text()


def test_xsum_reads_the_layout_of_source_and_target_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "xsum/test.target", "a b\nc d\ne f\n")
    outputs = write(tmp_path, "outputs", "a b\nc d\n\n")
    assert run("xsum", outputs, tmp_path / "xsum", "--per-batch", "2") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["documents", "batches", "of", "2"]
    assert [row.split()[:3] for row in rows] == [[f"ROUGE-{n}", "66.6667", "50.0000"] for n in "12L"]


def test_as_a_command(tmp_path: Path) -> None:
    arguments = ["e2e", "--outputs", write(tmp_path, "o", OUTPUTS), "--references", write(tmp_path, "r", REFERENCES)]
    environment = {**os.environ, "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ROUGE_L" in done.stdout and "needs Java" in done.stdout


# --- refusals


def refused(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line that was printed instead of a table."""
    printed = capsys.readouterr()
    assert (status, printed.out) == (1, "")
    [line] = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("references", "outputs", "message"),
    [
        (REFERENCES, b"a b\n", "outputs:1: ends after 1 hypotheses; DIR/refs has 2 instances"),
        (REFERENCES, OUTPUTS + b"\n", "outputs:3: one hypothesis too many; DIR/refs has 2 instances"),
        (REFERENCES, b"a b\n\xff\xfe\n", "outputs:2: not UTF-8 (byte 0xff)"),
        (b"a b\n\n\nd e\n", OUTPUTS, "refs:3: a second blank line; instance 2 has no reference"),
        (b"a b\n\nd e\n\n\n", OUTPUTS, "refs:5: a second blank line; instance 3 has no reference"),
        (b"a b\n\nd \xff\n", OUTPUTS, "refs:3: not UTF-8 (byte 0xff)"),
        (b"\n", OUTPUTS, "refs: no text in it"),
        (b"", OUTPUTS, "refs: no text in it"),
        (REFERENCES, None, "outputs: No such file or directory"),
        (None, OUTPUTS, "refs: No such file or directory"),
    ],
)
def test_a_malformed_file_is_refused_with_its_row_and_nothing_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    references: bytes | None,
    outputs: bytes | None,
    message: str,
) -> None:
    for name, content in {"refs": references, "outputs": outputs}.items():
        if content is not None:
            write(tmp_path, name, content)
    out = tmp_path / "scores.json"
    status = run("e2e", tmp_path / "outputs", tmp_path / "refs", "--out", str(out))
    assert refused(capsys, status) == f"score.py: {tmp_path}/{message.replace('DIR', str(tmp_path))}"
    assert not out.exists()


def test_webnlg_counts_the_outputs_of_both_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = webnlg_folder(tmp_path / "references")
    line = refused(capsys, run("webnlg", write(tmp_path, "outputs", "a\nb\n"), folder))
    assert line.endswith(f"outputs:2: ends after 2 hypotheses; {folder} has 3 instances")


def test_xsum_refuses_a_blank_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = write(tmp_path, "test.target", "a\n \nb\n")
    line = refused(capsys, run("xsum", write(tmp_path, "outputs", "a\nb\nc\n"), tmp_path))
    assert line == f"score.py: {references}:2: blank, expected a text on each line"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--per-batch", "0"], "--per-batch 0: expected 1 or more documents"),
        (["--out", "scores.txt"], "--out scores.txt: expected the name of a file that ends in .json"),
    ],
)
def test_a_wrong_option_is_refused(capsys: pytest.CaptureFixture[str], more: Sequence[str], message: str) -> None:
    assert refused(capsys, run("xsum", Path("o"), Path("r"), *more)) == f"score.py: {message}"
