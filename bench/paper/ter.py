"""Translation edit rate (Snover et al. 2006) by the search of TERCOM 0.7.25, edit for edit, without Java.

The fewest edits cannot be had in reasonable time where blocks of words may move, so a text's score is what TERCOM
finds: which blocks it tries, in which order, and where it stops looking are part of the metric. sacrebleu's TER looks
elsewhere. Of WebNLG's 1,862 outputs of one system it gives five another count (.32316 seen and .44127 unseen, where
TERCOM prints .32312 and .44137), of texts that are the end of a reference a fifth; and it takes ten times as long.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Tokens = Sequence[str]
Words = tuple[str, ...]

LONGEST = 10  # words in a block that moves
FARTHEST = 50  # words that it moves by
BEAM = 20  # edits by which the beginning of an alignment may be behind the best one
PAIR, ALONE, MISSED = range(3)  # steps of an alignment: two words, one of the hypothesis, one of the reference


def statistics(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> list[tuple[int, float]]:
    """Edits that lead to the nearest reference, and the references' mean length, of each instance.

    A hypothesis may have no words; each has one reference or more, and those have words.
    """
    return [
        (min(edits(tuple(hypothesis), tuple(ref)) for ref in refs), sum(map(len, refs)) / len(refs))
        for refs, hypothesis in zip(references, hypotheses, strict=True)
    ]


def together(counts: Sequence[tuple[int, float]]) -> float:
    """The rate of the instances that have these statistics: edits a word, 0 and up."""
    return sum(edits for edits, _ in counts) / sum(words for _, words in counts)


def edits(hypothesis: Words, reference: Words) -> int:
    """Words inserted, deleted and replaced, and blocks of words moved: one edit each, whatever a block's length."""
    search = _Search(reference)
    words, moves = hypothesis, 0
    while moved := search.best_move(words):
        words, moves = moved, moves + 1
    return search.distance(words) + moves


class _Paths(NamedTuple):
    """The best way to each cell of the table of edit distances: an integer a column, bit i for word i of the reference.

    Of ways that are equally good a pair goes before a word of the hypothesis alone, and that before a missed one.
    """

    distance: int
    pairs: list[int]  # for each word of the hypothesis: the cells reached by pairing it
    alone: list[int]  # those reached by leaving it alone


class _Search:
    """Hypotheses against one reference."""

    def __init__(self, reference: Words) -> None:
        self.reference = reference
        self.rows = (1 << len(reference)) - 1
        self.bits: defaultdict[str, int] = defaultdict(int)  # where a word stands
        self.places: defaultdict[Words, list[int]] = defaultdict(list)  # where a block begins
        for start, word in enumerate(reference):
            self.bits[word] |= 1 << start
            for end in range(start + 1, min(start + LONGEST, len(reference)) + 1):
                self.places[reference[start:end]].append(start)
        self.known: dict[Words, int] = {}

    def best_move(self, words: Words) -> Words | None:
        """`words` after the move that leaves the fewest edits, None if none repays the one that it costs.

        Long blocks go first: TERCOM stops where shorter ones cannot do better than what has been found.
        """
        now = fewest = self.distance(words)
        best = None
        for length, moves in self.moves(words).items():
            for start, to in moves:
                saved = now - fewest
                if saved > 2 * length or (best and saved == 2 * length):
                    return best
                others = words[:start] + words[start + length :]
                moved = others[:to] + words[start : start + length] + others[to:]
                left = self.distance(moved) + 1
                if left < fewest or (left == fewest and not best):
                    best, fewest = moved, left
        return best

    def moves(self, words: Words) -> dict[int, list[tuple[int, int]]]:
        """(first word, place among the other words) of the blocks to try, by their length, long ones first.

        A block must occur in the reference, hold a word that is wrong where it is, and be missing where it goes to.
        """
        wrong, missed, beside = self.alignment(words)
        found: dict[int, list[tuple[int, int]]] = {length: [] for length in range(LONGEST, 0, -1)}
        for start in range(len(words)):
            for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
                if (block := words[start:end]) not in self.places:
                    break
                if not any(wrong[start:end]):
                    continue
                for place in self.places[block]:
                    if start <= beside[place] < end or abs(beside[place] - start) > FARTHEST:
                        continue
                    if any(missed[place : place + len(block)]):
                        found[len(block)] += [(start, to) for to in _landings(place, start, end, beside)]
        return found

    def alignment(self, words: Words) -> tuple[list[bool], list[bool], list[int]]:
        """Words without an equal, in the hypothesis and in the reference; where the reference's words stand.

        A word stands beside the one that it is paired with, or else the last one before it, -1 if there is none.
        """
        wrong, missed = [True] * len(words), [True] * len(self.reference)
        beside = [-1] * len(self.reference)
        for column, row, step in self.steps(words, self.paths(words)):
            if step == PAIR:
                wrong[column - 1] = missed[row - 1] = words[column - 1] != self.reference[row - 1]
            if step != ALONE:
                beside[row - 1] = column - 1
        return wrong, missed, beside

    def steps(self, words: Words, paths: _Paths) -> Iterator[tuple[int, int, int]]:
        """(words of the hypothesis, words of the reference, last step) along the best path, from its end."""
        column, row = len(words), len(self.reference)
        while column and row:
            bit = 1 << row - 1
            step = PAIR if paths.pairs[column - 1] & bit else ALONE if paths.alone[column - 1] & bit else MISSED
            yield column, row, step
            column, row = column - (step != MISSED), row - (step != ALONE)
        yield from ((left, 0, ALONE) for left in range(column, 0, -1))
        yield from ((0, left, MISSED) for left in range(row, 0, -1))

    def distance(self, words: Words) -> int:
        if words not in self.known:
            self.known[words] = self.paths(words).distance
        return self.known[words]

    def paths(self, words: Words) -> _Paths:
        """A column of the table in a dozen operations on integers (Hyyro 2003), while the beam hides nothing."""
        rows, bits = self.rows, self.bits
        more, less = rows, 0  # rows where the distance is one more, or less, than in the row above
        pairs, alone, falls = [], [], []
        for word in words:
            equal = bits.get(word, 0)
            same = equal | less
            same |= ((more & same) + more ^ more) & rows  # as one row and one column before
            grows = (less | ~(more | same)) & rows
            pairs.append(equal | ~same)
            alone.append(grows)
            grows = grows << 1 | 1
            more, less = ((more & same) << 1 | ~(grows | same)) & rows, grows & same
            falls.append(less)
        found = _Paths(len(words) + more.bit_count() - less.bit_count(), pairs, alone)
        return found if self.in_beam(words, found, falls) else self.paths_in_beam(words)

    def in_beam(self, words: Words, paths: _Paths, falls: Sequence[int]) -> bool:
        """Whether the best path, followed from its end, surely stays in the beam.

        `falls` are the rows of each column where the distance is less than in the row above.
        """
        if paths.distance <= BEAM or len(self.reference) <= BEAM:
            return True
        cost = paths.distance
        for column, row, step in self.steps(words, paths):
            least = column - falls[column - 1].bit_count() if column else 0  # no row of the column has less
            if 0 < column < len(words) and cost > least + BEAM:
                return False
            cost -= step != PAIR or words[column - 1] != self.reference[row - 1]
        return True

    def paths_in_beam(self, words: Words) -> _Paths:
        """The table, cell by cell: a column goes on from what is at most BEAM edits behind its best pair.

        The last column goes on from everything.
        """
        found = _Paths(0, [], [])
        costs: list[float] = list(range(len(self.reference) + 1))
        for left, word in zip(reversed(range(len(words))), words, strict=True):
            paired = [math.inf]
            paired += [cost + (word != other) for cost, other in zip(costs, self.reference, strict=False)]
            limit = min(paired) + BEAM if left else math.inf
            pairs = alone = 0
            above = math.inf
            for row, cost in enumerate(paired):
                fewest = min(cost, costs[row] + 1, above + 1)
                if fewest == cost:
                    pairs |= 1 << row
                elif fewest == costs[row] + 1:
                    alone |= 1 << row
                costs[row] = above = fewest if fewest <= limit else math.inf
            found.pairs.append(pairs >> 1)
            found.alone.append(alone >> 1)
        return found._replace(distance=int(costs[-1]))


def _landings(place: int, start: int, end: int, beside: Sequence[int]) -> Iterator[int]:
    """How many other words may stand before `words[start:end]`, which is in the reference at `place`.

    The block goes behind the word that stands beside the reference's word before it, or beside one of its own.
    """
    for at in range(place - 1, place + end - start):
        behind = beside[at] if at >= 0 else -1
        yield behind + 1 if behind < start else behind if behind < end else behind + 1 - (end - start)
