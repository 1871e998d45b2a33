"""Strings as token ids, as Li and Liang's code has them: one sequence for causal models, two for BART.

Causal: ``' source ' eos ' target ' eos``. Both eos stand for "<|endoftext|>" of GPT-2, whose tokenizer keeps the spaces
around it: a space before each eos is a token of its own (220), and there are two before the last where a target ends in
one, as E2E's do. All up to and including the first eos has no loss.

BART: ``<s> source </s>`` and ``<s> target </s>``, each cut to its own length with ``</s>`` kept. The model gets the
target shifted right by one, ``</s>`` first; ``<s>`` is the first token that it learns to write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from bench.paper.language.data import Pair
from bench.paper.runs import Refusal

IGNORED = -100  # label of a position without loss
LIMIT = 1024  # tokens of a causal sequence
SOURCE, SOURCE_OF_LI_AND_LIANG = 512, 1024  # tokens of a document with <s> and </s>
TARGET, TEST_TARGET = 60, 100  # of a summary; TARGET: train and dev


@dataclass(frozen=True)
class Sample:
    ids: list[int]
    target: int  # position of the first token with a loss


def causal(tokenizer: Any, pairs: Sequence[Pair], limit: int = LIMIT) -> list[Sample]:
    """Targets are taken as they are. Refusal if a text holds eos, or if no target begins within `limit` tokens."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise Refusal("the tokenizer has no eos token, which parts a source from its target")
    prompts = prompt_ids(tokenizer, [source for source, _ in pairs])
    targets = tokenizer([f" {target} " for _, target in pairs], add_special_tokens=False)["input_ids"]
    samples = []
    for prompt, target, pair in zip(prompts, targets, pairs, strict=True):
        if prompt.index(eos) != len(prompt) - 1 or eos in target:
            raise Refusal(f"a text holds {tokenizer.eos_token}, which ends a sequence: {' '.join(pair)[:80]!r}")
        samples.append(Sample([*prompt, *target, eos][:limit], min(len(prompt), limit)))
    if not any(sample.target < len(sample.ids) for sample in samples):
        raise Refusal(f"no text begins within {limit} tokens, those that the prefix leaves; lower its length")
    return samples


def prompt_ids(tokenizer: Any, sources: Sequence[str]) -> list[list[int]]:
    """A space, the source, a space and eos, as ids. Training sequences and prompts to decode start alike."""
    encoded = tokenizer([f" {source} " for source in sources], add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """input_ids and labels [B, S], padded on the right; labels[b, s] belongs to its id (shift them to predict)."""
    ids, labels = [sample.ids for sample in samples], [_labels(sample) for sample in samples]
    return {"input_ids": _padded(ids, pad), "labels": _padded(labels, IGNORED)}


def collate_packed(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """input_ids, position_ids and labels [1, total]: the sequences behind one another, and nothing between them."""
    rows = [{"input_ids": sample.ids, "labels": _labels(sample)} for sample in samples]
    batch: dict[str, Tensor] = DataCollatorWithFlattening()(rows)
    return batch


def _labels(sample: Sample) -> list[int]:
    return [IGNORED] * sample.target + sample.ids[sample.target :]


@dataclass(frozen=True)
class Seq2SeqSample:
    source: list[int]
    target: list[int]


def seq2seq(
    tokenizer: Any, pairs: Sequence[Pair], source_limit: int = SOURCE, target_limit: int = TARGET
) -> list[Seq2SeqSample]:
    """Refusal if the tokenizer does not put a text between <s> and </s>."""
    sources = _between(tokenizer, [source for source, _ in pairs], source_limit)
    targets = _between(tokenizer, [target for _, target in pairs], target_limit)
    return [Seq2SeqSample(source, target) for source, target in zip(sources, targets, strict=True)]


def _between(tokenizer: Any, texts: list[str], limit: int) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if any((ids[0], ids[-1]) != ends for ids in found):
        raise Refusal("the tokenizer does not put texts between <s> and </s>, as BART's does")
    return found


def tokens(sample: Sample | Seq2SeqSample) -> int:
    """How many of it the model reads."""
    return len(sample.ids) if isinstance(sample, Sample) else len(sample.source) + len(sample.target)


def collate_seq2seq(samples: Sequence[Seq2SeqSample], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S], labels [B, T] with -100 for padding, on the right; the model shifts them."""
    return {
        "input_ids": _padded([sample.source for sample in samples], pad),
        "attention_mask": _padded([[1] * len(sample.source) for sample in samples], 0),
        "labels": _padded([sample.target for sample in samples], IGNORED),
    }


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
