"""ROUGE-L and CIDEr as the captioning scripts compute them, over the tokens of ptb_tokenize.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[str]


def lcs_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence; each token of b updates a whole row of the table as one integer."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    row = full = (1 << len(a)) - 1  # a 0 in bit i: the length grows at a[i] (Hyyro 2004)
    for token in b:
        matched = row & places.get(token, 0)
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()


def rouge_l(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """Mean F-score of the longest common subsequence; recall weighs 1.2 ** 2 times precision.

    Best precision and best recall may come from different references; that is the captioning scripts' reading.
    """
    weight = 1.2**2
    total = 0.0
    for refs, hypothesis in zip(references, hypotheses, strict=True):
        said = hypothesis or ("",)  # no token counts as one empty token, in the scripts and here
        common = [(lcs_length(ref or ("",), said), len(ref or ("",))) for ref in refs]
        precision = max(length / len(said) for length, _ in common)
        recall = max(length / size for length, size in common)
        if precision and recall:
            total += (1 + weight) * precision * recall / (recall + weight * precision)
    return total / len(hypotheses)


def _grams(tokens: Tokens) -> list[Counter[tuple[str, ...]]]:
    """Counts of 1-grams to 4-grams."""
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, 5)]


def cider(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """CIDEr-D (Vedantam et al. 2015), which the captioning scripts call CIDEr: 0 to 10.

    Cosine of tf-idf vectors, each weight of the hypothesis cut to the reference's, times a Gaussian (sigma 6) of the
    difference in length; mean over n = 1 .. 4, references and instances. An n-gram's idf counts the instances
    in whose references it stands, so the score of one instance alone is 0.
    """
    counts = [[_grams(tokens) for tokens in refs] for refs in references]
    instances: Counter[tuple[str, ...]] = Counter()
    for refs in counts:
        instances.update({gram for grams in refs for order in grams for gram in order})

    def weighted(order: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], float]:
        vector = {gram: n * math.log(len(references) / max(1, instances[gram])) for gram, n in order.items()}
        return vector, math.sqrt(sum(w * w for w in vector.values()))

    total = 0.0
    for refs, hypothesis in zip(counts, hypotheses, strict=True):
        said = [weighted(order) for order in _grams(hypothesis)]
        similar = 0.0
        for grams in refs:
            # the scripts measure length in 2-grams, which tells no token from one token
            gap = max(0, len(hypothesis) - 1) - grams[1].total()
            near = math.exp(-gap * gap / 72)
            for (vector, norm), (other, other_norm) in zip(said, map(weighted, grams), strict=True):
                if norm and other_norm:
                    dot = sum(min(w, other[gram]) * other[gram] for gram, w in vector.items() if gram in other)
                    similar += near * dot / (norm * other_norm)
        total += similar / 4 / len(refs)
    return 10 * total / len(hypotheses)
