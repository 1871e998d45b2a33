"""A prompt is read once: for all references that it has in a loss, and for all beams that begin with it.

Attention is causal, so a prompt's keys and values are the same whatever follows. E2E has 8 references to a prompt that
is as long as they are, and transformers' beam search reads a prompt once for each of its beams.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.paper.language.encode import Sample

TOGETHER = 16  # prompts that are read together


@dataclass(frozen=True)
class Group:
    """Prompts of one length, and the samples that begin with them; `place` says with which."""

    ids: list[list[int]]  # without the last of each, which predicts a target's first token
    samples: list[tuple[int, Sample]]  # (place, last token of the prompt and the target)

    def batches(self, size: int) -> Iterator[tuple[list[int], list[Sample]]]:
        for at in range(0, len(self.samples), size):
            rows = self.samples[at : at + size]
            yield [place for place, _ in rows], [sample for _, sample in rows]


def parted(samples: Sequence[Sample]) -> tuple[list[Sample], list[Group]]:
    """Samples that share their prompt with none, and groups of the others, each alike in length: little padding."""
    same: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        same[tuple(sample.ids[: sample.target])].append(sample)
    shared = {prompt for prompt, rows in same.items() if min(len(prompt), len(rows)) > 1}
    alone = [sample for prompt, rows in same.items() if prompt not in shared for sample in rows]
    groups: list[list[tuple[int, ...]]] = []
    for prompt in sorted(shared, key=lambda prompt: (len(prompt), prompt)):
        if groups and len(groups[-1]) < TOGETHER and len(groups[-1][0]) == len(prompt):
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return alone, [_group(prompts, same) for prompts in groups]


def _group(prompts: Sequence[tuple[int, ...]], same: dict[tuple[int, ...], list[Sample]]) -> Group:
    rows = [
        (place, Sample(sample.ids[sample.target - 1 :], 1))
        for place, prompt in enumerate(prompts)
        for sample in same[prompt]
    ]
    return Group([list(prompt[:-1]) for prompt in prompts], sorted(rows, key=lambda row: len(row[1].ids)))


def read(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """The cache of prompts [B, S], padded on the left where the mask [B, S] is 0."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def picked(cache: Any, places: Sequence[int]) -> Any:
    """A cache with the rows `places` of another, which stays as it is."""
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor(places, device=cache.layers[0].keys.device))
    return cache
