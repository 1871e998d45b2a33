"""The committed studies: each report is what its runs say, to the byte, and the documents show its tables."""

import json

import pytest

from bench.paper import vision
from bench.paper.sweeps.ledger import Ledger
from bench.paper.visual import report
from bench.paper.visual.page import page_of as page
from tests.support import ROOT

PAPER = ROOT / "bench" / "paper"
STUDIES = ("bf16", "small")  # by name: whoever ran the demo has other results beside them


@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_what_its_runs_say(name: str) -> None:
    out = PAPER / "results" / f"vision-{name}"
    grid = vision.grid_of(vision.parse(["report", "--grid", str(PAPER / "grids" / f"{name}.toml")]))
    made = report.collect(grid, Ledger(out))
    written = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(made)) == written
    assert out.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(written)
    assert out.with_suffix(".html").read_text(encoding="utf-8") == page(written)


@pytest.mark.parametrize("name", STUDIES)
def test_the_documents_show_the_tables(name: str) -> None:
    written = json.loads((PAPER / "results" / f"vision-{name}.json").read_text(encoding="utf-8"))
    shown = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
    for table in report.tables(written):
        for row in table.rows:
            assert f"| {' | '.join(entry.text for entry in row)} |" in shown
        for sentence in table.notes:
            assert sentence in shown
