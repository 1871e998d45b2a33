"""Texts of a run to their task's metrics: WebNLG's by categories whatever their order, XSUM's against one reference."""

import pytest

from bench.paper import meteor
from bench.paper.language import tasks

CAT, DOG, FOX = "The cat sat on the mat.", "A dog, Rex, barked at it.", "No fox was seen in Zürich."


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "missing", lambda: "left out")


def test_webnlg_by_seen_and_unseen() -> None:
    pytest.importorskip("unidecode", reason="unidecode is not installed")
    references = [[DOG, "Rex barked."], [CAT], [FOX, FOX, FOX, "a fourth is not counted"]]
    found = tasks.scores("webnlg", references, ["Something else entirely.", CAT, FOX], [False, True, False])
    assert found["BLEU"]["seen"] == pytest.approx(100) and 0 < found["BLEU"]["unseen"] < found["BLEU"]["all"] < 100
    assert found["TER"]["seen"] == 0 < found["TER"]["all"] < found["TER"]["unseen"]
    assert found["METEOR"]["all"] is None and "left out" in found["notes"]["METEOR"]


def test_webnlg_of_one_kind_of_categories_is_not_scored() -> None:
    found = tasks.scores("webnlg", [[CAT]], [CAT], [True])
    assert list(found) == ["notes"] and "no entry was decoded" in found["notes"]["all"]


def test_xsum_and_e2e() -> None:
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    found = tasks.scores("xsum", [[CAT], [DOG]], [CAT, DOG], [False, False])
    assert found["ROUGE-1"]["documents"] == pytest.approx(100)
    assert tasks.scores("e2e", [[CAT, DOG]], [CAT], [False])["ROUGE_L"] == pytest.approx(1)
