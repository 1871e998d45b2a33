"""ROUGE-L and CIDEr of the captioning scripts, by the package that has them, over the tokens of ptb_tokenize.py.

CIDEr is CIDEr-D (Vedantam et al. 2015), 0 to 10: an n-gram's weight depends on in how many instances' references it
stands, so the score of one instance alone is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

Tokens = Sequence[str]


def rouge_l(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """Mean F-score of the longest common subsequence; recall weighs 1.2 ** 2 times precision.

    Best precision and best recall may come from different references; that is the captioning scripts' reading.
    """
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*_spelled(references, hypotheses))[0])


def cider(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(*_spelled(references, hypotheses))[0])


def _spelled(
    references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """As the scripts take them: lists of sentences by instance."""
    said = {i: [" ".join(tokens)] for i, tokens in enumerate(hypotheses)}
    return {i: [" ".join(tokens) for tokens in refs] for i, refs in enumerate(references)}, said
