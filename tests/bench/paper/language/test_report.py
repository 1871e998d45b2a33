"""From a ledger to Tables 2 and 8: the paper's numbers, ours, what is missing, sentences beside references; times."""

import html.parser
import json
import statistics
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from bench.paper import meteor

pytest.importorskip("transformers", reason="the runs need transformers")
from bench.paper.language import decode_times, page, paper, presets, report, tasks, times, train
from bench.paper.language.testing import made_model
from bench.paper.runs import Refusal
from bench.paper.sweeps.grid import Grid, grid_of
from bench.paper.sweeps.ledger import Ledger
from bench.paper.sweeps.tables import EDGE

CONTENT = {
    "name": "made",
    "tasks": ["e2e", "webnlg"],
    "seeds": [1, 2, 3],
    "common": {"epochs": 4, "length": 5},
    "methods": [
        {"name": name, "layers": "all", "label": name, "lr": [0.3, 0.1], "weight_decay": [0.0]}
        for name in ("deep", "simple", "none", "none-word", "partial", "finetune")
    ],
}
BETTER = {"deep": 0.06, "simple": 0.01, "none": 0.0, "none-word": 0.02, "partial": 0.0, "finetune": 0.05}


def scores(task: str, value: float) -> dict[str, Any]:
    """Of `value` in 1: BLEU so, the others far from it."""
    if task == "e2e":
        said = ["BLEU: made", f"METEOR: not computed: {meteor.NO_JAVA}"]
        return {"BLEU": value, "NIST": 7.0, "METEOR": None, "ROUGE_L": 0.7, "CIDEr": 2.0, "notes": said}
    parts = {"seen": value * 100, "unseen": value * 50, "all": value * 75}
    rest = {"seen": 0.4, "unseen": 0.3, "all": 0.35}
    return {
        "BLEU": parts,
        "METEOR": rest,
        "TER": {**rest, "all": None},
        "notes": {"BLEU": "made", "TER": "not computed: no words"},
    }


def final(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    value = 0.5 + BETTER[config["method"]] + config["seed"] / 100
    texts = [f"{config['method']} <{at}>" for at in range(4)]
    return {
        "dev_loss": 2 - value, "weights": "cafe", "data": "made", "notes": ["quantised <weights>"], "length": 5,
        "trained": 1234, "kept": 567, "pairs": 8, "steps": 40, "losses": [[1, 90.0], [40, 30.0]],
        "seconds_per_step": 0.5, "scores": scores(config["task"], value), "seconds_decoding": 3.0, "decoded": 4,
        "texts": texts, "records": [{"place": 2, "source": "name : A & B", "references": ["A & B is a pub ."]}], **more,
    }  # fmt: skip


def filled(folder: Path, leave: str = "") -> tuple[Grid, Ledger]:
    """A grid whose runs are done, those with `leave` in their names excepted; lr 0.1 is the better."""
    grid, ledger = grid_of(deepcopy(CONTENT), "made", presets.SETTINGS, presets.DEV_LOSS), Ledger(folder / "runs")
    for run in grid.search_runs():
        ledger.write(run, {"dev_loss": 1.5 if run.config["lr"] == 0.1 else 1.7}, 10.0, 20.0)
    for run in grid.final_runs(ledger):
        if not leave or leave not in run.name:
            ledger.write(run, final(run.config), 7200.0, 20.0)
    return grid, ledger


def rows_of(results: dict[str, Any], start: str) -> dict[str, list[str]]:
    [table] = [table for table in report.tables(results) if table.caption.startswith(start)]
    return {row[0].text: [entry.text for entry in row[1:]] for row in table.rows}


def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path))
    e2e = rows_of(results, "Tables 2 and 8, E2E: the paper's GPT-2 medium / ours")
    deviation = statistics.stdev([0.57, 0.58, 0.59])
    assert e2e["Deep-share"] == [
        f"69.9 / 58.0 ± {100 * deviation:.1f}*", "8.78 / 7.00 ± 0.00*", "46.3 / needs Java", "71.5 / 70.0 ± 0.0*",
        "2.45 / 2.00 ± 0.00*", "1.420 ± 0.010*", "4",
    ]  # fmt: skip
    assert e2e["Simple-share"][0] == "- / 53.0 ± 1.0*"
    assert e2e["No-share"][0].startswith("68.0 / ") and e2e["No-share from a word"][0].startswith("68.0 / ")
    assert e2e["Partial-2"][0].startswith("68.1 / ")
    webnlg = rows_of(results, "Tables 2 and 8, WebNLG")
    assert [cell.split(" / ")[0] for cell in webnlg["Finetune"][:9]] == [
        "64.2", "27.7", "46.5", "0.45", "0.30", "0.38", "0.33", "0.76", "0.53"
    ]  # fmt: skip
    assert webnlg["Deep-share"][1] == "44.3 / 29.0 ± 0.5*" and webnlg["Deep-share"][8] == "0.42 / not computed"
    assert f"METEOR: not computed: {meteor.NO_JAVA}." in report.tables(results)[0].notes
    for results_notes in report.tables(results)[:2]:
        assert EDGE in results_notes.notes and paper.NO_SHARE in results_notes.notes
        assert "quantised <weights>." in results_notes.notes


def test_every_number_of_the_paper_has_its_column() -> None:
    assert {task: {len(row) for row in rows.values()} for task, rows in paper.REPORTED.items()} == {
        task: {len(columns)} for task, columns in paper.COLUMNS.items()
    }
    cell = {"task": "e2e", "method": "partial", "last": 1}
    assert paper.reported(cell) == () and paper.reported({**cell, "last": 2})[0] == 68.1


@pytest.mark.parametrize("task", ["e2e", "webnlg", "xsum"])
def test_columns_are_where_the_scores_are(task: str) -> None:
    pytest.importorskip("rouge_score", reason="summaries are scored by rouge-score")
    found = tasks.scores(task, [["a pub by the river", "a river pub"]] * 2, ["a pub by the river"] * 2, [True, False])
    said = {
        column.title: report._value({"scores": found}, column)
        for column in paper.COLUMNS[task]
        if not column.title.startswith("METEOR")  # which needs Java
    }
    assert all(isinstance(value, float) for value in said.values()), said


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path, leave="-s3"))
    assert rows_of(results, "Tables 2 and 8, E2E")["Deep-share"][0].endswith("(2 of 3 seeds)")
    assert report.describe(results).startswith("24 of 36 final runs are measured")
    grid = grid_of(deepcopy(CONTENT), "made", presets.SETTINGS, presets.DEV_LOSS)
    empty = report.collect(grid, Ledger(tmp_path / "nothing"))
    assert rows_of(empty, "Tables 2 and 8, E2E")["Deep-share"][:2] == ["69.9 / -", "8.78 / -"]
    assert report.differences(empty) is None and "Nothing is measured yet" in page.page_of(empty)


def test_what_diverged_or_failed_is_no_dash(tmp_path: Path) -> None:
    grid, ledger = filled(tmp_path, leave="none/final")
    for run in grid.final_runs(ledger):
        if "/none/" in run.name:
            ledger.write(run, {"diverged": 3, "dev_loss": None, "weights": "cafe", "trained": 5, "kept": 5})
    results = report.collect(grid, ledger)
    shown = rows_of(results, "Tables 2 and 8, E2E")["No-share"]
    assert shown[0] == "68.0 / diverged" and shown[5] == "diverged" and "6 more diverged" in report.describe(results)
    grid, ledger = filled(tmp_path / "part", leave="none/final")
    for run in grid.final_runs(ledger):
        if run.name.startswith("made/e2e/none/") and run.config["seed"] == 1:
            ledger.write(run, {"diverged": 3, "dev_loss": None, "weights": "cafe", "trained": 5, "kept": 5})
        elif run.name.startswith("made/e2e/none/") and run.config["seed"] == 2:
            ledger.write(run, final(run.config))
        elif "/none/" in run.name:
            ledger.failed(run, "no memory left")
    results = report.collect(grid, ledger)
    assert rows_of(results, "Tables 2 and 8, E2E")["No-share"][0] == "68.0 / 52.0* (1 of 3 seeds, 1 diverged)"
    assert rows_of(results, "Tables 2 and 8, WebNLG")["No-share"][0] == "61.1 / failed"
    assert "Failed: webnlg, No-share: 3 of 3 final runs: no memory left." in report.tables(results)[1].notes
    broken = grid_of(deepcopy(CONTENT), "made", presets.SETTINGS, presets.DEV_LOSS)
    lost = Ledger(tmp_path / "lost")
    for run in broken.search_runs():
        lost.failed(run, "no memory left")
    results = report.collect(broken, lost)
    assert rows_of(results, "Tables 2 and 8, E2E")["No-share"][0] == "68.0 / failed"
    assert any(note.startswith("Failed: e2e, Deep-share: ") for note in report.tables(results)[0].notes)


def test_differences_are_in_shown_units_and_standard_errors(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path))
    table = report.differences(results)
    assert table is not None
    rows = [[entry.text for entry in row] for row in table.rows]
    error = (2 * 0.01**2 / 3) ** 0.5  # of a deviation of 0.01 in three seeds each
    assert ["e2e", "Deep-share", "No-share", "BLEU", "+6.0", f"{0.06 / error:+.1f}"] in rows
    assert ["e2e", "Deep-share", "No-share", "loss on dev", "-0.060", f"{-0.06 / error:+.1f}"] in rows
    assert ["webnlg", "Deep-share", "No-share from a word", "BLEU unseen", "+2.0", f"{0.04 / error:+.1f}"] in rows
    assert (
        "Deep-share is better than No-share by more than two standard errors in 6 of 6 scores, and worse so in none."
    ) in table.notes
    assert (
        "Simple-share is better than No-share by more than two standard errors in none of 6 scores, and worse so in "
        "none."
    ) in table.notes


def test_scores_of_other_texts_are_not_compared(tmp_path: Path) -> None:
    results = report.collect(*filled(tmp_path))
    for cell in results["cells"]:
        if cell["label"] == "none-word":
            cell["decoded"] = 2
    table = report.differences(results)
    assert table is not None
    rows = [[entry.text for entry in row[:4]] for row in table.rows]
    assert {row[3] for row in rows if row[2] == "No-share from a word"} == {"loss on dev"}
    assert {row[3] for row in rows if row[2] == "No-share"} == {
        "BLEU",
        "BLEU all",
        "BLEU seen",
        "BLEU unseen",
        "loss on dev",
    }


def test_runs_of_other_data_are_refused(tmp_path: Path) -> None:
    grid, ledger = filled(tmp_path, leave="e2e/none/final")
    for run in grid.final_runs(ledger):
        if "e2e/none/" in run.name:
            ledger.write(run, final(run.config, data_sha256="abcd" if run.config["seed"] == 1 else "ef01"))
    with pytest.raises(Refusal, match="data sha256 ef01 of the task e2e"):
        report.collect(grid, ledger)


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "path", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_files_are_made_of_the_json_alone(tmp_path: Path) -> None:
    grid, ledger = filled(tmp_path)
    out = tmp_path / "nlg-made"
    text = report.write(grid, ledger, out)
    kept = json.loads((tmp_path / "nlg-made.json").read_text())
    first = {end: (tmp_path / f"nlg-made.{end}").read_bytes() for end in ("md", "html")}
    assert text.startswith(first["md"].decode())
    last = text.splitlines()[-len(CONTENT["methods"]) - 2 :]
    assert last[:2] == ["name : A & B", f"  {'Deep-share':20}  deep <2>"]
    assert last[-1] == f"  {'a reference':20}  A & B is a pub ."
    report.publish(kept, out)
    assert {end: (tmp_path / f"nlg-made.{end}").read_bytes() for end in first} == first
    reader = Reader()
    reader.feed(first["html"].decode())
    assert not reader.open
    # each method's sentence beside the references, of both tasks
    assert reader.said.count("deep <2>") == reader.said.count("none-word <2>") == 2
    assert reader.said.count("A & B is a pub .") == reader.said.count("name : A & B") == 2
    assert "http" not in first["html"].decode()  # nothing is loaded from elsewhere


def test_drawn_places_are_a_part_of_more() -> None:
    few, more, every = train.places(100, 5), train.places(100, 40), train.places(100, 0)
    assert len(few) == 5 and set(few) < set(more) < set(every) and every == list(range(100))
    assert few == sorted(few) and train.places(3, 5) == [0, 1, 2]


# --- times ---


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a tiny model on generated records."""
    folder = tmp_path_factory.mktemp("times")
    settings = train.Settings(
        "e2e", "deep", 1e-6, 0.0, 101, backbone=str(made_model("gpt2", folder)), length=3, hidden=8, batch=4
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFIXATTN_DATA", "generated")
        return times.compare(settings, ("deep", "deep-packed", "deep-logits", "original"), 3, types=(False,))


@pytest.mark.filterwarnings("ignore")  # what transformers and PEFT warn of while models are made
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_methods_alternate_on_the_same_batches(timed: dict[str, Any]) -> None:
    assert set(timed["types"]) == {"float32"}
    for ways in timed["types"].values():
        assert list(ways) == ["floor", "deep", "deep-packed", "deep-logits", "original"]
        assert all(len(way["ms"]) == 3 and min(way["ms"]) > 0 and way["step_mib"] > 0 for way in ways.values())
        assert ways["floor"]["trained_mib"] < ways["deep"]["trained_mib"]
    ways = timed["types"]["float32"]
    for name in ("deep-packed", "deep-logits", "original"):
        assert ways["deep"]["first_loss"] == pytest.approx(ways[name]["first_loss"], rel=1e-5)
    assert ways["deep"]["first_loss"] != pytest.approx(ways["floor"]["first_loss"], rel=1e-4)
    told = timed["settings"]
    assert told["length"] == 3 and told["backbone"].startswith("times") and "/" not in told["backbone"]


def test_ratios_are_of_one_round() -> None:
    ways = {
        "floor": {"ms": [100.0, 200.0, 300.0], "peak_mib": 10.0},
        "deep": {"ms": [110.0, 220.0, 330.0], "peak_mib": 12.0},
        "original": {"ms": [220.0, 440.0, 660.0], "peak_mib": 30.0},
    }
    found = {"settings": {"task": "e2e"}, "rounds": 3, "types": {"float32": ways}, "provenance": {"device": "one"}}
    [table] = times.tables(found)
    rows = {row[0].text: [entry.text for entry in row[1:]] for row in table.rows}
    assert rows["deep"] == ["220 (154 to 286)", "+20 (+14 to +26)", "0.50 (0.50 to 0.50)", "12", "0.10"]
    assert rows["original"][2:] == ["1.00 (1.00 to 1.00)", "30", "1.00"]
    for peak in (30.0, None):  # no more than the floor's, or not measured
        ways["floor"]["peak_mib"] = peak
        if peak is None:
            del ways["floor"]["peak_mib"]
        assert [entry.text for entry in times.tables(found)[0].rows[1]][-1] == "-"


def test_steps_of_what_takes_none_are_refused() -> None:
    settings = train.Settings("e2e", "deep", 0.01, 0.0, 1)
    for name in ("frozen", "deep-all"):
        with pytest.raises(Refusal, match=f"no steps of '{name}'; there are .*deep-logits"):
            times.compare(settings, (name,), 1)


@pytest.mark.filterwarnings("ignore")  # of PEFT, which reads what transformers renamed
def test_texts_together_are_those_of_one_at_a_time_and_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="PEFT's prefix is one of the ways")
    monkeypatch.setenv("PREFIXATTN_DATA", "generated")
    monkeypatch.setattr(decode_times, "STEPS", 2)
    model = str(made_model("gpt2", tmp_path))
    settings = train.Settings("e2e", "deep", 0.01, 0.0, 1, backbone=model, length=3, hidden=8, batch=4, most_new=6)
    found = decode_times.compare(settings, count=4, rows=2, rounds=1)
    assert found["same_texts"] == {"together": 4, "one at a time": 4, "one at a time, PEFT": 4}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["seconds"].values())
    assert [row[0].text for row in decode_times.table(found).rows] == list(found["seconds"])


def test_prompts_of_the_commonest_lengths_go_together() -> None:
    prompts = [[0] * n for n in (3, 5, 4, 5, 3, 5, 9, 3)]
    assert [len(ids) for ids in decode_times.commonest(prompts, 4, 2)] in ([3, 3, 5, 5], [5, 5, 3, 3])
    assert decode_times.commonest(prompts, 3, 9) == prompts[:3]
