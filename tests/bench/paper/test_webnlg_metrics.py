"""bench/paper/webnlg_metrics.py: what the challenge's scripts print, cases by hand, properties, bad input."""

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bench.paper import meteor, ter, webnlg_metrics
from bench.paper.runs import Refusal
from bench.paper.text_files import read_outputs
from tests.data_folder import data_path

# printed by multi-bleu.perl -lc and TERCOM 0.7.25 for DART's bart-large_output.txt, three references
BLEU = {"seen": "64.51", "unseen": "50.20", "all": "58.06"}
TER = {"seen": 0.3231189061656102, "unseen": 0.44136680683907, "all": 0.3773335129206668}
# printed by meteor-1.5.jar -l en -norm -r 3 for the first 30 seen and the first 20 unseen entries
METEOR = {"seen": 0.6117387938704277, "unseen": 0.47897278644730573, "all": 0.5599191910115243}

Parts = Mapping[str, Sequence[webnlg_metrics.Entry]]


@pytest.fixture
def example() -> tuple[Parts, list[str]]:
    folder = data_path("metrics", "webnlg2017", "references")
    references = webnlg_metrics.read_references(folder)
    return references, read_outputs(data_path("metrics", "webnlg2017", "bart-large_output.txt"), folder, 1862)


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds to start, and most tests do not ask for it."""
    monkeypatch.setattr(meteor, "missing", lambda: "switched off")


# --- the official scripts


@pytest.mark.usefixtures("without_java")
def test_example_has_the_official_scores(example: tuple[Parts, list[str]]) -> None:
    scores, notes = webnlg_metrics.score(*example)
    assert {part: f"{value:.2f}" for part, value in scores["BLEU"].items()} == BLEU
    assert scores["TER"] == pytest.approx(TER, rel=1e-13)
    assert scores["METEOR"] == dict.fromkeys(BLEU) and notes["METEOR"] == "not computed: switched off"


def test_the_first_entries_have_the_official_meteor(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if reason := meteor.missing():
        pytest.skip(f"METEOR: {reason}")
    references, outputs = request.getfixturevalue("example")
    first = {"seen": references["seen"][:30], "unseen": references["unseen"][:20]}
    monkeypatch.setattr(ter, "statistics", lambda *texts: [(0, 1.0)] * 50)
    scores, notes = webnlg_metrics.score(first, outputs[:30] + outputs[971:991])
    assert scores["METEOR"] == METEOR
    assert notes["METEOR"].startswith("METEOR 1.5 (Java)")


def test_both_parts_are_all_categories_and_the_lex_files_hold_what_the_others_do() -> None:
    folder = data_path("metrics", "webnlg2017", "references")
    parts = webnlg_metrics.read_references(folder)
    assert {part: len(entries) for part, entries in parts.items()} == {"seen": 971, "unseen": 891}
    entries = [*parts["seen"], *parts["unseen"]]
    for i in range(webnlg_metrics.COUNTED):
        lines = (folder / f"gold-all-cat-reference{i}.lex").read_text().splitlines()
        assert lines == [entry[i] for entry in entries]
    lines = (folder / "gold-all-cat-reference-3ref.meteor").read_text().splitlines()
    assert lines == [text for entry in entries for text in entry]
    lines = (folder / "gold-all-cat-reference-3ref.ter").read_text().splitlines()
    assert lines == [f"{text} (id{i})" for i, entry in enumerate(entries, 1) for text in entry if text]


@pytest.mark.parametrize(
    ("hypotheses", "references", "printed"),
    [
        # the second hypothesis is nearer to a blank reference than to "a b c d", the third is as long as one
        (
            ["the dog ran home again today", "a", ""],
            [("the dog ran home today", "the dog ran back home again", ""), ("a b c d", "", ""), ("x y", "", "")],
            "60.43",
        ),
        (
            ["the cat sat on the mat", "yes"],
            [("the cat sat on the mat today", "a cat sat on the mat", ""), ("no one was ever there", "", "")],
            "96.22",
        ),
        (["a b c d e f", "a b"], [("a b c d e g", "", ""), ("a b c", "a b c d e f g", "")], "68.57"),
        (["a a a a a b"], [("a a b c d e", "a a a c", "")], "0.00"),
        (["a b c"], [("a b c", "", "")], "0.00"),
        (["a b c d e"], [("a b c d", "a b c d e f", "")], "100.00"),
    ],
)
def test_bleu_is_what_multi_bleu_prints(hypotheses: list[str], references: list[tuple[str, ...]], printed: str) -> None:
    assert f"{webnlg_metrics.bleu(references, hypotheses):.2f}" == printed


# --- by hand


def test_bleu_by_hand() -> None:
    assert webnlg_metrics.bleu([["a b c d f"]], ["a b c d e"]) == pytest.approx(
        100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )
    # "a" counts twice at most, the most that one reference has: 4 of 5, then (a a) (a b) (b c) = 3 of 4, 2 of 3, 1 of 2
    assert webnlg_metrics.bleu([["a a b c", "a x"]], ["a a a b c"]) == pytest.approx(
        100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )
    assert webnlg_metrics.bleu([["a b c d", ""], ["a b c d", ""]], ["a b c d", ""]) == pytest.approx(100)
    assert webnlg_metrics.bleu([["a b c d"]], [""]) == 0


def test_tokens_are_ascii_words_and_single_marks() -> None:
    assert webnlg_metrics.tokens("Adolfo Suárez\u2013Barajas's 18L/36R (3.5%) x_y") == (
        "adolfo suarez - barajas ' s 18l / 36r ( 3 . 5 % ) x_y".split()
    )
    assert webnlg_metrics.tokens(" İ \u2028 “No”  \u200b") == ["i", '"', "no", '"']
    assert webnlg_metrics.tokens("") == []


# --- properties


@pytest.mark.usefixtures("without_java")
def test_a_first_reference_scores_best_and_its_case_and_accents_do_not_matter() -> None:
    references = {
        "seen": [("the cafe of zurich is old .", "zurich has an old cafe .", "")],
        "unseen": [("a b c d e",) * 3],
    }
    scores, _ = webnlg_metrics.score(references, ["The Café of Zürich is old.", "a b c d e"])
    assert scores["BLEU"] == pytest.approx(dict.fromkeys(BLEU, 100))
    assert scores["TER"] == dict.fromkeys(BLEU, 0)


@pytest.mark.usefixtures("without_java")
def test_the_order_of_references_does_not_matter() -> None:
    rng = random.Random(0)

    def text(least: int) -> str:
        return " ".join(rng.choices("abc", k=rng.randrange(least, 12)))

    entries = [(text(1), text(0), text(0)) for _ in range(40)]
    outputs = [text(0) for _ in range(40)]
    turned = [entry[1:] + entry[:1] for entry in entries]
    scores = [webnlg_metrics.score({"seen": e[:30], "unseen": e[30:]}, outputs)[0] for e in (entries, turned)]
    assert scores[0]["BLEU"] == pytest.approx(scores[1]["BLEU"])
    assert scores[0]["TER"] == pytest.approx(scores[1]["TER"])
    assert 0 < scores[0]["BLEU"]["all"] < 100


# --- what is missing, what is wrong


def test_without_a_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unidecode", None)
    with pytest.raises(Refusal, match=r"unidecode.*pip install unidecode"):
        webnlg_metrics.tokens("a")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(Refusal, match=r"sacrebleu.*pip install sacrebleu"):
        webnlg_metrics.bleu([("a", "", "")], ["a"])


def write_references(folder: Path, files: Mapping[str, str]) -> None:
    lines = {"old0": "a b\nc\n", "old1": "a\n\n", "old2": "b\n\n", "new0": "d\n", "new1": "e\n", "new2": "f\n"}
    for name, content in {**lines, **files}.items():
        (folder / f"gold-{name[:3]}-cat-reference{name[3:]}.lex").write_bytes(content.encode("latin-1"))


def test_references_may_have_any_line_end_and_a_mark(tmp_path: Path) -> None:
    write_references(tmp_path, {"old0": "\xef\xbb\xbfa b\r\nc\r\n", "new2": "f", "old2": "\nx\n"})
    assert webnlg_metrics.read_references(tmp_path) == {
        "seen": [("a b", "a", ""), ("c", "", "x")],
        "unseen": [("d", "e", "f")],
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"old0": "a b\n\n"}, r"gold-old-cat-reference0\.lex:2: blank, expected a text on each line"),
        ({"new1": "e\ng\n"}, r"new-cat-reference1\.lex:2: ends there; .*new-cat-reference0\.lex has 1 lines"),
        ({"old2": "\n\n\xff\n"}, r"gold-old-cat-reference2\.lex:3: not UTF-8 \(byte 0xff\)"),
    ],
)
def test_a_malformed_reference_file_is_refused_with_its_row(
    tmp_path: Path, files: Mapping[str, str], message: str
) -> None:
    write_references(tmp_path, files)
    with pytest.raises(Refusal, match=message):
        webnlg_metrics.read_references(tmp_path)


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"gold-old-cat-reference0\.lex: No such file or directory"):
        webnlg_metrics.read_references(tmp_path)
