"""The committed studies: each report is what its runs say, to the byte, and the documents show its tables."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the runs need transformers")
from bench.paper import nlg
from bench.paper.language import backbones, report
from bench.paper.language.page import page_of
from bench.paper.sweeps.ledger import Ledger
from tests.support import ROOT

PAPER = ROOT / "bench" / "paper"
STUDIES = ("smollm2",)  # by name: whoever ran the demo has other results beside them


def written(name: str) -> tuple[Path, dict]:
    out = PAPER / "results" / f"nlg-{name}"
    return out, json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_what_its_runs_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = written(name)
    [weights] = {cell["weights"] for cell in results["cells"]} - {None}
    monkeypatch.setattr(backbones, "fingerprint", lambda model: weights)  # of weights that need not be here
    grid = nlg.grid_of(nlg.parse(["report", "--suite", name]))
    assert json.loads(json.dumps(report.collect(grid, Ledger(out)))) == results
    assert out.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(results)
    assert out.with_suffix(".html").read_text(encoding="utf-8") == page_of(results)


def test_the_readme_shows_three_methods() -> None:
    """Their columns of both tasks' tables, without the paper's numbers, and what it says of them."""
    _, results = written("smollm2")
    e2e, webnlg, differences, *_ = report.tables(results)
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    for method in ("Deep-share", "No-share", "Simple-share"):
        cells = []
        for table, columns in ((e2e, ("BLEU", report.DEV)), (webnlg, ("BLEU unseen", report.DEV))):
            [row] = [row for row in table.rows if row[0].text == method]
            cells += [row[list(table.head).index(column)].text.rpartition(" / ")[2] for column in columns]
        assert f"| {' | '.join([method, *cells])} |" in shown
    rows = [[entry.text for entry in row] for row in differences.rows]
    of_two = {
        (task, score): float(errors) for task, a, b, score, _, errors in rows if (a, b) == ("Deep-share", "No-share")
    }
    losses = [-of_two[task, report.DEV] for task in ("e2e", "webnlg")]
    assert f"Deep-share's losses are below No-share's by {losses[0]:.1f} and {losses[1]:.1f} standard errors" in shown
    assert all(abs(errors) < 2 for (_, score), errors in of_two.items() if "BLEU" in score)
    assert "BLEU tells none of the two apart" in shown


@pytest.mark.parametrize("name", STUDIES)
def test_the_documents_show_the_tables(name: str) -> None:
    """Of the methods that have a final run by now."""
    _, results = written(name)
    results["cells"] = [cell for cell in results["cells"] if cell["dev"]]
    assert results["cells"]
    shown = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    for table in report.tables(results):
        for row in table.rows:
            assert f"| {' | '.join(entry.text for entry in row)} |" in shown
        for sentence in table.notes:
            assert sentence in shown
