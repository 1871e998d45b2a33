"""BLEU-4 and NIST-5 as the official E2E scripts count them (a Python port of mteval-v13a).

Both are taken over lower-cased mteval-v13a tokens, from sacrebleu. A hypothesis of m tokens adds m - n + 1 to the
number of n-grams, even where that is negative, and an empty one counts as one token that matches nothing: the port
does so. On E2E it changes nothing; texts of fewer than four tokens throughout can score above 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_split = Tokenizer13a()
Tokens = Sequence[str]


def mteval_tokens(text: str) -> list[str]:
    return _split(text).lower().split() or [""]


def _totals(hypotheses: Sequence[Tokens], order: int) -> list[int]:
    """Number of n-grams in the hypotheses for n = 1 .. order, by the port's count."""
    tokens = sum(map(len, hypotheses))
    return [tokens - n * len(hypotheses) for n in range(order)]


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
    """BLEU in [0, 1]: sacrebleu's matches and closest reference lengths, the port's totals and smallest precision."""
    most = max(map(len, references))
    columns: list[Any] = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    counted = BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True).corpus_score(hypotheses, columns)
    totals = _totals([mteval_tokens(h) for h in hypotheses], 4)
    # the port's floors: without a match the score is not 0, only nearly
    logs = [math.log(max(hits, 1e-15) / max(total, 1e-9)) for hits, total in zip(counted.counts, totals, strict=True)]
    return math.exp(min(0.0, 1 - counted.ref_len / totals[0]) + sum(logs) / 4)


def _ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def nist(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
    """NIST-5 (Doddington 2002): matched n-grams weighted by the bits their last word adds, given those before it.

    A match may come from any reference of the instance; the length penalty compares with their mean length. nltk's
    ``corpus_nist`` takes the one best reference instead, and so scores lower.
    """
    refs = [[mteval_tokens(text) for text in texts] for texts in references]
    hyps = [mteval_tokens(text) for text in hypotheses]
    seen: Counter[tuple[str, ...]] = Counter({(): sum(len(tokens) for texts in refs for tokens in texts)})
    hits: Counter[tuple[str, ...]] = Counter()
    for texts, hypothesis in zip(refs, hyps, strict=True):
        for n in range(1, 6):
            allowed: Counter[tuple[str, ...]] = Counter()
            for tokens in texts:
                found = _ngrams(tokens, n)
                seen.update(found)
                allowed |= found
            hits.update(_ngrams(hypothesis, n) & allowed)
    bits = [0.0] * 6
    for gram, count in hits.items():
        bits[len(gram)] += count * math.log2(seen[gram[:-1]] / seen[gram])
    totals = _totals(hyps, 5)
    information = sum(b / total for b, total in zip(bits[1:], totals, strict=True) if total > 0)
    ratio = totals[0] / sum(sum(map(len, texts)) / len(texts) for texts in refs)
    beta = math.log(0.5) / math.log(1.5) ** 2  # halves the score of a system that says two thirds
    return information * math.exp(beta * math.log(min(ratio, 1.0)) ** 2)
