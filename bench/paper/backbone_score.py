"""Held-out perplexity and samples of the small GPT-2 backbone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from bench.paper.backbone_data import EOS, Texts, pair_line

Row = tuple[list[int], int]  # ids, and the position of the first one that is scored


def windows(ids: list[int], length: int, context: int) -> list[Row]:
    """Running text after an <|endoftext|> (id 0), each token scored once, with at least `context` tokens ahead of it
    (but for the first window)."""
    ids = [0, *ids]
    rows = [(ids[:length], 1)]
    for start in range(length - context, len(ids) - context, length - context):
        rows.append((ids[start : start + length], context))
    return rows


@torch.no_grad()
def nats(model: GPT2LMHeadModel, rows: list[Row], batch: int = 8) -> tuple[float, int]:
    """Sum of the negative log-likelihood over the scored tokens, and their number."""
    total, count = 0.0, 0
    rows = sorted(rows, key=lambda row: len(row[0]))  # rows of a batch alike in length: little padding
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        width = max(len(ids) for ids, _ in part)
        inputs = torch.zeros(len(part), width, dtype=torch.long)
        targets = torch.full((len(part), width), -100)
        for b, (ids, first) in enumerate(part):
            inputs[b, : len(ids)] = torch.tensor(ids)
            targets[b, first : len(ids)] = inputs[b, first : len(ids)]
        logits = model(inputs[:, :-1], use_cache=False).logits.float()  # padding is at the end: causality hides it
        total += F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum").item()
        count += int((targets[:, 1:] >= 0).sum())
    return total, count


def score(model: GPT2LMHeadModel, rows: list[Row], texts: list[str]) -> dict[str, float]:
    total, count = nats(model, rows)
    words, size = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
    return {
        "per_token": round(math.exp(total / count), 3),
        "per_word": round(math.exp(total / words), 3),
        "bits_per_byte": round(total / math.log(2) / size, 4),
        "tokens": count,
        "words": words,
        "bytes": size,
    }


def held_out_scores(model: GPT2LMHeadModel, tokenizer: Tokenizer, texts: Texts) -> dict[str, Any]:
    """wikitext-2-test as running text; WebNLG dev texts (with the <|endoftext|> that ends them) given triples."""
    length = model.config.n_positions
    running = [w for text in texts.held_out_documents for w in windows(tokenizer.encode(text).ids, length, length // 4)]
    pairs: list[Row] = []
    for encoding in tokenizer.encode_batch([pair_line(*pair) for pair in texts.held_out_pairs]):
        ids = encoding.ids[:length]
        pairs.append((ids, ids.index(0) + 1))
    return {
        "wikitext-2-test": score(model, running, texts.held_out_documents),
        "webnlg-dev, text given triples": score(model, pairs, [text for _, text in texts.held_out_pairs]),
    }


def quick_score(model: GPT2LMHeadModel, tokenizer: Tokenizer, texts: Texts) -> float:
    """Nats per token over the first 8,000 or so tokens of the held-out running text, for the curve."""
    length = model.config.n_positions
    ids = tokenizer.encode(texts.held_out_documents[0][:25_000]).ids
    total, count = nats(model, windows(ids, length, length // 4)[:16])
    return total / count


def samples(model: GPT2LMHeadModel, tokenizer: Tokenizer, texts: Texts, seed: int) -> list[dict[str, str]]:
    """One continuation of running text and one table-to-text line from the held-out part, sampled."""
    found = []
    source = texts.held_out_pairs[0][0]
    for prompt, most in (("The new government said that", 80), (f" {source} {EOS}", 60)):
        torch.manual_seed(seed)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=40,
            temperature=0.8,
            max_new_tokens=min(most, model.config.n_positions - ids.shape[1]),
            pad_token_id=0,
        )
        found.append({"prompt": prompt, "continuation": tokenizer.decode(out[0, ids.shape[1] :].tolist())})
    return found
