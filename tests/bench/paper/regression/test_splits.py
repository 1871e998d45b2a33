"""The proofs' sequences: where error over loss falls, and where it stays."""

from itertools import pairwise

import pytest

from bench.paper.regression import splits

ROWS = splits.rows()


def ratios(words: str) -> list[list[tuple[int, float]]]:
    names = dict.fromkeys(row["sequence"] for row in ROWS if words in row["sequence"])
    assert names, words
    return [[(row["n"], row["ratio"]) for row in ROWS if row["sequence"] == name] for name in names]


def test_separate_values_apart_make_error_over_loss_fall_as_1_over_n() -> None:
    for sequence in ratios("4.1: values apart"):
        for (n, ratio), (more, less) in pairwise(sequence):
            assert ratio / less == pytest.approx(more / n, rel=0.1)


@pytest.mark.parametrize("words", ("4.2: prompts apart", "W the true one"))
def test_shared_prompts_apart_keep_error_over_loss(words: str) -> None:
    for sequence in ratios(words):
        values = [ratio for _, ratio in sequence]
        assert min(values) > 1e-3 and max(values) / min(values) < 1.1


def test_free_networks_have_the_true_function_at_a_loss() -> None:
    """Whatever the activation: the mean of two values is kept, and a network that is wide enough can do that."""
    for row in ROWS:
        if "W free" in row["sequence"]:
            assert row["error"] < 1e-15 and row["loss"] > 0.5e-2 / row["n"]
