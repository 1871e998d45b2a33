"""Token ids of the originals: the space before each eos, what has a loss, where sequences are cut; BART's two texts."""

import json
from statistics import mean
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BartTokenizer, GPT2Tokenizer
from transformers.models.bart.modeling_bart import shift_tokens_right

from bench.paper.language import e2e, encode, webnlg
from bench.paper.language.data import Pair
from bench.paper.runs import Refusal
from tests.data_folder import data_path

SPACE, EOS = 220, 50256  # of GPT-2
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # BART's ids 0 to 3


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return GPT2Tokenizer.from_pretrained(data_path("gpt2_bpe", "merges.txt").parent)


def bytes_tokenizer(eos: str) -> Any:
    """A token for each byte, then `eos`."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate((*alphabet, eos))}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], bos_token=eos, eos_token=eos, unk_token=eos)


def bart_tokenizer(pieces: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """BART's special tokens in BART's places, and after them `pieces` in their order."""
    vocabulary = {token: at for at, token in enumerate(SPECIAL)}
    vocabulary |= {token: at + len(SPECIAL) for token, at in pieces.items()}
    return BartTokenizer(vocab={**vocabulary, "<mask>": len(vocabulary)}, merges=merges)


@pytest.fixture(scope="module")
def bart() -> Any:
    return bart_tokenizer({token: at for at, token in enumerate(sorted(ByteLevel.alphabet()))}, [])


def labelled(sample: encode.Sample) -> list[int]:
    return encode.collate([sample], pad=EOS)["labels"][0].tolist()


# --- causal models ---


@pytest.fixture(scope="module")
def e2e_pairs() -> list[Pair]:
    return e2e.read(data_path("e2e", "devset.csv").parent, "dev").pairs()


@pytest.fixture(scope="module")
def webnlg_pairs() -> list[Pair]:
    return webnlg.read(data_path("webnlg", "train.json").parent, "train").pairs()


def test_the_first_ids_of_webnlg_are_the_originals(gpt2: Any, webnlg_pairs: list[Pair]) -> None:
    (sample,) = encode.causal(gpt2, webnlg_pairs[:1])
    source = [930, 317, 283, 7537, 62, 16170, 634, 1058, 1748, 50, 8520, 1058, 366, 32, 283, 7537, 11, 16490, 1]
    target = [383, 317, 283, 7537, 318, 262, 9003, 286, 317, 283, 7537, 11, 16490, 13]
    assert sample.ids == [SPACE, *source, SPACE, EOS, *target, SPACE, EOS]  # the first: a space before the leading bar
    assert labelled(sample) == [-100] * (len(source) + 3) + [*target, SPACE, EOS]


def test_the_ids_of_an_e2e_row_are_the_originals(gpt2: Any) -> None:
    pair = ("name : Alimentum | area : riverside", "Alimentum is by the river . ")
    (sample,) = encode.causal(gpt2, [pair])
    source = gpt2(" name : Alimentum | area : riverside")["input_ids"]
    target = gpt2(" Alimentum is by the river .")["input_ids"]
    assert sample.ids == [*source, SPACE, EOS, *target, SPACE, SPACE, EOS]
    assert labelled(sample) == [-100] * (len(source) + 2) + [*target, SPACE, SPACE, EOS]


@pytest.mark.parametrize("name, spaces", [("e2e_pairs", 2), ("webnlg_pairs", 1)])
def test_ids_are_those_of_the_originals_string_as_a_whole(
    name: str, spaces: int, gpt2: Any, request: pytest.FixtureRequest
) -> None:
    pairs = request.getfixturevalue(name)[::40]
    strings = [f" {source} <|endoftext|> {target} <|endoftext|>" for source, target in pairs]
    samples = encode.causal(gpt2, pairs)
    assert [sample.ids for sample in samples] == gpt2(strings)["input_ids"]
    for sample in samples:
        assert sample.ids.index(EOS) == sample.target - 1
        assert sample.ids[sample.target - 2] == SPACE != sample.ids[sample.target]
        assert sample.ids[-spaces - 2 :].count(SPACE) == spaces
        assert sample.ids[-spaces - 1 :] == [SPACE] * spaces + [EOS]


def test_packed_sequences_follow_one_another_with_positions_of_their_own(gpt2: Any) -> None:
    samples = encode.causal(gpt2, [("name : A", "A."), ("name : B | area : riverside", "B is by the river.")])
    batch = encode.collate_packed(samples)
    assert batch["input_ids"].tolist() == [samples[0].ids + samples[1].ids]
    assert batch["labels"].tolist() == [labelled(samples[0]) + labelled(samples[1])]
    assert batch["position_ids"].tolist() == [[*range(len(samples[0].ids)), *range(len(samples[1].ids))]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}


def test_the_prompt_of_a_record_begins_its_training_sequence(gpt2: Any) -> None:
    part = webnlg.read(data_path("webnlg", "test.json").parent, "test")
    prompts = encode.prompt_ids(gpt2, [prompt.source for prompt in part.prompts()])
    assert max(map(len, prompts)) == 165
    samples = encode.causal(gpt2, [(record.source, record.references[0]) for record in part.records[:50]])
    assert [sample.ids[: sample.target] for sample in samples] == prompts[:50]


@pytest.mark.parametrize(
    "folder, file, average, longest", [("e2e", "trainset.csv", 56.3, 118), ("webnlg", "train.json", 80.3, 261)]
)
def test_lengths_are_as_measured_on_the_originals(
    folder: str, file: str, average: float, longest: int, gpt2: Any
) -> None:
    """Of a twentieth of the rows, and of the hundred that have the most characters."""
    reader = {"e2e": e2e, "webnlg": webnlg}[folder]
    pairs = reader.read(data_path(folder, file).parent, "train").pairs()
    assert mean(len(sample.ids) for sample in encode.causal(gpt2, pairs[::20])) == pytest.approx(average, rel=0.01)
    wordy = sorted(pairs, key=lambda pair: len("".join(pair)))[-100:]
    assert max(len(sample.ids) for sample in encode.causal(gpt2, wordy)) == longest


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_another_tokenizer_has_the_same_form_with_its_own_eos(eos: str) -> None:
    tokenizer = bytes_tokenizer(eos)
    assert tokenizer.eos_token_id == 256
    (sample,) = encode.causal(tokenizer, [("ab", "c")])
    assert tokenizer.convert_ids_to_tokens(sample.ids) == ["Ġ", "a", "b", "Ġ", eos, "Ġ", "c", "Ġ", eos]
    assert sample.target == 5


def test_a_tokenizer_adds_no_tokens_of_its_own_to_a_sequence(bart: Any) -> None:
    (sample,) = encode.causal(bart, [("ab", "c")])
    assert bart.convert_ids_to_tokens(sample.ids) == ["Ġ", "a", "b", "Ġ", "</s>", "Ġ", "c", "Ġ", "</s>"]


def test_sequences_are_cut_at_the_limit() -> None:
    tokenizer = bytes_tokenizer("<|endoftext|>")
    pairs = [("a" * 2000, "b"), ("a", "b" * 2000), ("a", "b")]
    whole = encode.causal(tokenizer, pairs, limit=10_000)
    cut = encode.causal(tokenizer, pairs)
    assert [len(sample.ids) for sample in cut] == [1024, 1024, 8]
    assert [sample.ids for sample in cut] == [sample.ids[:1024] for sample in whole]
    assert [sample.target for sample in cut] == [1024, 4, 4]
    batch = encode.collate(cut, pad=0)
    assert (batch["labels"] != -100).sum(1).tolist() == [0, 1020, 4]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 1024)
    assert batch["input_ids"][2].tolist() == cut[2].ids + [0] * 1016
    with pytest.raises(Refusal, match="no text begins within 1024 tokens"):
        encode.causal(tokenizer, pairs[:1])


@pytest.mark.parametrize("pair", [("a <|endoftext|>", "b"), ("a", "b<|endoftext|>c")])
def test_a_text_that_holds_eos_is_refused(pair: Pair) -> None:
    with pytest.raises(Refusal, match=r"a text holds <\|endoftext\|>, which ends a sequence: 'a"):
        encode.causal(bytes_tokenizer("<|endoftext|>"), [("a", "b"), pair])


def test_a_tokenizer_without_eos_is_refused(bart: Any) -> None:
    bart = bart_tokenizer({"a": 0}, [])
    bart.eos_token = None
    with pytest.raises(Refusal, match="no eos token"):
        encode.causal(bart, [("a", "b")])


# --- BART ---


def test_bart_has_the_pieces_of_gpt2_between_its_own_ends(gpt2: Any) -> None:
    pieces = json.loads(data_path("gpt2_bpe", "vocab.json").read_text(encoding="utf-8"))
    lines = data_path("gpt2_bpe", "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines[1:] if line.strip())]
    document = "A court heard \u2013 today \u2013 that  nobody came. It's over, said Zoë."
    (sample,) = encode.seq2seq(bart_tokenizer(pieces, merges), [(document, " Nobody came.")])
    assert sample.source == [0, *(at + 4 for at in gpt2(document)["input_ids"]), 2]
    assert sample.target == [0, *(at + 4 for at in gpt2(" Nobody came.")["input_ids"]), 2]


def test_bart_cuts_each_text_at_its_own_length_and_keeps_the_end(bart: Any) -> None:
    pair = ("d" * 2000, "s" * 2000)
    letters = {letter: bart.convert_tokens_to_ids(letter) for letter in "ds"}
    limits = {
        (512, 60): {},
        (1024, 100): {"source_limit": encode.SOURCE_OF_LI_AND_LIANG, "target_limit": encode.TEST_TARGET},
    }
    for (source, target), options in limits.items():
        (sample,) = encode.seq2seq(bart, [pair], **options)
        assert sample.source == [0, *[letters["d"]] * (source - 2), 2]
        assert sample.target == [0, *[letters["s"]] * (target - 2), 2]
    (short,) = encode.seq2seq(bart, [("d", "s")])
    assert (short.source, short.target) == ([0, letters["d"], 2], [0, letters["s"], 2])


def test_bart_batches_are_padded_and_the_model_shifts_their_labels(bart: Any) -> None:
    samples = encode.seq2seq(bart, [("ddd", "s"), ("d", "ss")])
    d, s = bart.convert_tokens_to_ids("d"), bart.convert_tokens_to_ids("s")
    batch = encode.collate_seq2seq(samples, bart.pad_token_id)
    assert batch["input_ids"].tolist() == [[0, d, d, d, 2], [0, d, 2, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[0, s, 2, -100], [0, s, s, 2]]
    # as the originals', who bring the last token that is not padding to the front
    shifted = shift_tokens_right(batch["labels"], pad_token_id=1, decoder_start_token_id=2)
    assert shifted.tolist() == [[2, 0, s, 2], [2, 0, s, s]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_a_tokenizer_that_adds_no_ends_is_refused() -> None:
    with pytest.raises(Refusal, match="does not put texts between <s> and </s>"):
        encode.seq2seq(bytes_tokenizer("</s>"), [("a", "b")])
