"""bench/paper/xsum_metrics.py: what the published function returns, cases worked out by hand, a missing package."""

import sys
from pathlib import Path

import numpy as np
import pytest

from bench.paper import xsum_metrics
from bench.paper.runs import Refusal

REFERENCES = [
    "A man has been jailed for stealing two cars in Leeds.",
    "The village's oldest pub will close in March.",
    "Rain stopped play at Lord's on Friday.",
    "Three new trains were ordered by the council.",
    "A whale was seen off the coast of Wales.",
]
OUTPUTS = [
    "A man who stole cars has been jailed in Leeds.",
    "The oldest pub of the village is closing.",
    "",
    "The council ordered three trains.",
    "Whales were seen off the Welsh coast.",
]
# calculate_rouge of Prefix-Tuning's seq2seq/utils.py on batches of 2, after numpy.random.seed(101), averaged
PUBLISHED = {"ROUGE-1": 56.1562, "ROUGE-2": 24.0161, "ROUGE-L": 44.9158}
# and the mean of rouge_score's F over the five
MEAN = {"ROUGE-1": 54.8874, "ROUGE-2": 23.1050, "ROUGE-L": 41.3989}


def rounded(scores: dict[str, dict[str, float | None]], column: str) -> dict[str, float]:
    return {metric: round(values[column] or 0, 4) for metric, values in scores.items()}


def test_scores_are_those_of_the_published_function() -> None:
    scores, notes = xsum_metrics.score(REFERENCES, OUTPUTS, per_batch=2)
    assert rounded(scores, "batches of 2") == PUBLISHED
    assert rounded(scores, "documents") == MEAN
    assert set(notes) == set(scores)
    assert all("rouge-score" in note and "seed 101" in note for note in notes.values())


def test_without_batches_there_is_the_mean_alone() -> None:
    scores, notes = xsum_metrics.score(REFERENCES, OUTPUTS)
    assert [list(values) for values in scores.values()] == [["documents"]] * 3
    assert not any("seed" in note for note in notes.values())


def test_a_batch_of_one_document_cannot_be_resampled_otherwise() -> None:
    scores, _ = xsum_metrics.score(REFERENCES, OUTPUTS, per_batch=1)
    assert rounded(scores, "batches of 1") == pytest.approx(MEAN, abs=1e-4)


def test_the_seed_decides_the_batches_and_the_callers_generator_goes_on() -> None:
    np.random.seed(3)
    expected = np.random.random(2)
    np.random.seed(3)
    first = np.random.random()
    one, same, other = (xsum_metrics.score(REFERENCES, OUTPUTS, 5, seed)[0] for seed in (0, 0, 1))
    assert one == same != other
    assert [first, np.random.random()] == list(expected)


def test_scores_by_hand() -> None:
    """Stems "jump" and "dog" of three words and of two: precision 1, recall 2/3; no pair of neighbours in common."""
    scores, _ = xsum_metrics.score(["Dogs are jumping"], ["dog jumps"])
    assert scores["ROUGE-1"]["documents"] == pytest.approx(80)
    assert scores["ROUGE-2"]["documents"] == 0
    assert scores["ROUGE-L"]["documents"] == pytest.approx(80)
    scores, _ = xsum_metrics.score(["a b c"], ["c b a"])
    assert scores["ROUGE-1"]["documents"] == pytest.approx(100)
    assert scores["ROUGE-L"]["documents"] == pytest.approx(100 / 3)


def test_identical_texts_score_100_and_empty_ones_0() -> None:
    scores, _ = xsum_metrics.score(REFERENCES, REFERENCES, per_batch=2)
    assert all(value == pytest.approx(100) for values in scores.values() for value in values.values())
    scores, _ = xsum_metrics.score(REFERENCES, [""] * 5, per_batch=2)
    assert all(value == 0 for values in scores.values() for value in values.values())


def test_a_folder_holds_the_test_sets_references(tmp_path: Path) -> None:
    assert xsum_metrics.references_file(tmp_path) == tmp_path / "test.target"
    assert xsum_metrics.references_file(tmp_path / "val.target") == tmp_path / "val.target"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(Refusal, match=r"rouge_score.*; pip install rouge-score"):
        xsum_metrics.score(REFERENCES, OUTPUTS)
