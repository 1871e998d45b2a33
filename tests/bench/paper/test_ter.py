"""bench/paper/ter.py: edits that TERCOM 0.7.25 counts, cases worked out by hand, properties."""

import random

import pytest

from bench.paper import ter

# hypothesis, reference, edits that the program prints (option -o ter): each is one that a search a little different
# from TERCOM's counts otherwise
TERCOM = [
    # a shift that saves no more than it costs is made, if it is the first, and opens the way to others
    ("d f h a", "h f a d", 2),
    ("g g a c", "a g c g", 2),
    # of equal shifts the longest block first, then the first found
    ("d e a b b d", "b d b a e b", 3),
    ("c e c e a a", "a c e a c e", 2),
    # a block may move only from where it is wrong to where it is missing, and not into itself
    ("e d e h f i c", "h e d c i e c", 3),
    ("a b f d e d f", "d f a f d f e", 4),
    ("a c b a c c", "c b c a c a", 2),
    ("g c c a c d", "c g a b a d", 4),
    ("g c h b a", "g a g c h", 3),
    ("a a b b b a b a a a a a b", "b b b b a a a a b b a a a", 3),
    # of equal alignments a pair goes before a word of the hypothesis, and that before one of the reference
    ("d d h b", "g b d d", 2),
    ("f d h b", "b f h d", 3),
    ("c c a a c a", "c a c c a a", 1),
    ("g f a", "a f g", 2),
    # where a block lands: before the reference's first word, behind the last one of its own
    ("a f d", "f d a", 1),
    ("b f e", "f e b", 1),
    # blocks have 10 words at most
    ("i w u e n d t m a v c r b k q g l x o z h j", "b k q g l x o z h j i w u e n d t m a v c r", 1),
    ("a b c d e f g h i j k l m n o p q r s t u v", "l m n o p q r s t u v a b c d e f g h i j k", 2),
    # the beam: two words at the end of 26 are found too late, three at the end of 24 in time
    ("a k", "r l m y f n x p b i 2 0 o c d 1 z j q v s u t a k", 25),
    ("l a i", "r g y 1 e z p d 0 m w k t f q n x j b u v l a i", 21),
    ("x j d", "l k o 1 c g 0 t w 2 a u r m f p q e y s i n x j d", 25),
    ("z 1 f j 2 g", "b n 0 m g h v a y i l 3 c p w q e s x o 4 d z 1 f j 2", 24),
    ("z 1 d i m", "m y x 2 g k f n q j o e w t 3 b p v 0 s u a z 1 d i", 25),
]


def edits(hypothesis: str, reference: str) -> int:
    return ter.edits(tuple(hypothesis.split()), tuple(reference.split()))


@pytest.mark.parametrize(("hypothesis", "reference", "expected"), TERCOM)
def test_edits_are_those_that_tercom_counts(hypothesis: str, reference: str, expected: int) -> None:
    assert edits(hypothesis, reference) == expected


@pytest.mark.parametrize(("by", "to_front", "expected"), [(49, 1, 1), (50, 1, 2), (50, 0, 1), (51, 0, 2)])
def test_a_block_moves_by_some_fifty_words_at_most(by: int, to_front: bool, expected: int) -> None:
    """As TERCOM counts; to the front it is a word less."""
    line = [f"w{i}" for i in range(by + 3)]
    moved = " ".join([*line[1 : by + 1], line[0], *line[by + 1 :]])
    assert (edits(moved, " ".join(line)) if to_front else edits(" ".join(line), moved)) == expected


def test_edits_by_hand() -> None:
    assert edits("a b c", "a b c") == 0
    assert edits("a x c", "a b c") == 1
    assert edits("a c", "a b c") == 1
    assert edits("a b b c", "a b c") == 1
    assert edits("", "a b c") == 3
    assert edits("a b c", "x") == 3
    assert edits("c d a b", "a b c d") == 1  # one block, however long
    assert edits("c d x b a", "a b c d") == 3  # not four: the block, a word too many and two in the wrong order


def test_the_nearest_reference_counts_and_the_mean_length() -> None:
    counts = ter.statistics([[["a", "b"], ["a", "b", "c", "d"]], [["e"]]], [["a", "b"], ["f"]])
    assert counts == [(0, 3.0), (1, 1.0)]
    assert ter.together(counts) == 1 / 4


def test_edits_lie_between_the_difference_in_length_and_the_edit_distance() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abcd", k=rng.randrange(1, 9))) for _ in range(2))
        apart = abs(len(a) - len(b))
        found = edits(" ".join(a), " ".join(b))
        assert apart <= found <= levenshtein(a, b), (a, b)
        assert (found == 0) == (a == b), (a, b)


def test_distance_in_whole_columns_is_that_of_the_table() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a, b = (tuple(rng.choices("abc", k=rng.randrange(1, 9))) for _ in range(2))
        search = ter._Search(b)
        assert search.distance(a) == levenshtein("".join(a), "".join(b))
        assert alike(search, a, search.paths(a)) == alike(search, a, search.paths_in_beam(a)), (a, b)


def alike(search: ter._Search, words: tuple[str, ...], paths: ter._Paths) -> tuple[int, list[tuple[int, int, int]]]:
    return paths.distance, list(search.steps(words, paths))


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
