"""ROUGE-1, ROUGE-2 and ROUGE-L of summaries, as XSUM's are scored in Prefix-Tuning's code: by the package rouge-score.

Scores are F of 100, words stemmed. The mean over documents is what can be compared. The published code takes of each
batch the median of 1,000 resampled means (BootstrapAggregator), rounds it to four digits and averages the batches. That
is random, and draws from a generator that the run has used, so that no number of it can be had again; here the
generator is seeded. The published code also cuts references to 100 tokens; here they are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.paper.packages import needed

METRICS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
SEED = 101  # the published run's


def references_file(place: Path) -> Path:
    """`place`, or the test set's references in the folder `place`."""
    return place / "test.target" if place.is_dir() else place


def score(
    references: Sequence[str], outputs: Sequence[str], per_batch: int | None = None, seed: int = SEED
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """For each metric the mean over documents, and the published mean over batches of `per_batch`; what computed them.

    An output may be empty; the reference of each is a text.
    """
    scorer = needed("rouge_score.rouge_scorer", "rouge-score").RougeScorer([*METRICS.values()], use_stemmer=True)
    scores = [scorer.score(ref, output) for ref, output in zip(references, outputs, strict=True)]
    found: dict[str, dict[str, float | None]] = {
        metric: {"documents": 100 * sum(score[key].fmeasure for score in scores) / len(scores)}
        for metric, key in METRICS.items()
    }
    note = f"rouge-score {version('rouge-score')}, words stemmed"
    if per_batch:
        for metric, value in _published(scores, per_batch, seed).items():
            found[metric][f"batches of {per_batch}"] = value
        note += f"; batches resampled from seed {seed}"
    return found, dict.fromkeys(METRICS, note)


def _published(scores: Sequence[dict[str, Any]], size: int, seed: int) -> dict[str, float]:
    scoring, random = needed("rouge_score.scoring", "rouge-score"), needed("numpy.random", "numpy")
    before = random.get_state()
    random.seed(seed)  # the package draws from numpy's one generator
    try:
        medians = []
        for start in range(0, len(scores), size):
            batch = scoring.BootstrapAggregator()
            for score in scores[start : start + size]:
                batch.add_scores(score)
            medians.append(batch.aggregate())
    finally:
        random.set_state(before)
    return {
        metric: sum(round(100 * float(median[key].mid.fmeasure), 4) for median in medians) / len(medians)
        for metric, key in METRICS.items()
    }
