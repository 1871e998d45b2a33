"""E2E and WebNLG as tasks: the originals' strings and groups; what is unreadable is refused with file and row."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.paper import e2e_data
from bench.paper.language import data, e2e, webnlg, xsum
from bench.paper.language.data import Part, Prompt, Record
from bench.paper.runs import Refusal
from tests.data_folder import data_path

BOM = b"\xef\xbb\xbf"


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(Refusal) as refusal:
        read()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- parts ---


def test_pairs_are_those_of_each_target_and_prompts_those_of_each_source() -> None:
    part = Part([
        Record("b", ("b1",), ("b1", "b2"), "r1", "City"),
        Record("a", (), ("a1",), "r2", "Food"),
        Record("b", ("b3", "b4"), ("b3",), "r3", "Other"),
    ])  # fmt: skip
    assert part.pairs() == [("b", "b1"), ("b", "b3"), ("b", "b4")]
    assert part.prompts() == [Prompt("b", ("b1", "b2", "b3"), "City"), Prompt("a", ("a1",), "Food")]


def test_equal_sources_stay_apart_where_each_is_decoded() -> None:
    part = Part([Record("b", ("1",), ("1",), "r1"), Record("b", ("2",), ("2",), "r2")], distinct=False)
    assert part.prompts() == [Prompt("b", ("1",)), Prompt("b", ("2",))]


# --- E2E ---


def test_e2e_has_the_records_of_its_reader_and_the_space_after_targets() -> None:
    folder = data_path("e2e", "devset.csv").parent
    task, rows = e2e.load(str(folder)), e2e_data.load(str(folder))
    assert (task.name, task.where, task.sha256) == ("e2e", rows.where, rows.sha256)
    assert task.train.pairs() == [(source, f"{target} ") for source, target in rows.train]
    sources, references = e2e_data.grouped(rows.test)
    assert task.test.prompts() == [Prompt(s, tuple(r)) for s, r in zip(sources, references, strict=True)]
    assert task.dev.records[2].row == "devset.csv, row 3"
    assert e2e.read(folder, "dev") == task.dev


def test_e2e_targets_are_spaced_as_the_originals_lines_end() -> None:
    folder = data_path("e2e", "src1_valid.txt").parent
    lines = (folder / "src1_valid.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.endswith(" ") and not line.endswith("  ") for line in lines)
    assert all(target.endswith(" ") and not target.endswith("  ") for _, target in e2e.read(folder, "dev").pairs())


def test_e2e_takes_generated_records_where_asked() -> None:
    task = e2e.load("generated")
    assert task.name == "generated"
    assert len(task.test.prompts()) == 60


def test_e2e_sources_are_compared_without_name_and_near() -> None:
    train = Part([Record("name : A | food : X | near : B", (), (), ""), Record("name : A | area : Y", (), (), "")])
    test = Part([
        Record("name : C | food : X", (), (), ""),
        Record("name : D | food : X | near : E", (), (), ""),
        Record("name : C | food : Z", (), (), ""),
        Record("name : A | area : Y", (), (), ""),
        Record("name : A | area : Y", (), (), ""),
    ])  # fmt: skip
    assert e2e.overlap(train, test) == e2e.Overlap(sources=4, in_train=1, bare=3, bare_in_train=2, with_bare_in_train=3)
    assert e2e.bare("name : A | Type : pub | price : £ 20 - 25 | near : B") == "Type : pub | price : £ 20 - 25"


# --- WebNLG ---


def triple(subject: str = "A_B", name: str = "leader", value: str = '"C, D"') -> dict[str, str]:
    return {"subject": subject, "property": name, "object": value}


def entry(*triples: dict[str, str], texts: Any = (("A text.", "good"),), category: str = "City") -> dict[str, Any]:
    lexicalisations = [{"lex": text, "comment": comment} for text, comment in texts]
    return {"modifiedtripleset": list(triples), "lexicalisations": lexicalisations, "category": category}


def webnlg_file(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"entries": [{str(at): one} for at, one in enumerate(entries, 1)]}), encoding="utf-8")
    return path


def webnlg_folder(folder: Path, *entries: Any) -> Path:
    for file in webnlg.FILES.values():
        webnlg_file(folder / file, *entries)
    return folder


@pytest.fixture(scope="module")
def real_webnlg() -> data.Task:
    return webnlg.load(str(data_path("webnlg", "train.json").parent.parent))


def test_webnlg_has_the_published_counts(real_webnlg: data.Task) -> None:
    parts = (real_webnlg.train, real_webnlg.dev, real_webnlg.test)
    assert [len(part.records) for part in parts] == [6_940, 872, 1_862]
    assert [len(part.pairs()) for part in parts[:2]] == [18_025, 2_258]
    seen = [webnlg.seen(record.category) for record in real_webnlg.test.records]
    assert (seen.count(True), seen.count(False)) == (971, 891)
    assert {record.category for record in real_webnlg.train.records} == set(webnlg.SEEN)
    assert {record.category for record in real_webnlg.test.records} == {*webnlg.SEEN, *webnlg.UNSEEN}
    assert real_webnlg.where == "WebNLG 2017: 6,940 train, 872 dev, 1,862 test entries"
    assert real_webnlg.notes == ()


def test_webnlg_dev_has_one_prompt_twice_and_test_none(real_webnlg: data.Task) -> None:
    dev, test = real_webnlg.dev, real_webnlg.test
    sources = [record.source for record in dev.records]
    assert [at for at, source in enumerate(sources) if sources.count(source) > 1] == [74, 153]
    both = next(prompt for prompt in dev.prompts() if prompt.source == sources[74])
    assert both.references == dev.records[74].references + dev.records[153].references
    assert len(dev.prompts()) == 871
    assert [prompt.source for prompt in test.prompts()] == [record.source for record in test.records]


def test_webnlg_strings_are_raw_with_a_leading_bar(real_webnlg: data.Task) -> None:
    first = real_webnlg.train.records[0]
    assert first.source == ' | Aarhus_Airport : cityServed : "Aarhus, Denmark"'
    assert first.row == "train.json, entry 1"
    assert real_webnlg.train.pairs()[0] == (first.source, "The Aarhus is the airport of Aarhus, Denmark.")


def test_webnlg_differs_with_the_quirk_in_the_prompt_of_the_first_entry_alone(real_webnlg: data.Task) -> None:
    folder = data_path("webnlg", "train.json").parent
    plain, quirk = real_webnlg.test.prompts(), webnlg.read(folder, "test", entry_zero_quirk=True).prompts()
    assert plain[0].source == " | Abilene_Regional_Airport : cityServed : Abilene,_Texas"
    assert quirk[0].source == "Abilene_Regional_Airport : cityServed : Abilene,_Texas"
    assert quirk[0].references == plain[0].references
    assert quirk[1:] == plain[1:]


def test_webnlg_with_the_quirk_runs_triples_together_and_trains_as_without(tmp_path: Path) -> None:
    folder = webnlg_folder(tmp_path, entry(triple(value="C"), triple("X", "p", "Y")), entry(triple(), triple()))
    plain, quirk = webnlg.load(str(folder)), webnlg.load(str(folder), entry_zero_quirk=True)
    assert [prompt.source for prompt in quirk.dev.prompts()] == [
        "A_B : leader : CX : p : Y",
        ' | A_B : leader : "C, D" | A_B : leader : "C, D"',
    ]
    assert quirk.train.pairs() == plain.train.pairs() == [
        (" | A_B : leader : C | X : p : Y", "A text."),
        (' | A_B : leader : "C, D" | A_B : leader : "C, D"', "A text."),
    ]  # fmt: skip
    assert (len(plain.notes), len(quirk.notes)) == (0, 1)


def test_webnlg_trains_on_good_texts_and_scores_against_all(tmp_path: Path) -> None:
    texts = ((" One.  Kept as it is ", "good"), ("Two.", "toFix"), ("Three.", ""))
    task = webnlg.load(str(webnlg_folder(tmp_path / "webnlg", entry(triple(), texts=texts)).parent))
    (record,) = task.dev.records
    assert record.targets == (" One.  Kept as it is ",)
    assert record.references == (" One.  Kept as it is ", "Two.", "Three.")


def test_webnlg_digest_is_of_the_files(tmp_path: Path) -> None:
    folder = webnlg_folder(tmp_path, entry(triple()))
    before = webnlg.load(str(folder)).sha256
    assert webnlg.load(str(folder)).sha256 == before
    webnlg_file(folder / "test.json", entry(triple(), texts=(("Another.", "good"),)))
    assert webnlg.load(str(folder)).sha256 != before


def test_webnlg_is_read_with_a_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = webnlg_file(tmp_path / "dev.json", entry(triple(), texts=(("Café “quoted” .", "good"),)))
    plain = webnlg.read(tmp_path, "dev")
    path.write_bytes(BOM + json.dumps(json.loads(path.read_text()), indent=1).replace("\n", "\r\n").encode())
    assert webnlg.read(tmp_path, "dev") == plain


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


BAD_ENTRIES = {
    "no_object": (entry(triple(), without(triple(), "object")), "triple 2 has no object"),
    "empty_object": (entry(triple(value=" ")), "the object of triple 1 is empty"),
    "number": (entry({**triple(), "object": 5}), "the object of triple 1 is not text"),
    "triple": (entry("A : b : c"), "triple 1 is not a JSON object"),
    "no_triples": (entry(), "the modifiedtripleset of the entry is empty"),
    "no_triple_set": (without(entry(triple()), "modifiedtripleset"), "the entry has no modifiedtripleset"),
    "triple_set": ({**entry(triple()), "modifiedtripleset": {}}, "the modifiedtripleset of the entry is not a list"),
    "no_texts": (entry(triple(), texts=()), "the lexicalisations of the entry is empty"),
    "no_text_list": (without(entry(triple()), "lexicalisations"), "the entry has no lexicalisations"),
    "empty_text": (entry(triple(), texts=(("A.", "good"), (" ", "toFix"))), "the lex of lexicalisation 2 is empty"),
    "no_comment": ({**entry(triple()), "lexicalisations": [{"lex": "A."}]}, "lexicalisation 1 has no comment"),
    "nul": (entry(triple(), texts=(("A\0.", "good"),)), "the lex of lexicalisation 1 holds a NUL character"),
    "surrogate": (entry(triple("\ud800")), "the subject of triple 1 holds half of a surrogate pair"),
    "no_category": (without(entry(triple()), "category"), "the entry has no category"),
    "list": ([], "the entry is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_webnlg_names_the_entry_that_it_cannot_read(case: str, tmp_path: Path) -> None:
    bad, words = BAD_ENTRIES[case]
    path = webnlg_file(tmp_path / "test.json", entry(triple()), bad)
    assert refused(lambda: webnlg.read(tmp_path, "test")) == f"{path}, entry 2: {words}"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not WebNLG's JSON (Expecting value: line 1 column 1 (char 0)); WebNLG 2017: data/"),
        (b'{"entries": [', "not WebNLG's JSON (Expecting value: line 1 column 14"),
        (b'{"entries":\n' + b"[" * 200_000, "not WebNLG's JSON (maximum recursion depth"),
        (b'{"entries": []}', "not WebNLG's JSON (the entries of the file is empty)"),
        (b"[]", "not WebNLG's JSON (the file is not a JSON object)"),
        (b'{"entries": [{"2": {}}]}', ", entry 1: expected an object with the one key '1'"),
        (b'{"entries": [{"1": {}, "2": {}}]}', ", entry 1: expected an object with the one key '1'"),
        (b'{"entries": ["1"]}', ", entry 1: expected an object with the one key '1'"),
        (b'{"entries":\n\xff', ", line 2: not UTF-8 (byte 0xff)"),
        (BOM + b'{"entries":\n\n"caf\xe9', ", line 3: not UTF-8 (byte 0xe9)"),
        (b'{"entries":\n"\0', ", line 2: a NUL character"),
    ],
)
def test_webnlg_names_the_file_that_it_cannot_read(content: bytes, words: str, tmp_path: Path) -> None:
    (path := tmp_path / "train.json").write_bytes(content)
    said = refused(lambda: webnlg.read(tmp_path, "train"))
    assert said.startswith(str(path))
    assert words in said


def test_a_file_that_is_absent_or_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    assert f"{path}: cannot be read (No such file or directory); WebNLG 2017: data/webnlg" in refused(
        lambda: webnlg.read(tmp_path, "dev")
    )
    path.symlink_to(os.devnull)
    assert f"{path}: not a file; WebNLG" in refused(lambda: webnlg.read(tmp_path, "dev"))
    assert refused(lambda: webnlg.load(str(tmp_path / "nowhere"))).startswith(f"{tmp_path}/nowhere: no such folder")
    assert "no such folder; expected one with train.source" in refused(lambda: xsum.load("~nobody-of-this-name/x"))


def test_a_file_far_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("train.json", "val.source", "val.target"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)  # takes no place on the disk
    most = "1,099,511,627,776 bytes, expected at most"
    assert f"train.json: has {most} 268,435,456; WebNLG" in refused(lambda: webnlg.read(tmp_path, "train"))
    assert f"val.source: has {most} 1,073,741,824; XSUM" in refused(lambda: xsum.read(tmp_path, "dev"))
