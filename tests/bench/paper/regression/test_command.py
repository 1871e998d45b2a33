"""The command from cells to page: it resumes, its tables are of its JSON, and it refuses in words."""

import json
from pathlib import Path

import pytest

from bench.paper import theory
from bench.paper.regression import claims, experiments, names, report
from tests.support import ROOT

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
PART = ("--only", "simple-d2-L2", "splits", "--replicates", "8")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "theory"
    assert theory.main([*PART, "--out", str(folder)]) == 0
    return folder


def test_a_finished_cell_is_not_done_again(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert len(cells) == 1 + len(experiments.SUPPORT_SIZES)
    one = out / "regression" / "simple-d2-L2" / "n100.json"
    before = json.loads(one.read_text())["result"]
    one.unlink()
    assert theory.main([*PART, "--out", str(out)]) == 0
    capsys.readouterr()
    assert json.loads(one.read_text())["result"] == before  # the same seed
    assert {path for path, time in cells.items() if path.stat().st_mtime_ns != time} == {one}
    assert theory.main(["status", *PART, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "10", "0", "0", "0"]


def test_table_and_figure_are_made_of_the_json_alone(out: Path, tmp_path: Path) -> None:
    result = json.loads(out.with_name("theory.json").read_text())
    text = report.publish(result, tmp_path / "again")
    assert text == out.with_name("theory.md").read_text()
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    rows = [line for line in text.splitlines() if line.startswith("| simple, d 2, 2 atoms | ")]
    named = [line.split(" | ")[1] for line in rows]
    assert named[:3] == ["regression error", "D_2", "keys alone in their cells"]
    assert all("(log n / n)^1/2" in line and line.endswith("| agrees |") for line in rows[:3])


def test_every_run_has_a_claim_or_is_shown_without(out: Path) -> None:
    stated = {}
    for setting in experiments.settings():
        config = {"family": setting.family, "atoms": setting.atoms}
        stated[setting.family, setting.atoms] = {m for m in names.MEASURES if (c := claims.of(config, m)) and c.stated}
    assert stated["separate", 3] == {"d1_1", "d1_2"} and not stated["separate", 2]
    assert stated["linear", 3] == {"l2"} and "d3" in stated["tanh", 3] and "d2" in stated["simple", 3]


@pytest.mark.parametrize("words, expected", [
    (("--only", "nothing"), "nothing is left; there are linear-d2-L2-inner2"),
    (("--replicates", "1"), "expected at least 2"),
    (("report", "--out", "absent"), "nothing was run"),
])  # fmt: skip
def test_refusals(words: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert theory.main(list(words)) == 1
    assert expected in capsys.readouterr().err


def test_committed_tables_are_those_of_the_committed_json() -> None:
    record = theory.HERE / "results" / "theory.json"
    result = json.loads(record.read_text())
    assert record.with_suffix(".md").read_text() == report.text(result)
    assert record.with_suffix(".png").exists() and result["done"] == result["planned"]


def test_pages_quote_the_committed_verdicts() -> None:
    text = (theory.HERE / "results" / "theory.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    told = [row for row in rows if len(row) == 9 and row[8] in ("agrees", "cannot tell", "contradicts")]
    page, pages = (ROOT / "docs" / "theory.md").read_text(), (ROOT / "docs" / "reproduction.md").read_text()

    def counts(of: list[list[str]]) -> list[int]:
        return [sum(row[8] == verdict for row in of) for verdict in ("agrees", "cannot tell", "contradicts")]

    for whose, name in (
        ("Theorem 4.1", "Theorem 4.1"),
        ("Theorem 4.2", "Theorem 4.2"),
        ("Theorem 4.3", "Theorem 4.3"),
        ("Proposition B", "Propositions B.1 and B.2, the regression error"),
    ):
        found = counts([row for row in told if row[7].startswith(whose)])
        assert f"| {name} | {' | '.join(map(str, found))} |" in page
    agree, unknown, against = counts(told)
    assert against == 0
    assert f"Of {len(told)} measured rates that the theorems state {agree} agree, {unknown} cannot be told" in pages
    crowded = [row for row in told if "share a cell" in row[1]]
    slopes = [float(row[2].split()[0]) for row in crowded if row[2] != "-"]
    agree, unknown, _ = counts([row for row in crowded if row[2] != "-"])
    assert f"{agree} rates of {len(slopes)} agree, and {unknown} cannot be told" in page
    assert f"the slopes are {max(slopes)} to {min(slopes)}" in page
    errors = [float(row[2].split()[0]) for row in told if row[1] == "regression error"]
    assert f"its slopes are {max(errors):.2f} to {min(errors):.2f}" in page
    spared = [float(row[2].split()[0]) for row in told if row[1] == "D_1,1"]
    assert f"slower: {max(spared)} to {min(spared)}, as 4.1 says" in page
    for loss, agreeing in (("D_2", "D_2 has its rate in all {0} settings"), ("D_3", "D_3 in {0} of {1}")):
        mine = [row for row in told if row[1] == loss]
        assert agreeing.format(counts(mine)[0], len(mine)) in page
    head = {row[0]: row[4] for row in rows if len(row) == 5 and row[1] == "values that share a cell"}
    separate, simple = (head[f"{kind}, twice"].split()[0] for kind in ("separate", "simple"))
    assert f"found at n^{separate}, as one shared prompt at n^{simple}" in page
    assert f"found at n^{separate}, shared prompts at n^{simple}" in pages
    [linear] = [row for row in rows if row[:2] == ["linear, d 2, 3 atoms, inner 2", "D_3"]]
    assert f"has 4.3's rate of D_3, {linear[2].split()[0]}, without" in page and linear[8] == "no theorem; has it"
