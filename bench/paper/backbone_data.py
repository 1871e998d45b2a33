"""The texts of the small GPT-2 backbone: where they come from, how they are linearised, tokenised and cut into blocks.

Everything is read from one data folder: ``text/english.jsonl.gz`` ({source, text} a line) and ``webnlg/train.json``,
``webnlg/dev.json`` (WebNLG 2017, challenge version). E2E is never read: it is what the backbone is later tuned on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bench.paper.runs import Refusal

EOS = "<|endoftext|>"
ENGLISH, WEBNLG_TRAIN, WEBNLG_DEV = "text/english.jsonl.gz", "webnlg/train.json", "webnlg/dev.json"
HELD_OUT_SOURCE = "wikitext-2-test"


class DataError(Refusal):
    """A data file is missing or does not parse; the message is one line with file and row."""


@dataclass
class Texts:
    """What is trained on and what is held out, with the record of both."""

    documents: list[str]  # running English
    pairs: list[tuple[str, str]]  # (linearised triples, text)
    held_out_documents: list[str]
    held_out_pairs: list[tuple[str, str]]
    record: dict[str, Any] = field(default_factory=dict)


def linearise(triples: list[dict[str, str]]) -> str:
    """WebNLG triples as the prefix-tuning code writes them: a separator ahead of every triple, names as they are."""
    return "".join(f" | {t['subject']} : {t['property']} : {t['object']}" for t in triples)


def pair_line(source: str, text: str) -> str:
    """Table and text as one training line; the special token keeps the spaces around it."""
    return f" {source} {EOS} {text} {EOS}"


def read_bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as e:
        raise DataError(f"{folder / name}: cannot be read ({e.strerror})") from None


def read_english(folder: Path, raw: bytes) -> list[tuple[str, str]]:
    """(source, text) of each line of the English file."""
    path, rows = folder / ENGLISH, []
    try:
        lines = (
            gzip.decompress(raw).decode("utf-8").removesuffix("\n").split("\n")
        )  # str.splitlines also cuts at U+2028
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not gzipped UTF-8 text ({e})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            source, text = row["source"], row["text"]
            if not (isinstance(source, str) and isinstance(text, str)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}, row {number}: expected a JSON object with strings source and text") from None
        rows.append((source, text))
    return rows


def read_webnlg(folder: Path, name: str, raw: bytes) -> list[tuple[str, str]]:
    """(linearised triples, text) for every lexicalisation marked good."""
    path, pairs = folder / name, []
    try:
        entries = json.loads(raw)["entries"]
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: expected JSON with a list under entries ({type(e).__name__})") from None
    for number, numbered in enumerate(entries, 1):
        try:
            entry = numbered[str(number)]
            source = linearise(entry["modifiedtripleset"])
            pairs += [(source, lex["lex"]) for lex in entry["lexicalisations"] if lex["comment"] == "good"]
        except (KeyError, TypeError) as e:
            raise DataError(f"{path}, entry {number}: not a WebNLG entry ({type(e).__name__}: {e})") from None
    return pairs


def load_texts(folder: Path) -> Texts:
    """Reads all three files; the record holds size, sha256 and what was taken from each."""
    raw = {name: read_bytes(folder, name) for name in (ENGLISH, WEBNLG_TRAIN, WEBNLG_DEV)}
    english = read_english(folder, raw[ENGLISH])
    texts = Texts(
        documents=[text for source, text in english if source != HELD_OUT_SOURCE],
        pairs=read_webnlg(folder, WEBNLG_TRAIN, raw[WEBNLG_TRAIN]),
        held_out_documents=[text for source, text in english if source == HELD_OUT_SOURCE],
        held_out_pairs=read_webnlg(folder, WEBNLG_DEV, raw[WEBNLG_DEV]),
    )
    if not texts.held_out_documents or not texts.documents:
        raise DataError(f"{folder / ENGLISH}: expected texts of {HELD_OUT_SOURCE} (held out) and of other sources")
    if not texts.held_out_pairs or not texts.pairs:
        raise DataError(f"{folder / WEBNLG_TRAIN}, {folder / WEBNLG_DEV}: no good lexicalisation in one of them")
    sizes: dict[str, int] = {}
    for source, text in english:
        sizes[source] = sizes.get(source, 0) + len(text.encode())
    texts.record = {
        "files": {n: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in raw.items()},
        "trained_on": {
            "english_bytes": {s: n for s, n in sizes.items() if s != HELD_OUT_SOURCE},
            "webnlg_train_pairs": len(texts.pairs),
            "form": "running text; each WebNLG text alone; and each WebNLG pair as a table-to-text line, "
            f"' {{triples}} {EOS} {{text}} {EOS}', so the model has seen linearised data",
        },
        "held_out": {
            "english_bytes": {HELD_OUT_SOURCE: sizes[HELD_OUT_SOURCE]},
            "webnlg_dev_pairs": len(texts.held_out_pairs),
        },
        "never_seen": "E2E in any form",
    }
    return texts


def train_tokenizer(texts: Texts, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting, a leading space belonging to the word, no space added in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [*texts.documents, *(f" {source} {text}" for source, text in texts.pairs)]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def training_blocks(texts: Texts, tokenizer: Tokenizer, length: int, seed: int) -> np.ndarray:
    """All training tokens as [blocks, length + 1], neighbours sharing one token: inputs and, shifted, targets.

    Documents, single texts and pairs are shuffled before they are joined, so that a block of short texts does not
    hold one entry's near-duplicates; the last partial block is dropped.
    """
    lines = [f"{text}{EOS}" for text in texts.documents]
    lines += [f"{text}{EOS}" for _, text in texts.pairs] + [pair_line(*pair) for pair in texts.pairs]
    order = np.random.default_rng(seed).permutation(len(lines))
    stream = np.concatenate(
        [np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch([lines[i] for i in order])]
    )
    count = (len(stream) - 1) // length
    if count == 0:
        raise DataError(f"the training texts hold {len(stream)} tokens, expected more than one block of {length}")
    return np.lib.stride_tricks.sliding_window_view(stream, length + 1)[: count * length : length]
