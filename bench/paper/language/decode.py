"""Texts by beam search, many prompts at a time; what is written is kept, and not written again.

As in the papers: beam 5 without length penalty for tables, breaks of lines banned; beam 6, penalty 0.8, 11 to 62 tokens
for XSUM. There one prompt at a time: here prompts near in length go together, padded on the left, and give the same
texts; of equal length where an encoder or PEFT reads them. In bfloat16 rounding depends on what goes together, and with
it a beam whose score is level with another's. Beam scores are divided by the number of new tokens, as transformers 5
does (there by prompt and new tokens).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper.language import ranks
from bench.paper.runs import Refusal, read_json, write_json


@dataclass(frozen=True)
class Search:
    """`least` and `most` new tokens; `rows` prompts at a time."""

    beams: int = 5
    most: int = 100
    least: int = 0
    length_penalty: float = 1.0
    rows: int = 16


def line_breaks(tokenizer: Any) -> list[list[int]]:
    """The ids of one and of two line breaks, which the papers ban; GPT-2's are [[628], [198]]."""
    words = (tokenizer("\n" * n, add_special_tokens=False)["input_ids"] for n in (2, 1))
    return [word for word in words if len(word) == 1]


def groups(prompts: Sequence[Sequence[int]], rows: int, alike: bool = False) -> list[list[int]]:
    """Places of prompts that are decoded together: at most `rows`, near in length; the same on each call.

    alike: of one length.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place])):
        same = bool(found) and len(prompts[found[-1][0]]) == len(prompts[place])
        if found and len(found[-1]) < rows and (same or not alike):
            found[-1].append(place)
        else:
            found.append([place])
    return found


def padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, S], padded on the left: what is written follows its prompt."""
    width = max(map(len, prompts))
    gaps = [width - len(ids) for ids in prompts]
    ids = [[pad] * gap + list(ids) for gap, ids in zip(gaps, prompts, strict=True)]
    return torch.tensor(ids), torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])


@torch.no_grad()
def decode(
    tuned: Any,
    prompts: Sequence[Sequence[int]],
    search: Search,
    progress: Path,
    fingerprint: str,
    autocast: Callable[[], Any],
    beat: Callable[[], None] = lambda: None,
) -> list[str]:
    """One text for each prompt's ids, on one line; an empty one is "Error", as there."""
    files = sorted(progress.parent.glob(f"{progress.stem.split('-')[0]}*.json"))  # of other numbers of processes too
    kept = ranks.agreed(lambda: [_kept(file, fingerprint) for file in files])
    done = {place: text for texts in kept for place, text in texts.items()}
    tokenizer, model = tuned.backbone.tokenizer, tuned.model
    eos = tokenizer.eos_token_id
    options: dict[str, Any] = {
        "do_sample": False, "num_beams": search.beams, "max_new_tokens": search.most,
        "length_penalty": search.length_penalty, "early_stopping": False,
        "pad_token_id": eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id, "eos_token_id": eos,
    }  # fmt: skip
    if search.least:
        options["min_new_tokens"] = search.least
    if not tuned.backbone.seq2seq:
        options["bad_words_ids"] = line_breaks(tokenizer) or None
    device = next(model.parameters()).device
    for group in ranks.part(groups(prompts, search.rows, alike=not tuned.cached)):
        if all(str(place) in done for place in group):
            continue
        ids, mask = (each.to(device) for each in padded([prompts[place] for place in group], options["pad_token_id"]))
        with autocast():
            written = tuned.generate(ids, mask, **options).tolist()
        for place, new in zip(group, written, strict=True):
            done[str(place)] = _text(tokenizer, new, tuned.backbone.seq2seq)
        write_json(progress, {"fingerprint": fingerprint, "texts": done})
        beat()
    for texts in ranks.everyones(done):
        done |= texts
    return [done[str(place)] for place in range(len(prompts))]


def _text(tokenizer: Any, ids: list[int], seq2seq: bool) -> str:
    if seq2seq:  # begins with the decoder's start, which is </s> too
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    else:
        eos = tokenizer.eos_token_id
        text = tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids, clean_up_tokenization_spaces=False)
    return " ".join(text.split()) or "Error"


def _kept(progress: Path, fingerprint: str) -> dict[str, str]:
    found = read_json(progress)
    whole = isinstance(found, dict) and isinstance(found.get("texts"), dict)
    if not whole or found.get("fingerprint") != fingerprint:
        raise Refusal(f"{progress}: texts of another run; delete it")
    return dict(found["texts"])
