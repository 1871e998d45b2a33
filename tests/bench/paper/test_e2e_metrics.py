"""bench/paper/e2e_metrics.py: the official example, cases worked out by hand, the tokenizer, bad input."""

import csv
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.paper import caption_metrics, e2e_metrics, meteor, ngram_metrics, ptb_tokenize
from bench.paper.runs import Refusal
from bench.paper.text_files import read_outputs
from tests.data_folder import data_path

OFFICIAL = {"BLEU": 0.7203, "NIST": 7.7889, "METEOR": 0.4801, "ROUGE_L": 0.7910, "CIDEr": 2.3039}


@pytest.fixture
def example() -> tuple[list[list[str]], list[str]]:
    references = data_path("metrics", "e2e_example", "devel-conc.txt")
    hypotheses = data_path("metrics", "e2e_example", "baseline-output.txt")
    read = e2e_metrics.read_references(references)
    return read, read_outputs(hypotheses, references, len(read))


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds to start, and most tests do not ask for it."""
    monkeypatch.setattr(meteor, "missing", lambda: "switched off")


# --- the official example


@pytest.mark.usefixtures("without_java")
def test_example_has_the_official_scores(example: tuple[list[list[str]], list[str]]) -> None:
    scores = e2e_metrics.score(*example)
    found = {metric: round(scores[metric], 4) for metric in OFFICIAL if metric != "METEOR"}
    assert found == {metric: value for metric, value in OFFICIAL.items() if metric != "METEOR"}


def test_meteor_is_its_formula_on_exact_matches_and_official_on_the_example(
    request: pytest.FixtureRequest,
) -> None:
    if reason := meteor.missing():
        pytest.skip(f"METEOR: {reason}")
    mean = 1 * (2 / 3) / (0.85 * 1 + 0.15 * 2 / 3)  # alpha 0.85, precision 1, recall 2/3
    penalty = 0.6 * (1 / 2) ** 0.2  # gamma 0.6, beta 0.2, one chunk of two matches
    with meteor.running() as program:  # once for both, since it is slow to start
        tiny = meteor.converse(program, [[["dog", "cat", "bird"]]], [["dog", "cat"]])
        assert tiny == pytest.approx(mean * (1 - penalty))
        references, hypotheses = request.getfixturevalue("example")  # may skip, once the formula has been seen to hold
        refs = [[ptb_tokenize.tokenize(text) for text in texts] for texts in references]
        found = meteor.converse(program, refs, [ptb_tokenize.tokenize(text) for text in hypotheses])
    assert round(found, 4) == OFFICIAL["METEOR"]


# --- by hand


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
    return ngram_metrics.bleu(references, hypotheses)


def test_bleu_is_the_geometric_mean_of_clipped_precisions() -> None:
    assert bleu([["a b c d f"]], ["a b c d e"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # "a" counts twice at most, the most that one reference has: 4 of 5, then (a a) (a b) (b c) = 3 of 4, 2 of 3, 1 of 2
    assert bleu([["a a b c", "a x"]], ["a a a b c"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_takes_the_closest_length_and_of_two_the_shorter() -> None:
    assert bleu([["a b c d e f"]], ["a b c d"]) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu([["a b c d e f", "x y z"]], ["a b c d"]) == pytest.approx(1.0)
    assert bleu([["a b c d e", "x y z"]], ["a b c d"]) == pytest.approx(1.0)


def test_bleu_ignores_case_and_splits_as_mteval_does() -> None:
    assert bleu([["hello , world 1.5 family-friendly ( ok ) ."]], ["Hello, World 1.5 family-friendly (OK)."]) == 1.0


def test_bleu_counts_as_the_official_port_where_a_text_is_short_or_nothing_matches() -> None:
    # one token has 1, 0, -1, -2 n-grams there: totals 7, 5, 3, 1 for matches 7, 5, 4, 3
    assert bleu([["a"], ["a b c d e f"]], ["a", "a b c d e f"]) == pytest.approx((4 / 3 * 3) ** 0.25)
    assert bleu([["a b c d"]], ["w x y z"]) == pytest.approx((1e-60 / 24) ** 0.25, rel=1e-9, abs=0)
    # the empty text is one token: 5 tokens for a reference length of 1 + 4
    totals = 5 * 3 * 1 * 1e-9
    assert bleu([["q"], ["a b c d"]], ["", "a b c d"]) == pytest.approx((4 * 3 * 2 * 1 / totals) ** 0.25)


def test_nist_weighs_a_match_by_its_bits() -> None:
    # 4 reference tokens: a twice (log2 4/2 = 1 bit), b and c once (2 bits); after a, c is log2 2/1 = 1 bit more
    assert ngram_metrics.nist([["a b", "a c"]], ["a c b"]) == pytest.approx((1 + 2 + 2) / 3 + 1 / 2)
    # two thirds of the reference's length halve the score; b after a is certain: 0 bits
    assert ngram_metrics.nist([["a b c"]], ["a b"]) == pytest.approx(0.5 * math.log2(3))
    # the mean length of the references counts: (2 + 4) / 2 = 3, and 6 tokens in all
    assert ngram_metrics.nist([["a b", "c d e f"]], ["a b"]) == pytest.approx(0.5 * math.log2(6))
    assert ngram_metrics.nist([["a b c"]], [""]) == 0.0


def rouge(references: Sequence[str], hypothesis: str) -> float:
    return caption_metrics.rouge_l([[r.split() for r in references]], [hypothesis.split()])


def test_rouge_takes_precision_and_recall_from_whichever_reference_is_best() -> None:
    assert rouge(["a b c d e"], "a c e") == pytest.approx(2.44 * 0.6 / (0.6 + 1.44))  # precision 1, recall 3/5
    assert rouge(["a b c d e", "a c"], "a c e") == pytest.approx(1.0)  # precision of the first, recall of the second
    assert rouge(["a b"], "c") == 0.0
    assert rouge(["a b"], "") == 0.0
    assert caption_metrics.rouge_l([[["a"]], [["b"]]], [["a"], ["c"]]) == 0.5


def cider(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
    return caption_metrics.cider([[r.split() for r in refs] for refs in references], [h.split() for h in hypotheses])


def test_cider_is_a_cosine_over_four_orders() -> None:
    # each word stands in one instance of two, so all weigh log 2
    same = (1 + 1 + 0 + 0) / 4  # "a b" has no 3-grams
    half = 1 / math.sqrt(2) * math.exp(-1 / 72) / 4  # "c" for "c d": one word of two, no 2-gram, one token short
    assert cider([["a b"], ["c d"]], ["a b", "c"]) == pytest.approx(10 * (same + half) / 2)
    assert cider([["a b", "x"], ["c d"]], ["a b", "q"]) == pytest.approx(10 * same / 2 / 2)  # mean of two references
    # "c c" for "c d": the weight 2 is cut to 1, its norm is not: 1 * 1 / (2 * sqrt 2)
    assert cider([["a b"], ["c d"]], ["q", "c c"]) == pytest.approx(10 * 1 / (2 * math.sqrt(2)) / 4 / 2)


def test_cider_gives_nothing_for_words_of_every_instance() -> None:
    assert cider([["a b"], ["a c"]], ["a", "a"]) == 0.0
    assert cider([["a b c d e"]], ["a b c d e"]) == 0.0
    assert cider([["a b"], ["c d"]], ["", ""]) == 0.0


# --- the tokenizer: right sides as the Java program prints them, punctuation removed

TOKENS = {
    "A family-friendly pub. It's cheap!": "a family-friendly pub it 's cheap",
    "It isn't near the kids' area, they cannot say": "it is n't near the kids area they can not say",
    "the city centre.It is": "the city centre.it is",
    "word,word food,low-priced 1,000 area near,low-priced": "word word food,low-priced 1,000 area near,low-priced",
    "£20-£25, €30 and more than£30 (20%)": "# 20 # 25 $ 30 and more than # 30 -lrb- 20 % -rrb-",
    "rating:5 -25 5+ 3.5/5 1/2 3-star": "rating :5 -25 5 + 3.5 / 5 1/2 3-star",
    "hors d'oeuvres at five o'clock": "hors d'oeuvres at five o'clock",
    "e.g. p.m. The U.S. is St. James etc.": "e.g. p.m. the u.s. is st. james etc.",
    "plan B. It was J. Smith approx. no. 5": "plan b it was j. smith approx no. 5",
    "hit or miss. Miss. city center., near": "hit or miss miss. city center. near",
    "\u201cRock\u201d isn\u2019t -- café\u2019s \u2026 AT&T and/or": "rock is n't café 's at&t and/or",
    "what?! No... ok": "what ?! no ok",
    "": "",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_those_of_the_treebank_program(text: str) -> None:
    assert " ".join(ptb_tokenize.tokenize(text)) == TOKENS[text]


def test_tokens_of_the_e2e_references_equal_the_java_program(tmp_path: Path) -> None:
    table = data_path("e2e", "testset_w_refs.csv")
    jar = next(meteor._jar().parents[1].glob("tokenizer/stanford-corenlp-*.jar"), None) if meteor._jar() else None
    if jar is None or not shutil.which("java"):
        pytest.skip("the Java tokenizer needs java on the PATH and the package pycocoevalcap")
    with open(table, encoding="utf-8", newline="") as file:
        texts = [row["ref"].replace("\n", " ") for row in csv.DictReader(file)]
    (tmp_path / "texts").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = ["java", "-Dfile.encoding=UTF-8", "-XX:+UseSerialGC", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(tmp_path / "texts")]
    printed = subprocess.run(command, capture_output=True, check=True).stdout.decode().splitlines()
    assert len(printed) == len(texts) == 4693
    differing = [
        (text, line)
        for text, line in zip(texts, printed, strict=True)
        if [t for t in line.split() if t not in ptb_tokenize.PUNCTUATION] != list(ptb_tokenize.tokenize(text))
    ]
    assert differing == []


# --- what is missing, what is wrong


def test_without_java_meteor_alone_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    scores = e2e_metrics.score([["a b c d"], ["e f g"]], ["a b c d", "e f g"])
    assert [metric for metric in e2e_metrics.METRICS if scores[metric] is None] == ["METEOR"]
    assert "no java on the PATH" in scores["notes"][2] or "meteor-1.5.jar is not here" in scores["notes"][2]


def test_without_the_package_meteor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps pycocoevalcap" in (meteor.missing() or "")


@pytest.mark.usefixtures("without_java")
def test_without_sacrebleu_the_caption_metrics_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bench.paper.ngram_metrics", None)
    monkeypatch.delattr("bench.paper.ngram_metrics")
    scores = e2e_metrics.score([["a b c d"], ["e f g"]], ["a b c d", "e f g"])
    assert scores["BLEU"] is None and scores["NIST"] is None and scores["ROUGE_L"] == 1.0
    assert all("pip install sacrebleu" in note for note in scores["notes"][:2])


@pytest.mark.usefixtures("without_java")
def test_without_the_captioning_scripts_the_others_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.rouge.rouge", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    scores = e2e_metrics.score([["a b c d"], ["e f g"]], ["a b c d", "e f g"])
    assert scores["BLEU"] == 1.0 and scores["ROUGE_L"] is None and scores["CIDEr"] is None
    assert all("pip install --no-deps pycocoevalcap" in note for note in scores["notes"][3:])


def test_the_notes_say_what_computed_each_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "missing", lambda: None)
    monkeypatch.setattr(meteor, "meteor", lambda references, hypotheses: 0.25)
    scores = e2e_metrics.score([["a b"]] * 2, ["a b", "c"])
    assert scores["METEOR"] == 0.25
    assert [note.split(":")[0] for note in scores["notes"]] == list(e2e_metrics.METRICS)
    for word, note in zip(
        ("sacrebleu", "own code", "METEOR 1.5 (Java)", "pycoco", "pycoco"), scores["notes"], strict=True
    ):
        assert word in note


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'no room for the heap' >&2; exit 1", "no room for the heap"),
        ("while read line; do echo nonsense; echo nonsense; done", "could not convert string to float: 'nonsense"),
    ],
    ids=["ends", "babbles"],
)
def test_a_failing_java_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(meteor, "missing", lambda: None)
    scores = e2e_metrics.score([["a b"]] * 2, ["a b", "c"])
    assert scores["METEOR"] is None
    assert scores["notes"][2].startswith(f"METEOR: not computed: METEOR's Java program failed: {said}")


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([["a"], ["b"]], ["a"], r"hypotheses has 1 texts for 2 references, expected one each"),
        ([], [], r"hypotheses has 0 texts for 0 references"),
        (["a"], ["a"], r"references\[0\] is 'a', expected a list of one text or more"),
        ([["a"], []], ["a", "b"], r"references\[1\] is \[\], expected a list of one text or more"),
        ([["a", " "]], ["a"], r"references\[0\]\[1\] is ' ', expected a text that is not blank"),
        ([["a"]], [None], r"hypotheses\[0\] is None, expected a text"),
    ],
)
def test_score_refuses_in_words(references: list[list[str]], hypotheses: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        e2e_metrics.score(references, hypotheses)


def test_one_reference_a_line_needs_no_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "refs").write_text("a b\nc d\n")
    assert e2e_metrics.read_references(tmp_path / "refs") == [["a b"], ["c d"]]


# --- the challenge's table


def test_neighbouring_rows_of_the_table_with_one_record_are_an_instance(tmp_path: Path) -> None:
    table = tmp_path / "testset_w_refs.csv"
    table.write_bytes(
        b'\xef\xbb\xbf"MR","ref"\r\nname[A],"One, two."\r\nname[A],Three\r\n\r\nB, C\r\nname[A], four \r\n'
    )
    assert e2e_metrics.read_references(table) == [["One, two.", "Three"], ["C"], ["four"]]
    assert e2e_metrics.references_file(tmp_path, tmp_path / "outputs.txt") == table


def test_the_test_sets_table_has_630_instances() -> None:
    references = e2e_metrics.read_references(data_path("e2e", "testset_w_refs.csv"))
    assert (len(references), sum(map(len, references))) == (630, 4693)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", r"t\.csv:1: expected the columns mr and ref, found 'a,b'"),
        ("mr,ref\n", r"t\.csv: no rows after the header"),
        ("mr,ref\na,b\nc\n", r"t\.csv:3: expected 2 columns, found 1"),
        ("mr,ref\na, \n", r"t\.csv:2: the reference is blank"),
        ('mr,ref\na,"b" c\n', r"t\.csv:2: "),
        ('mr,ref\na,b\na,"c\n', r"t\.csv:3: unexpected end of data"),
    ],
)
def test_a_malformed_table_is_refused_with_its_row(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(Refusal, match=message):
        e2e_metrics.read_references(tmp_path / "t.csv")


def test_a_folder_without_the_table_must_hold_one_text_file_beside_the_outputs(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs.txt"
    outputs.write_text("a")
    with pytest.raises(Refusal, match=r"expected .* one \.txt of references, and found none; name the file"):
        e2e_metrics.references_file(tmp_path, outputs)
    (tmp_path / "references.txt").write_text("a")
    assert e2e_metrics.references_file(tmp_path, outputs) == tmp_path / "references.txt"
    with pytest.raises(Refusal, match=r"found outputs\.txt, references\.txt; name the file"):
        e2e_metrics.references_file(tmp_path, tmp_path / "elsewhere.txt")
