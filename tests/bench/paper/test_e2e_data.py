"""E2E's files: linearised as Li and Liang's, refused in one line where they do not parse; and the generator."""

import hashlib
import http.client
import io
import os
from pathlib import Path

import pytest

from bench.paper import e2e_data, nlg
from bench.paper.runs import Refusal
from tests.support import ROOT

ROW = '"name[The Vaults], eatType[pub]",The Vaults is a pub.\n'


def e2e_folder() -> Path | None:
    places = [os.environ.get("PREFIXATTN_DATA"), ROOT.parent / "shared" / "data"]
    folders = [Path(place) / "e2e" for place in places if place] + [Path(place) for place in places if place]
    return next((folder for folder in folders if (folder / "src1_valid.txt").exists()), None)


needs_e2e = pytest.mark.skipif(
    e2e_folder() is None, reason="no E2E data with src1_valid.txt: set PREFIXATTN_DATA to a folder that holds e2e/"
)


@needs_e2e
@pytest.mark.parametrize(
    "csv_name, authors_name", [("devset.csv", "src1_valid.txt"), ("testset_w_refs.csv", "src1_test.txt")]
)
def test_linearises_as_the_authors_files(csv_name: str, authors_name: str) -> None:
    folder = e2e_folder()
    assert folder is not None
    ours = e2e_data.read_csv(folder / csv_name)
    lines = (folder / authors_name).read_text(encoding="utf-8").splitlines()
    theirs = [tuple(line.split("||")) for line in lines]
    assert len(ours) == len(theirs)
    assert [source for source, _ in ours] == [source for source, _ in theirs]  # 0 mismatches
    assert ["".join(text.split()) for _, text in ours] == ["".join(text.split()) for _, text in theirs]
    same = sum(a == " ".join(b.split()) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert same >= 0.98 * len(ours), f"{len(ours) - same} of {len(ours)} references are spaced differently"


@needs_e2e
def test_reads_all_of_e2e() -> None:
    data = e2e_data.load(str(e2e_folder()))
    assert (len(data.train), len(data.dev), len(data.test)) == (42_061, 4_672, 4_693)
    assert [len(e2e_data.grouped(split)[0]) for split in (data.train, data.dev, data.test)] == [4_862, 547, 630]


def test_linearises_keys_and_prices() -> None:
    mr = "name[Alimentum], eatType[pub], priceRange[less than £20], customer rating[3 out of 5], familyFriendly[no]"
    expected = "name : Alimentum | Type : pub | price : less than £ 20 | customer rating : 3 out of 5"
    assert e2e_data.linearise(mr) == expected + " | family friendly : no"
    assert e2e_data.linearise("priceRange[£20-25],near[Café Rouge]") == "price : £ 20 - 25 | near : Café Rouge"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It's family-friendly, at £20-25.", "It 's family - friendly , at £ 20 - 25 ."),
        ("They don't (yet)  cannot", "They do n't ( yet ) can not"),
        ("'Cotto' by the river.Try it!", "' Cotto ' by the river . Try it !"),
    ],
)
def test_sets_punctuation_apart(text: str, expected: str) -> None:
    assert e2e_data.tokenise(text) == expected


FIELD = 131_000  # characters: csv takes no longer field


@pytest.mark.parametrize(
    "word, tokens",
    [
        ("!" * FIELD, ["!"] * FIELD),
        ("'" * FIELD + "a", ["'"] * FIELD + ["a"]),
        ("a" + "'s" * (FIELD // 2), ["a"] + ["'s"] * (FIELD // 2)),
        ("." * FIELD + "a" + "." * FIELD, ["." * FIELD, "a", "." * FIELD]),
        ("a" * FIELD + "n't", ["a" * FIELD, "n't"]),
        ("..!" * (FIELD // 3), ["..", "!"] * (FIELD // 3)),
    ],
    ids=["marks", "quotes", "genitives", "dots", "contraction", "dots_and_marks"],
)
def test_the_longest_word_that_a_field_holds_is_walked_once(word: str, tokens: list[str]) -> None:
    """A walk for each of its marks takes many minutes."""
    assert e2e_data.tokenise(word).split() == tokens


@pytest.mark.parametrize("blank", [" ", "\u00a0"])
def test_the_longest_record_that_a_field_holds_is_walked_once(blank: str) -> None:
    record = "name[A]," + blank * FIELD + "near" + blank * FIELD + "[B]" + blank * FIELD
    assert e2e_data.linearise(record) == "name : A | near : B"
    with pytest.raises(ValueError, match=r"the record does not parse at 'a *'; expected key\[value\], \.\.\."):
        e2e_data.linearise("a" + " " * FIELD)
    with pytest.raises(ValueError, match="does not parse"):
        e2e_data.linearise(blank * FIELD + "[B]")
    slots = FIELD // 5
    assert e2e_data.linearise("a[b]," * (slots - 1) + "a[b]").count(" | ") == slots - 1


def test_a_file_of_another_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (file := tmp_path / "trainset.csv").touch()
    os.truncate(file, 2**40)  # takes no place on the disk
    with pytest.raises(Refusal, match=rf"{file}: has 1,099,511,627,776 bytes, expected at most 268,435,456; E2E is at"):
        e2e_data.read_csv(file)


def test_accepts_a_quoted_header_and_a_reference_over_two_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('"mr","ref"\n"name[A]","One\ntwo."\n' + ROW, encoding="utf-8")
    assert e2e_data.read_csv(file) == [
        ("name : A", "One two ."),
        ("name : The Vaults | Type : pub", "The Vaults is a pub ."),
    ]


def test_accepts_a_byte_order_mark(tmp_path: Path) -> None:
    (file := tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfmr,ref\n" + ROW.encode())
    assert e2e_data.read_csv(file) == [("name : The Vaults | Type : pub", "The Vaults is a pub .")]


BAD_ROWS = {
    "columns": ("name[A],eatType[pub],text\n", "expected 2 columns (mr, ref), found 3"),
    "cut_off": ('"name[A]","half of a ref', "unexpected end of data"),
    "no_reference": ("name[A],  \n", "the reference is empty"),
    "no_record": (",text\n", "the record is empty"),
    "open_bracket": ("name[A,text\n", "the record does not parse at 'name[A'; expected key[value], ..."),
    "no_value": ("name[],text\n", "the record does not parse at 'name[]'"),
    "no_key": ("  [a],text\n", "the record does not parse at '  [a]'"),
    "key_with_a_bracket": ("a]b[c],text\n", "the record does not parse at 'a]b[c]'"),
    "text_between": ('"a[b] c, d[e]",text\n', "the record does not parse at 'a[b] c, d[e]'"),
    "trailing_comma": ('"name[A], ",text\n', "the record does not parse at"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case: str, tmp_path: Path) -> None:
    row, words = BAD_ROWS[case]
    (file := tmp_path / "devset.csv").write_text("mr,ref\n" + ROW + row, encoding="utf-8")
    with pytest.raises(Refusal) as refusal:
        e2e_data.read_csv(file)
    assert str(refusal.value).startswith(f"{file}, row 2 (line 3): ")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"name,text\n", "line 1: expected the header mr,ref and found 'name,text'"),
        (b"", "line 1: expected the header mr,ref and found ''"),
        (b"mr,ref\n", "no rows after the header"),
        (b"mr,ref\nname[A],\xff\xfe\n", "line 2: not UTF-8 (byte 0xff)"),
        (b"mr,ref\n" + 299 * ROW.encode() + b"name[A],caf\xe9\n", "line 301: not UTF-8 (byte 0xe9)"),  # row 300
        (b"mr,ref\nname[A],a\0b\n", "line 2: a NUL character"),
    ],
)
def test_a_bad_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    (file := tmp_path / "trainset.csv").write_bytes(content)
    with pytest.raises(Refusal) as refusal:
        e2e_data.read_csv(file)
    assert str(file) in str(refusal.value)
    assert words in str(refusal.value)


def write_folder(folder: Path, test: str | None) -> None:
    folder.mkdir()
    for name in ("trainset.csv", "devset.csv"):
        (folder / name).write_text("mr,ref\n" + ROW, encoding="utf-8")
    if test is not None:
        (folder / "testset_w_refs.csv").write_text(test, encoding="utf-8")


@pytest.mark.parametrize(
    "test, words",
    [
        (None, "testset_w_refs.csv: cannot be read (No such file or directory)"),
        ("mr,ref\n" + ROW + "nonsense,text\n", "testset_w_refs.csv, row 2 (line 3): the record does not parse"),
    ],
)
def test_the_command_line_refuses_in_one_line_and_writes_nothing(
    test: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="the runs need transformers")
    write_folder(tmp_path / "data", test)
    told = ["--suite", "demo", "--model", "small", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    assert nlg.main(told) == 1
    out, errors = capsys.readouterr()
    [line] = [line for line in errors.splitlines() if line.startswith("nlg.py")]
    assert words in line and out == ""
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "~nobody-of-this-name/x"):
        with pytest.raises(Refusal, match="no such folder; expected one with trainset"):
            e2e_data.load(name)


def test_generates_the_same_records_each_time() -> None:
    data = e2e_data.load(e2e_data.GENERATED)
    assert data == e2e_data.load(e2e_data.GENERATED)
    assert data.where.startswith("no E2E data (asked for)")
    assert len(data.train) > 3_000
    sources, references = e2e_data.grouped(data.test)
    assert len(sources) == 60
    assert all(1 <= len(texts) <= 4 for texts in references)
    assert all(source.startswith("name : ") for source in sources)


@pytest.mark.parametrize("error", [OSError("no route"), http.client.IncompleteRead(b"mr,")])
def test_generates_where_nothing_can_be_downloaded(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(e2e_data.urllib.request, "urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = e2e_data.load(None)
    assert data.source == "generated"
    assert f"no download ({type(error).__name__})" in data.where


def test_generates_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert e2e_data.load(None).source == e2e_data.GENERATED


def test_refuses_a_download_that_is_not_e2e(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e_data.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>log in</html>"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert e2e_data.load(None).source == "generated"
    assert not list(tmp_path.rglob("*.csv"))


def test_a_damaged_file_in_the_cache_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"mr,ref\n" + ROW.encode()
    monkeypatch.setattr(e2e_data, "SHA256", dict.fromkeys(e2e_data.SHA256, hashlib.sha256(content).hexdigest()))
    asked: list[str] = []
    monkeypatch.setattr(e2e_data.urllib.request, "urlopen", lambda url, **_: asked.append(url) or io.BytesIO(content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "prefixattn" / "e2e"
    cache.mkdir(parents=True)
    for name in e2e_data.FILES.values():
        (cache / name).write_bytes(content)
    (cache / "devset.csv").write_bytes(content[:-3])
    data = e2e_data.load(None)
    assert (data.source, data.root) == ("e2e", cache)
    assert asked == [e2e_data.URL + "devset.csv"]
    assert (cache / "devset.csv").read_bytes() == content
