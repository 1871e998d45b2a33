"""E2E NLG records: the challenge's CSVs, or a generator of records alike, as (source, target) strings.

The strings are those of Li and Liang's linearised files: sources agree line for line with src1_valid.txt and
src1_test.txt, targets up to where their tokeniser put spaces (tests/bench/paper/test_e2e_data.py).
The CSVs (CC BY-SA 4.0) come from https://github.com/tuetschek/e2e-dataset.
"""

import csv
import functools
import hashlib
import http.client
import io
import os
import random
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from bench.paper.runs import Refusal, digest, replace_file

FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
URL = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
SHA256 = {
    "trainset.csv": "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}
GENERATED = "generated"
MOST = 2**28  # bytes of a file: E2E's largest has 9 million

Pair = tuple[str, str]  # source, target


@dataclass(frozen=True)
class Data:
    where: str  # one line for the reader
    source: str  # "e2e" | "generated"
    sha256: str
    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]
    root: Path | None = None  # folder of the CSVs; for the run alone, never for its record


def load(folder: str | None) -> Data:
    """The records from `folder` ("generated": from the generator; None: downloaded, or generated where that fails)."""
    if folder == GENERATED:
        return _generated("asked for")
    if folder:
        root = Path(os.path.expanduser(folder)).absolute()  # a ~name that is nobody's stays, and is no folder
        root = root / "e2e" if (root / "e2e").is_dir() else root
        if not root.is_dir():
            raise Refusal(f"{root}: no such folder; expected one with {', '.join(FILES.values())}")
    else:
        try:
            root = _downloaded()
        # HTTPException: a reply cut short; RuntimeError: a user without a home
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            return _generated(f"no --data, no PREFIXATTN_DATA, and no download ({type(error).__name__})")
    splits = {split: read_csv(root / name) for split, name in FILES.items()}
    counts = ", ".join(f"{len(pairs):,} {split}" for split, pairs in splits.items())
    sha256 = digest(*(root / name for name in FILES.values()))
    return Data(where=f"E2E NLG: {counts} rows", source="e2e", sha256=sha256, root=root, **splits)


def read_csv(path: Path) -> list[Pair]:
    """(source, tokenised reference) of each row of a file with the columns mr and ref."""
    pairs: list[Pair] = []
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(rows, [])
        if [name.strip().lower() for name in header] != ["mr", "ref"]:
            raise Refusal(f"{path}, line 1: expected the header mr,ref and found {','.join(header)[:60]!r}")
        for row in rows:
            if not row:
                continue
            if len(row) != 2:
                raise ValueError(f"expected 2 columns (mr, ref), found {len(row)}")
            if not row[1].strip():
                raise ValueError("the reference is empty")
            pairs.append((linearise(row[0]), tokenise(row[1])))
    except Refusal:
        raise
    except (csv.Error, ValueError) as error:
        raise Refusal(f"{path}, row {len(pairs) + 1} (line {rows.line_num}): {error}") from None
    if not pairs:
        raise Refusal(f"{path}: no rows after the header")
    return pairs


def _text(path: Path) -> str:
    """The file's text, decoded at once: a reader of lines would decode ahead and name the wrong one."""
    try:
        size = path.stat().st_size
        if size > MOST:
            raise Refusal(f"{path}: has {size:,} bytes, expected at most {MOST:,}; E2E is at {URL}")
        content = path.read_bytes()
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror}); E2E is at {URL}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise Refusal(f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    if (at := text.find("\0")) >= 0:
        raise Refusal(f"{path}, line {text.count(chr(10), 0, at) + 1}: a NUL character")
    return text


def _downloaded() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefixattn" / "e2e"
    for name, expected in SHA256.items():
        if (root / name).exists() and hashlib.sha256((root / name).read_bytes()).hexdigest() == expected:
            continue
        with urllib.request.urlopen(URL + name, timeout=5) as reply:
            content = reply.read()
        if hashlib.sha256(content).hexdigest() != expected:
            raise OSError(f"{URL + name} is not the file expected (sha256 {expected[:12]}...)")
        replace_file(root / name, content)
    return root


# --- the authors' strings ---

KEYS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
VALUES = {"less than £20": "less than £ 20", "£20-25": "£ 20 - 25", "more than £30": "more than £ 30"}


def linearise(mr: str) -> str:
    """``name[X], eatType[pub]`` as ``name : X | Type : pub``, in the order of the record."""
    slots, at = [], 0
    while at < len(mr):  # each character is looked at a few times, however long the record is
        opening = mr.find("[", at)
        closing = mr.find("]", opening)
        key, value = mr[at : max(opening, at)].strip(), mr[opening + 1 : max(closing, opening)]
        if opening < 0 or closing < 0 or not key or not value or "[" in value or "," in key or "]" in key:
            raise _unparsed(mr, at)
        slots.append(f"{KEYS.get(key, key)} : {VALUES.get(value, value)}")
        comma = mr.find(",", closing)
        if mr[closing + 1 : comma if comma >= 0 else None].strip() or comma == len(mr) - 1:
            raise _unparsed(mr, at)
        at = comma + 1 if comma >= 0 else len(mr)
    if not slots:
        raise ValueError("the record is empty")
    return " | ".join(slots)


def _unparsed(mr: str, at: int) -> ValueError:
    return ValueError(f"the record does not parse at {mr[at : at + 40]!r}; expected key[value], ...")


_LETTER = r"[^\W\d_]"
_OPENING = re.compile(r"\.\.+|[£$€\"'(\[,;:!?&*]")
# of the last three characters; a run of dots is looked for by hand
_CLOSING = re.compile(r"(?:'[sS]|[\",;:!?'\])]|(?<=[a-zé0-9%'\")\]])\.|(?<=[A-Z][A-Z])\.|(?<=\d)[£$€])$")
_INNER = re.compile(rf"\.\.+|(?<={_LETTER})(?:--|[-\u2013,:/])(?={_LETTER})|(?<=[a-z])\.(?=[A-Z])|(?<=\d)[-+*^](?=\d)")
_CONTRACTIONS = ("n't", "'re", "'ll", "'ve", "'d", "'m")


def tokenise(text: str) -> str:
    """Words and punctuation set apart by spaces, case kept, as the authors' targets are; no trailing space."""
    return " ".join(token for word in text.split() for token in _split(word))


@functools.lru_cache(maxsize=100_000)
def _split(word: str) -> tuple[str, ...]:
    """What is left of the word between `at` and `end` shrinks from both ends: its length is walked once."""
    opening: list[str] = []
    closing: list[str] = []  # the last one first
    at, end = 0, len(word)
    while at < end:
        tail = word[max(at + 1, end - 3) : end]  # at least a character stays before a contraction
        if size := next((len(mark) for mark in _CONTRACTIONS if tail.lower().endswith(mark)), 0):
            closing.append(word[end - size : end])
            end -= size
            break
        if edge := _OPENING.match(word, at, end):
            opening.append(edge[0])
            at = edge.end()
        elif size := _closing(word, at, end):
            closing.append(word[end - size : end])
            end -= size
        else:
            break
    closing.reverse()
    word = word[at:end]
    if word.lower() == "cannot":
        return (*opening, word[:3], word[3:], *closing)
    middle, at = [], 0
    for mark in _INNER.finditer(word):
        middle += [word[at : mark.start()], mark[0]]
        at = mark.end()
    return tuple(token for token in (*opening, *middle, word[at:], *closing) if token)


def _closing(word: str, at: int, end: int) -> int:
    """The length of the mark that ends ``word[at:end]``, 0 if none does."""
    dots = end
    while dots > at and word[dots - 1] == ".":
        dots -= 1
    if end - dots > 1:
        return end - dots
    mark = _CLOSING.search(word[max(at, end - 3) : end])
    return len(mark[0]) if mark else 0


def grouped(pairs: list[Pair]) -> tuple[list[str], list[list[str]]]:
    """Distinct sources in order of first appearance, and the references of each."""
    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    return list(references), list(references.values())


# --- records of our own ---

_NAMES = "Juniper Hall,Copper Kettle,Marlow Lane,Old Lighthouse,Saffron Court,The Grey Heron,Pebble & Pine,Twelve Oaks"
_SIGHTS = "the Clock Tower,Harbour Gate,Quarry Park,the Tram Depot,Willow Theatre"
_SLOTS = {
    "eatType": "pub,coffee shop,restaurant,bistro",
    "food": "Greek,Korean,Spanish,Lebanese,Polish,Peruvian",
    "priceRange": "cheap,moderate,high,less than £20,£20-25,more than £30",
    "customer rating": "low,average,high,1 out of 5,3 out of 5,5 out of 5",
    "area": "riverside,city centre,old town",
    "familyFriendly": "yes,no",
    "near": _SIGHTS,
}
_OPENERS = (
    "{name} is {kind}{where}.",
    "Looking for {kind}? Try {name}{where}.",
    "You will find {kind} called {name}{where}.",
    "{name}{where} is {kind} worth knowing.",
)
_EXTRAS = {
    "priceRange": ("Expect prices to be {}.", "In price it is {}.", "What you pay: {}."),
    "customer rating": ("Guests rate it {}.", "Its rating from customers is {}.", "Reviews put it at {}."),
    "familyFriendly": ("Children are {}welcome.", "It is {}a place for families.", "It does {}suit young guests."),
}


def _generated(reason: str) -> Data:
    splits = {"train": generate(1_200, 3, seed=0), "dev": generate(60, 4, seed=1), "test": generate(60, 4, seed=2)}
    counts = ", ".join(f"{len(pairs):,} {split}" for split, pairs in splits.items())
    where = f"no E2E data ({reason}): {counts} rows from a generator of E2E-like records"
    return Data(where=where, source=GENERATED, sha256=digest(splits), **splits)


def generate(records: int, references: int, seed: int) -> list[Pair]:
    """`records` different meaning representations, each with up to `references` different texts."""
    rng = random.Random(seed)
    seen: dict[str, list[str]] = {}
    while len(seen) < records:
        slots = {"name": rng.choice(_NAMES.split(","))}
        kept = rng.sample(sorted(_SLOTS), rng.randint(2, len(_SLOTS)))
        slots |= {key: rng.choice(choices.split(",")) for key, choices in _SLOTS.items() if key in kept}
        mr = ", ".join(f"{key}[{value}]" for key, value in slots.items())
        if mr not in seen:
            seen[mr] = list(dict.fromkeys(_describe(slots, rng) for _ in range(references)))
    return [(linearise(mr), tokenise(text)) for mr, texts in seen.items() for text in texts]


def _describe(slots: dict[str, str], rng: random.Random) -> str:
    bare = " ".join(word for word in (slots.get("food", ""), slots.get("eatType", "place")) if word)
    article = "an" if bare[0] in "aeiou" else "a"
    where = (f" in the {slots['area']}" if "area" in slots else "") + (
        f" near {slots['near']}" if "near" in slots else ""
    )
    text = [rng.choice(_OPENERS).format(name=slots["name"], kind=f"{article} {bare}", where=where)]
    extras = [key for key in _EXTRAS if key in slots]
    rng.shuffle(extras)
    for key in extras:
        value = slots[key] if key != "familyFriendly" else ("" if slots[key] == "yes" else "not ")
        text.append(rng.choice(_EXTRAS[key]).format(value))
    return " ".join(text)
