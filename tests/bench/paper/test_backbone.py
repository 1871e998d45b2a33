"""The shipped small GPT-2 and the script that trained it."""

import gzip
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from bench.paper import backbone
from bench.paper.backbone_data import load_texts, pair_line
from bench.paper.backbone_score import windows
from tests.support import ROOT

PAPER = ROOT / "bench" / "paper"
SHIPPED = PAPER / "backbone"
TEXT = (
    "The city council met on Tuesday to discuss the new budget for public schools. Several members said that the plan "
    "would not be enough, and the mayor agreed to look at it again before the end of the year."
)


@pytest.fixture(scope="module")
def model():
    return GPT2LMHeadModel.from_pretrained(SHIPPED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def record():
    return json.loads((SHIPPED / "training.json").read_text())


@pytest.fixture
def data(tmp_path):
    """A data folder of the real formats with a few sentences in it."""
    folder = tmp_path / "data"
    (folder / "text").mkdir(parents=True)
    (folder / "webnlg").mkdir()
    rows = [{"source": "news", "text": f"{TEXT} Item {i}.\u2028{TEXT}"} for i in range(12)]
    rows.append({"source": "wikitext-2-test", "text": TEXT * 2})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "text" / "english.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    entry = {
        "modifiedtripleset": [{"subject": "Aarhus", "property": "country", "object": "Denmark"}] * 2,
        "lexicalisations": [{"comment": "good", "lex": "Aarhus is in Denmark."}, {"comment": "bad", "lex": "no"}],
    }
    for name in ("train", "dev"):
        (folder / "webnlg" / f"{name}.json").write_text(json.dumps({"entries": [{"1": entry}, {"2": entry}]}))
    return folder


def perplexity(model, ids):
    with torch.no_grad():
        return math.exp(model(ids, labels=ids).loss)


def tiny():
    return backbone.Config(
        vocab_size=280,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        tokens=8 * 2 * 64,
        batch=2,
        warmup=2,
        compiled=False,
    )


def test_shipped_folder_is_small():
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= 10e6


def test_tied_embedding_is_stored_once_and_in_half_precision():
    weights = load_file(SHIPPED / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {w.dtype for w in weights.values()} == {torch.float16}


def test_loads_as_float32_without_being_asked(model, record):
    assert GPT2LMHeadModel.from_pretrained(SHIPPED).dtype == torch.float32
    assert model.num_parameters() == record["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_predicts_english_far_better_than_chance(model, tokenizer):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    torch.manual_seed(0)
    untrained = perplexity(GPT2LMHeadModel(model.config).eval(), ids)
    shuffled = perplexity(model, ids[:, torch.randperm(ids.shape[1])])
    trained = perplexity(model, ids)
    assert untrained > model.config.vocab_size / 2  # next to uniform
    assert trained < untrained / 20
    assert trained < shuffled / 5


def test_tokenizer_round_trip_keeps_spaces_and_any_unicode(tokenizer):
    text = " name : Blue Spice | price : less than £ 20 <|endoftext|>\nNaïve  café — 東京 🙂 "
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_treats_a_leading_space_as_gpt2_does(tokenizer):
    assert tokenizer.tokenize(" the") == ["Ġthe"]
    assert tokenizer.tokenize("the") == ["the"]
    # the spaces around the special token stay: the one before it alone, the one after it with its word
    assert tokenizer.tokenize("x <|endoftext|> The") == ["x", "Ġ", "<|endoftext|>", "ĠThe"]


def test_special_token_is_the_models_own(tokenizer, model):
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert ids == {model.config.bos_token_id} == {model.config.eos_token_id}
    assert len(tokenizer) == model.config.vocab_size


def test_record_names_its_data_and_not_e2e(record):
    assert set(record["data"]["files"]) == {"text/english.jsonl.gz", "webnlg/train.json", "webnlg/dev.json"}
    assert all(len(file["sha256"]) == 64 for file in record["data"]["files"].values())
    assert "wikitext-2-test" not in record["data"]["trained_on"]["english_bytes"]
    assert record["steps"] * record["tokens_per_step"] == record["tokens"]
    assert len(record["samples"]) == 2


def test_record_is_of_the_scripts_own_settings(record):
    assert record["config"] == json.loads(json.dumps(asdict(backbone.Config())))


def test_linearisation_starts_with_a_separator(data):
    texts = load_texts(data)
    assert texts.pairs == [(" | Aarhus : country : Denmark | Aarhus : country : Denmark", "Aarhus is in Denmark.")] * 2
    assert pair_line("a", "b") == " a <|endoftext|> b <|endoftext|>"


def test_windows_score_every_token_once():
    ids = list(range(1, 101))
    for length, context in ((16, 4), (100, 25), (101, 25), (200, 50)):
        scored = [t for row, first in windows(ids, length, context) for t in row[first:]]
        assert scored == ids


def test_interrupted_run_ends_with_the_same_weights(data, tmp_path, monkeypatch):
    config = tiny()
    backbone.run(data, tmp_path / "whole", config, every=2, restart=False)

    save, saves = backbone.save_checkpoint, []

    def killed_later(path, state):
        save(path, state)
        saves.append(state["step"])
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(backbone, "save_checkpoint", killed_later)
    with pytest.raises(KeyboardInterrupt):
        backbone.run(data, tmp_path / "cut", config, every=2, restart=False)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    backbone.run(data, tmp_path / "cut", config, every=2, restart=False)
    assert saves == [2, 4, 6, 8]

    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "cut")]
    for key in ("loss_curve", "held_out", "samples", "config"):
        assert records[0][key] == records[1][key]
    assert sorted(f.name for f in (tmp_path / "cut").iterdir()) == sorted(
        f.name for f in (tmp_path / "whole").iterdir()
    )


def test_budget_may_change_until_the_decay_and_not_after():
    short = tiny()
    long = replace(short, tokens=2 * short.tokens)
    assert [short.lr_at(s) for s in range(short.decay_start)] == [long.lr_at(s) for s in range(short.decay_start)]
    assert short.lr_at(short.steps - 1) < long.lr_at(short.steps - 1)


def test_checkpoint_of_another_run_is_refused(data, tmp_path, monkeypatch):
    config = tiny()
    out = tmp_path / "out"
    save = backbone.save_checkpoint

    def killed(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(backbone, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        backbone.run(data, out, config, every=7, restart=False)
    with pytest.raises(backbone.DataError, match=r"checkpoint\.pt: from a run with other settings \(lr\); --restart"):
        backbone.run(data, out, replace(config, lr=1e-3), every=7, restart=False)
    with pytest.raises(backbone.DataError, match=r"other settings \(tokens\)"):
        backbone.run(data, out, replace(config, tokens=2 * config.tokens), every=7, restart=False)
    (out / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(backbone.DataError, match=r"checkpoint\.pt: not a checkpoint of this script"):
        backbone.run(data, out, config, every=7, restart=False)


def malformed_row(folder):
    (folder / "text" / "english.jsonl.gz").write_bytes(
        gzip.compress(b'{"source": "a", "text": "b"}\n{"source": "a"}\n')
    )


def truncated(folder):
    path = folder / "text" / "english.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])


def wrong_entry(folder):
    (folder / "webnlg" / "train.json").write_text('{"entries": [{"7": {}}]}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "webnlg" / "dev.json").unlink(),
            "dev.json: cannot be read (No such file or directory)",
        ),
        (malformed_row, "english.jsonl.gz, row 2: expected a JSON object with strings source and text"),
        (truncated, "english.jsonl.gz: not gzipped UTF-8 text"),
        (wrong_entry, "train.json, entry 1: not a WebNLG entry (KeyError: '1')"),
    ],
    ids=["missing", "malformed_row", "truncated", "wrong_entry"],
)
def test_damaged_data_is_one_line_and_status_1(data, tmp_path, capsys, damage, words):
    damage(data)
    assert backbone.main(["--data", str(data), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_no_data_folder_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PREFIXATTN_DATA", raising=False)
    assert backbone.main(["--out", str(tmp_path)]) == 1
    assert "give --data or set PREFIXATTN_DATA" in capsys.readouterr().err
