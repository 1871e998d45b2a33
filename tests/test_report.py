"""report.py prints every committed study; and says what is no study."""

import json
from pathlib import Path

import pytest

import report

RESULTS = Path(report.RESULTS)


def test_the_committed_studies_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.stem for path in sorted(RESULTS.glob("*.md"))]
    assert "vision-small" in names
    assert report.main([]) == 0
    shown = capsys.readouterr().out
    for name in report.studies(RESULTS):
        assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") in shown
    assert report.main(["vision-small"]) == 0
    assert capsys.readouterr().out == (RESULTS / "vision-small.md").read_text(encoding="utf-8")


def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vision-broken.json").write_text("{")
    (tmp_path / "nlg-other.json").write_text(json.dumps({"cells": []}))
    for words, said in (
        (["vision-large"], "no study 'vision-large'; there are"),
        (["--results", str(tmp_path / "none")], "no results of a study"),
        (["--results", str(tmp_path), "vision-broken"], "vision-broken.json: not readable as JSON"),
        (["--results", str(tmp_path), "nlg-other"], "nlg-other.json: not the results of a study"),
    ):
        assert report.main(words) == 1
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
