"""report.py prints every committed study; and says what is no study."""

import json
import subprocess
from pathlib import Path

import pytest

from bench.paper import report

RESULTS = Path(report.RESULTS)


def test_the_committed_studies_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "vision-small" in report.studies(RESULTS)
    tracked = subprocess.run(
        ("git", "-C", str(RESULTS), "ls-files", "*.json"), capture_output=True, text=True, check=False
    ).stdout.split()
    names = [name for name in report.studies(RESULTS) if f"{name}.json" in tracked] or ["vision-small"]
    assert report.main(names) == 0
    shown = capsys.readouterr().out
    for name in names:
        assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") in shown
    assert report.main(["vision-small"]) == 0
    assert capsys.readouterr().out == (RESULTS / "vision-small.md").read_text(encoding="utf-8")


def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vision-broken.json").write_text("{")
    empty = {"name": "other", "tasks": [], "settings": {}, "cells": [], "provenance": {}}
    (tmp_path / "nlg-other.json").write_text(json.dumps(empty))
    for words, said in (
        (["vision-large"], "no study 'vision-large'; there are"),
        (["--results", str(tmp_path / "none")], "no results of a study"),
        (["--results", str(tmp_path), "vision-broken"], "vision-broken.json: not readable as JSON"),
        (["--results", str(tmp_path), "nlg-other"], "nlg-other.json: not the results of a study"),
    ):
        assert report.main(words) == 1
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
