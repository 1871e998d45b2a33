"""From a ledger to tables, figure and page: numbers, what is missing, the paper's cells, text that is not ours."""

import html.parser
import json
import math
import shutil
import statistics
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench.paper.runs import Refusal
from bench.paper.sweeps import page as pages
from bench.paper.sweeps.grid import Grid, grid_of
from bench.paper.sweeps.ledger import Ledger
from bench.paper.sweeps.tables import EDGE, Table
from bench.paper.visual import findings, paper, presets, report
from bench.paper.visual.page import page_of as page

CONTENT = {
    "name": "made",
    "tasks": ["cifar10", "digits"],
    "seeds": [1, 2, 3],
    "common": {"epochs": 4, "length": 7},
    "methods": [
        {"name": name, "layers": layers, "label": f"{name}-{layers}", "lr": [5.0, 1.0], "weight_decay": [0.0]}
        for name in ("deep", "simple", "none")
        for layers in ("all", "first")
    ],
}
SHARE = {"deep": 0.1, "simple": 0.2, "none": 0.0}


def result(score: str, value: float | None, **more: Any) -> dict[str, Any]:
    curve = [[2, 1.5, 0.25], [4, 1.0, value]]
    return {score: value, "curve": curve, "trained": 1234, "kept": 567, "head": 10, "images": {"train": 8, "scored": 4},
            "classes": 2, "cached": False, "busy_steps": 0.98, "notes": ["rendered anew <i>"], **more}  # fmt: skip


def value_of(config: dict[str, Any]) -> float:
    base = 0.5 if config["task"] == "cifar10" else 0.6
    return base + SHARE[config["method"]] + (config["layers"] == "all") * 0.05 + config["seed"] / 100


def filled(folder: Path, leave: str = "") -> tuple[Grid, Ledger]:
    """A grid whose runs are done, those with `leave` in their names excepted; lr 1 is the better."""
    grid, ledger = grid_of(CONTENT, "made", presets.SETTINGS), Ledger(folder / "runs")
    for run in grid.search_runs():
        ledger.write(run, result("val_accuracy", 0.4 if run.config["lr"] == 1 else 0.3), 10.0, 20.0)
    for run in grid.final_runs(ledger):
        if not leave or leave not in run.name:
            ledger.write(run, result("test_accuracy", value_of(run.config)), 10.0, 20.0)
    return grid, ledger


def test_cells_hold_the_choice_and_the_seeds(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path))
    [cell] = [c for c in results["cells"] if (c["task"], c["label"]) == ("cifar10", "deep-all")]
    scores = [0.66, 0.67, 0.68]
    assert (cell["lr"], cell["weight_decay"], cell["val_accuracy"]) == (1.0, 0.0, 0.4)
    assert [seed for seed, _ in cell["test"]] == [1, 2, 3]
    assert [score for _, score in cell["test"]] == pytest.approx(scores)
    assert cell["mean"] == pytest.approx(0.67) and cell["std"] == pytest.approx(statistics.stdev(scores))
    assert (cell["seconds"], cell["peak_mib"], cell["trained"], cell["kept"]) == (10.0, 20.0, 1234, 567)
    assert results["settings"] == {"epochs": 4, "length": 7}
    assert report.shown(cell) == "67.0 ± 1.0*"  # of two rates, each is at an edge


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path, leave="-s3"))
    assert report.shown(results["cells"][0]).endswith("(2 of 3 seeds)")
    assert "24 of 36 final runs are measured" in report.describe(results)
    grid = grid_of(CONTENT, "made", presets.SETTINGS)
    empty = report.collect(grid, Ledger(tmp_path / "nothing"))
    assert {report.shown(cell) for cell in empty["cells"]} == {"-"}
    assert "0 of 36" in report.describe(empty) and "Nothing is measured yet" in page(empty)


def test_what_diverged_is_counted_apart(tmp_path: Path) -> None:
    grid, ledger = filled(tmp_path, leave="none-all/final")
    for run in grid.final_runs(ledger):
        if "none-all/final" in run.name:
            diverged = run.config["seed"] == 1 or run.config["task"] == "digits"
            value = None if diverged else 0.622 + run.config["seed"] / 200
            ledger.write(run, result("test_accuracy", value))
    results = report.collect(grid, ledger)
    cells = {(c["task"], c["label"]): c for c in results["cells"]}
    assert report.shown(cells["cifar10", "none-all"]) == "63.5 ± 0.4* (2 of 3 seeds, 1 diverged)"
    assert report.shown(cells["digits", "none-all"]) == "diverged"
    assert cells["cifar10", "none-all"]["mean"] == pytest.approx(0.6345)  # what diverged is no zero
    said = "32 of 36 final runs are measured, on "
    assert said in report.describe(results) and "4 more diverged" in report.describe(results)
    assert '<td data-value="2">2 of 3, 1 diverged</td>' in page(results) and "4 more diverged" in page(results)


# --- blocks of one method and layers ---


def block(name: str, label: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "layers": "all", "label": label, "lr": [1.0], "weight_decay": [0.0], **more}


def made(folder: Path, methods: list[dict[str, Any]], scores: dict[str, float], **more: Any) -> dict[str, Any]:
    """Results of a grid without a search; a label's seeds are its score, and 0.01 less and more."""
    content = {**deepcopy(CONTENT), "tasks": ["digits"], "methods": methods, **more}
    grid, ledger = grid_of(content, "made", presets.SETTINGS), Ledger(folder / "runs")
    for run in grid.final_runs(ledger):
        label = run.name.split("/")[2]
        if label in scores:
            ledger.write(run, result("test_accuracy", scores[label] + (run.config["seed"] - 2) / 100))
    return report.collect(grid, ledger)


def texts(table: Table | None) -> list[list[str]]:
    assert table is not None
    return [[entry.text for entry in row] for row in table.rows]


def test_blocks_of_one_method_are_told_apart(tmp_path: Path) -> None:
    methods = [
        block("deep", "deep-all-P5", length=5), block("deep", "deep-all-P20", length=20),
        block("deep", "wide", length=20, hidden=96), block("none", "none-all-P5", length=5),
        block("none", "none-all-P20", length=20), block("simple", "simple-all", length=9),
        block("partial", "partial", last=1), block("partial", "partial-all", last=3),
    ]  # fmt: skip
    scores = {"deep-all-P5": 0.5, "deep-all-P20": 0.7, "wide": 0.8, "none-all-P5": 0.4, "none-all-P20": 0.3}
    results = made(tmp_path, methods, {**scores, "simple-all": 0.9})
    assert findings.titles(results) == {
        "deep-all-P5": "Deep-share, DEEP, P 5", "deep-all-P20": "Deep-share, DEEP, P 20",
        "wide": "Deep-share, DEEP, P 20 (wide)", "none-all-P5": "No-share, DEEP, P 5",
        "none-all-P20": "No-share, DEEP, P 20", "simple-all": "Simple-share, DEEP", "partial": "Partial-1",
        "partial-all": "Partial-3",
    }  # fmt: skip
    rows = {(row[2], row[3]): row[4] for row in texts(findings.differences(results, ["digits"]))}
    assert rows == {
        ("Deep-share, DEEP, P 5", "No-share, DEEP, P 5"): "+10.0",
        ("Deep-share, DEEP, P 20", "No-share, DEEP, P 20"): "+40.0",
        ("Deep-share, DEEP, P 20 (wide)", "No-share, DEEP, P 20"): "+50.0",
        ("Simple-share, DEEP", "No-share, DEEP, P 5"): "+50.0",  # no P 9 there: the nearest
        ("Simple-share, DEEP", "Deep-share, DEEP, P 5"): "+40.0",
    }
    assert len(report.rows_of(results)) == len(methods)
    shallow, deep = report.drawing(results).axes
    assert len(deep.containers) == 2 * 6 and not shallow.containers  # bars and their deviations, of six labels


def test_of_one_length_the_twin_is_compared(tmp_path: Path) -> None:
    methods = [block("none", "none-all-relu"), block("none", "none-all"), block("deep", "deep-all")]
    results = made(tmp_path, methods, {"none-all-relu": 0.1, "none-all": 0.5, "deep-all": 0.6})
    assert [row[3:5] for row in texts(findings.differences(results, ["digits"]))] == [["No-share, DEEP, P 7", "+10.0"]]


# --- differences and sentences ---


def test_differences_in_points_and_standard_errors(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path))
    table = findings.differences(results, results["tasks"])
    errors = 0.1 / math.sqrt(2 * 0.01**2 / 3)  # of a deviation of 1 point in three seeds each
    rows = texts(table)
    assert ["cifar10", "DEEP", "Deep-share, DEEP", "No-share, DEEP", "+10.0", f"{errors:+.1f}"] in rows
    assert ["digits", "SHALLOW", "Simple-share, SHALLOW", "Deep-share, SHALLOW", "+10.0", f"{errors:+.1f}"] in rows
    assert len(rows) == 12
    assert table and "sqrt(s1²/n1 + s2²/n2)" in table.caption
    cell, base = ({"mean": m, "std": s, "test": [[i, m] for i in range(n)] + [[9, None]]}
                  for m, s, n in ((0.7, 0.02, 4), (0.6, 0.03, 2)))  # fmt: skip
    points, apart = findings.difference(cell, base)
    assert points == pytest.approx(10) and apart == pytest.approx(0.1 / math.sqrt(0.02**2 / 4 + 0.03**2 / 2))
    assert findings.difference({**cell, "std": None}, base)[1] is None


def test_a_sentence_for_each_layers(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path))
    cells = {(c["task"], c["label"]): c for c in results["cells"]}
    cells["digits", "none-all"]["mean"] = 0.99  # clearly above all
    cells["cifar10", "deep-first"]["mean"] = cells["cifar10", "none-first"]["mean"] + 0.01  # 1.2 standard errors
    shallow, deep = findings.sentences(results, results["tasks"])
    assert deep == (
        "DEEP: Deep-share, DEEP beats No-share, DEEP by more than two standard errors in 1 of 2 tasks, and No-share, "
        "DEEP beats it so in 1; Simple-share, DEEP beats No-share, DEEP by more than two standard errors in 1 of 2 "
        "tasks, and No-share, DEEP beats it so in 1; Simple-share, DEEP is the best of all methods of the grid in 1 "
        "of 2 tasks where all are measured."
    )
    assert shallow.startswith(
        "SHALLOW: Deep-share, SHALLOW beats No-share, SHALLOW by more than two standard errors in 1"
    )
    assert "the best of all methods of the grid in none of 2 tasks" in shallow
    cells["digits", "deep-all"]["test"].pop()
    assert "grid in 1 of 1 task where all" in findings.sentences(results, results["tasks"])[1]
    written = report.markdown(results), page(results)
    assert all(sentence in text for text in written for sentence in findings.sentences(results, results["tasks"]))


def test_the_papers_cells_stand_beside_ours(tmp_path: Path) -> None:
    grid, ledger = presets.grid_for("fgvc", "published"), Ledger(tmp_path / "runs")
    for run in grid.final_runs(ledger):
        if run.config["task"] == "fgvc-cub200" and run.config["method"] == "deep":
            ledger.write(run, result("test_accuracy", 0.871 + run.config["seed"] / 1e5))
    results = report.collect(grid, ledger)
    cells, means = report.tables(results)  # nothing to compare yet
    assert cells.head == ["method", *paper.FGVC]
    by_name = {row[0]: row[1:] for row in texts(cells)}
    assert by_name["Deep-share, DEEP"] == ["87.8 / 87.3 ± 0.3", "84.5 / -", "98.2 / -", "91.6 / -", "79.3 / -"]
    assert by_name["No-share, SHALLOW"][0] == "85.1 / -"
    assert ["Deep-share, DEEP", "88.28 / -"] in texts(means)  # a mean wants all five
    assert ["Simple-share, DEEP", "89.04 / -"] in texts(means)
    assert ["Simple-share, SHALLOW", "82.10 / -"] in texts(means)
    text = page(results)
    mean = next(c["mean"] for c in results["cells"] if (c["task"], c["label"]) == ("fgvc-cub200", "deep-all"))
    assert f'<td data-value="{mean}">87.8 / 87.3 ± 0.3</td><td data-value="">84.5 / -</td>' in text
    assert '<td data-value="Deep-share, DEEP">Deep-share, DEEP</td>' in text


@pytest.mark.parametrize("task", ["fgvc-dogs", "vtab-svhn", "sprites"])
def test_every_suite_has_its_differences(tmp_path: Path, task: str) -> None:
    methods = [block(name, f"{name}-all") for name in ("deep", "simple", "none")]
    results = made(tmp_path, methods, {"deep-all": 0.7, "simple-all": 0.6, "none-all": 0.5}, tasks=[task])
    [table] = [table for table in report.tables(results) if table.caption == findings.CAPTION]
    assert [row[:2] + row[4:5] for row in texts(table)] == [
        [task, "DEEP", "+20.0"], [task, "DEEP", "+10.0"], [task, "DEEP", "-10.0"]
    ]  # fmt: skip
    assert len(table.notes) == 1


def test_the_papers_partial_is_partial_1(tmp_path: Path) -> None:
    methods = [block("partial", "partial"), block("partial", "partial-all", last=3)]
    _, means = report.tables(made(tmp_path, methods, {}, tasks=["fgvc-dogs"]))
    assert texts(means) == [["Partial-1", "82.63 / -"], ["Partial-3", "- / -"]]


# --- marks and failures ---


def searched(folder: Path, rates: list[float], best: float) -> dict[str, Any]:
    methods = [{**block("deep", "deep-all"), "lr": rates}]
    content = {**deepcopy(CONTENT), "tasks": ["digits"], "methods": methods}
    grid, ledger = grid_of(content, "made", presets.SETTINGS), Ledger(folder / "runs")
    for run in grid.search_runs():
        ledger.write(run, result("val_accuracy", 0.9 if run.config["lr"] == best else 0.1))
    for run in grid.final_runs(ledger):
        ledger.write(run, result("test_accuracy", value_of(run.config)))
    return report.collect(grid, ledger)


@pytest.mark.parametrize(("rates", "best", "edge"), [
    ([4.0, 2.0, 1.0], 2.0, False), ([4.0, 2.0, 1.0], 4.0, True), ([4.0, 2.0, 1.0], 1.0, True), ([4.0], 4.0, False),
])  # fmt: skip
def test_a_rate_at_the_edge_is_marked(tmp_path: Path, rates: list[float], best: float, edge: bool) -> None:
    results = searched(tmp_path, rates, best)
    [cell] = results["cells"]
    assert cell["edge"] is edge and report.shown(cell).endswith("*") is edge
    for text in (report.markdown(results), page(results)):
        assert (EDGE in text) is edge


def test_a_search_that_failed_is_no_dash(tmp_path: Path) -> None:
    grid, ledger = grid_of(CONTENT, "made", presets.SETTINGS), Ledger(tmp_path / "runs")
    for run in grid.search_runs():
        if "digits/deep-all/" in run.name:
            ledger.failed(run, "no <memory> left")
        if "digits/none-all/" in run.name:
            ledger.write(run, result("val_accuracy", None))
    results = report.collect(grid, ledger)
    [plain] = report.tables(results)
    shown = {row[0]: row[1:] for row in texts(plain)}
    assert shown["Deep-share, DEEP"] == shown["No-share, DEEP"] == ["-", "-", "failed", "-"]
    assert shown["Simple-share, DEEP"] == ["-"] * 4
    broken, diverged = plain.notes
    assert broken.startswith("Failed: digits, Deep-share, DEEP: ") and "no <memory> left" in broken
    assert diverged.startswith("Failed: digits, No-share, DEEP: no final runs, all 2 of its search diverged")
    assert all(note in report.markdown(results) for note in plain.notes)
    assert broken.replace("<memory>", "&lt;memory&gt;") in page(results)


def test_the_trained_are_a_range_where_tasks_differ(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path))
    for cell in results["cells"]:
        if (cell["task"], cell["label"]) == ("digits", "deep-all"):
            cell["trained"] = 99
    trained = {row[0]: row[1] for row in texts(report.tables(results)[0])}
    assert trained["Deep-share, DEEP"] == "99 to 1,234" and trained["No-share, DEEP"] == "1,234"


def test_runs_with_other_weights_are_refused(tmp_path: Path) -> None:
    content = {**deepcopy(CONTENT), "tasks": ["digits"], "common": {"epochs": 4, "length": 7, "backbone": "small"}}
    content["methods"] = [block("deep", "deep-all"), block("none", "none-all"), block("vpt", "v", backbone="focus")]
    grid, ledger = grid_of(content, "made", presets.SETTINGS), Ledger(tmp_path / "runs")
    *most, last = [run for run in grid.final_runs(ledger) if "/v/" not in run.name]
    for run in grid.final_runs(ledger):
        if "/v/" in run.name:
            ledger.write(run, result("test_accuracy", 0.5, weights="cafe"))  # another backbone has others
    for run in most[1:]:
        ledger.write(run, result("test_accuracy", 0.5, weights="abcd"))
    ledger.write(most[0], result("test_accuracy", 0.5))  # one from before, which does not say
    cells = report.collect(grid, ledger)["cells"]
    assert [cell["weights"] for cell in cells] == ["abcd", "abcd", "cafe"]
    ledger.write(last, result("test_accuracy", 0.5, weights="ef01"))
    with pytest.raises(Refusal) as refused:
        report.collect(grid, ledger)
    assert all(word in str(refused.value) for word in ("digits/none-all", "abcd", "ef01", "small"))
    assert "\n" not in str(refused.value)


# --- figure and page ---


def test_the_figure_names_the_methods_and_draws_the_papers(tmp_path: Path) -> None:
    methods = [block(name, f"{name}-all") for name in ("deep", "simple", "none")]
    scores = {"deep-all": 0.7, "simple-all": 0.6, "none-all": 0.5}
    results = made(tmp_path, methods, scores, tasks=["fgvc-cub200", "fgvc-cars", "digits"])
    axes = report.drawing(results).axes[1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "the paper", "Deep-share", "Simple-share", "No-share"
    ]  # fmt: skip
    [line] = [line for line in axes.get_lines() if line.get_label() == "the paper"]
    assert list(line.get_ydata()) == [87.8, 79.3, 88.7, 82.8, 85.9, 62.5]
    results = report.collect(*filled(tmp_path / "other"))
    for axes in report.drawing(results).axes:
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["Deep-share", "Simple-share", "No-share"]


def test_a_figure_cut_short_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, path = report.collect(*filled(tmp_path)), tmp_path / "figure.png"
    path.write_bytes(b"old")

    def cut(_: Figure, file: Path, **__: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(OSError, match=r"figure\.png"):
        report.figure(results, path)
    assert path.read_bytes() == b"old" and not list(tmp_path.glob(".*.tmp"))


def test_each_method_has_a_look_of_its_own() -> None:
    assert len(set(pages.COLOURS)) >= 16
    assert len(set(pages.styles(48))) == 48


def test_columns_sort_by_our_number_with_what_is_missing_last() -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not on the PATH")
    columns = [
        [["0.873", "", "0.95", "0.1", ""], True, False],
        [["0.873", "", "0.95", "0.1", ""], False, False],
        [["10", "9", "", "1e-05"], False, False],  # as numbers
        [["b", "10", "9", "a"], False, True],  # as text
        [["12", "9"], False, True],
    ]
    script = f"{pages.ORDER}\nconsole.log(JSON.stringify({json.dumps(columns)}.map(column => order(...column))))"
    ran = subprocess.run([node, "-e", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(ran.stdout) == [[2, 0, 3, 1, 4], [3, 0, 2, 1, 4], [3, 1, 0, 2], [1, 2, 3, 0], [0, 1]]


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells = self.valued = self.lines = 0

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.cells += tag == "td"
        self.valued += tag == "td" and "data-value" in dict(attributes)
        self.lines += tag == "polyline"
        if tag not in ("meta", "path", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.lines += tag == "polyline"

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "circle", "polyline"):
            assert self.open.pop() == tag


def test_files_are_made_of_the_json_alone(tmp_path: Path) -> None:
    grid, ledger = filled(tmp_path)
    out = tmp_path / "vision-made"
    text = report.write(grid, ledger, out)
    kept = json.loads((tmp_path / "vision-made.json").read_text())
    first = {end: (tmp_path / f"vision-made.{end}").read_bytes() for end in ("md", "html")}
    assert first["md"].decode() == text and (tmp_path / "vision-made.png").read_bytes()[1:4] == b"PNG"
    report.publish(kept, out)
    assert {end: (tmp_path / f"vision-made.{end}").read_bytes() for end in first} == first
    reader = Reader()
    reader.feed(first["html"].decode())
    assert not reader.open and reader.cells > 100 and reader.valued == reader.cells
    assert first["html"].decode().count(pages.ORDER) == 1
    assert reader.lines == 12  # a curve for each cell
    assert "rendered anew &lt;i&gt;" in first["html"].decode()
    assert "http" not in first["html"].decode()  # nothing is loaded from elsewhere
