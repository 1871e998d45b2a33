"""Training a prefix on (source, target) strings and decoding with it: the loop of the table-to-text tasks.

As in the papers: the sequence is ``' source ' eos ' target ' eos``; all up to and including the first eos carries no
loss; the loss is the sum over a sample's tokens, averaged over the batch (objective_mode 1); AdamW without weight
decay, linear decay to 0 without warm-up, gradients clipped to norm 1; the frozen model stays in eval().

Differs from the authors' code: padding repeats eos (there '[PAD]' was added to the vocabulary; neither is ever seen by
a labelled position); sequences are cut to the model's positions less P (there 1024); prompts of equal length decode
together (there one at a time, same outputs); beam scores are divided by the number of new tokens, as transformers 5
does (there by prompt + new tokens); methods.py computes logits only where a label is, but for `original`
and `deep-all`.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import prefixattn
from bench.harness.peak_rss import PeakMemory
from methods import IGNORED, Method
from runs import Refusal, load_state, read_json, save_state, write_json

WARMUP_STEPS = 5  # not timed: first-touch of memory, thread pools


@dataclass(frozen=True)
class Schedule:
    """What training depends on, beside weights and data."""

    lr: float
    epochs: int = 1
    batch: int = 10
    clip: float = 1.0
    seed: int = 101
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    checkpoint_every: int = 200
    moments: str | tuple[str, str] = "float32"  # of FactoredAdamW; "torch": torch.optim.AdamW instead


@dataclass
class Training:
    losses: list[float] = field(default_factory=list)  # one per step
    seconds: list[float] = field(default_factory=list)  # one per step
    peak_mib: float = 0.0
    memory: str = ""  # how peak_mib was measured

    @property
    def seconds_per_step(self) -> float:
        return median(self.seconds[WARMUP_STEPS:] or self.seconds)


@dataclass(frozen=True)
class Sample:
    ids: list[int]
    target: int  # position of the first token with a loss


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]], limit: int) -> list[Sample]:
    """The papers' strings as ids; E2E's own targets end in a space, hence two spaces before the last eos."""
    eos = tokenizer.eos_token_id
    sources = prompt_ids(tokenizer, [source for source, _ in pairs])
    targets = tokenizer([f" {target}  " for _, target in pairs], add_special_tokens=False)["input_ids"]
    samples = [
        Sample((source + target + [eos])[:limit], min(len(source), limit))
        for source, target in zip(sources, targets, strict=True)
    ]
    if not any(sample.target < len(sample.ids) for sample in samples):
        raise Refusal(f"no text begins within {limit} positions, those that the prefix leaves; lower --length")
    return samples


def prompt_ids(tokenizer: Any, sources: Sequence[str]) -> list[list[int]]:
    """A space, the source, a space and eos, as ids. Training sequences and prompts to decode start alike."""
    encoded = tokenizer([f" {source} " for source in sources], add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def collate(samples: Sequence[Sample], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, both [B, S], padded on the right; labels[b, s] belongs to ids[b, s] (shift them to predict)."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), width), pad)
    labels = torch.full((len(samples), width), IGNORED)
    for row, sample in enumerate(samples):
        content = torch.tensor(sample.ids)
        ids[row, : len(content)] = content
        labels[row, sample.target : len(content)] = content[sample.target :]
    return ids, labels


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples, a function of (seed, epoch) alone, so that a resumed run meets the same batches."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()


def steps_of(n: int, schedule: Schedule) -> int:
    return schedule.epochs * math.ceil(n / schedule.batch)


def build_optimizer(method: Method, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW on what is trained; for a prefix of this library without the gradient of the network's large matrix."""
    options = {"lr": schedule.lr, "betas": schedule.betas, "eps": schedule.eps, "weight_decay": 0.0}
    if isinstance(method.prefix, prefixattn.Prefix) and schedule.moments != "torch":
        return prefixattn.FactoredAdamW(method.prefix, moments=schedule.moments, **options)
    return torch.optim.AdamW([p for p in method.prefix.parameters() if p.requires_grad], **options)


def train(
    method: Method,
    samples: Sequence[Sample],
    schedule: Schedule,
    pad: int,
    state_path: Path,
    fingerprint: str,
    label: str = "train",
    alive: Callable[[], bool] = lambda: True,
) -> Training:
    """Trains the prefix of `method`; resumes from `state_path` if it holds a state of the same fingerprint."""
    parameters = [p for p in method.prefix.parameters() if p.requires_grad]
    device = parameters[0].device
    steps, per_epoch = steps_of(len(samples), schedule), math.ceil(len(samples) / schedule.batch)
    optimizer = build_optimizer(method, schedule)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    done = Training()
    keys = {"step", "prefix", "optimizer", "decay", "rng", "training"}
    if state := load_state(state_path, fingerprint, keys):
        method.prefix.load_state_dict(state["prefix"])
        optimizer.load_state_dict(state["optimizer"])
        decay.load_state_dict(state["decay"])
        torch.set_rng_state(state["rng"])
        done = Training(**state["training"])
    meter = PeakMemory(device.type)
    peak_before = done.peak_mib
    first, order, order_epoch = (state["step"] if state else 0), [], -1
    bar = progress_bar(range(first, steps), initial=first, total=steps, desc=label, unit="step")
    for step in bar:
        epoch, at = divmod(step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(len(samples), schedule.seed, epoch), epoch
        batch = [samples[i] for i in order[at * schedule.batch : (at + 1) * schedule.batch]]
        start = time.perf_counter()
        ids, labels = (t.to(device) for t in collate(batch, pad))
        loss = method.loss(ids, labels) / len(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        done.losses.append(loss.item())
        if not math.isfinite(done.losses[-1]):
            raise Refusal(
                f"{label}: loss {done.losses[-1]} at step {step + 1}; lower the learning rate ({schedule.lr})"
            )
        norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        decay.step()
        norm.item()  # waits for the device
        done.seconds.append(time.perf_counter() - start)
        if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == steps:
            done.peak_mib, done.memory = max(peak_before, meter.mib()), meter.how
            bar.set_postfix(loss=f"{sum(done.losses[-100:]) / len(done.losses[-100:]):.2f}")
            state = {
                "step": step + 1,
                "prefix": method.prefix.state_dict(),
                "optimizer": optimizer.state_dict(),
                "decay": decay.state_dict(),
                "rng": torch.get_rng_state(),
                "training": {**vars(done)},
            }
            save_state(state_path, fingerprint, state)
        if not alive():
            raise SystemExit(1)
    return done


@torch.no_grad()
def mean_token_loss(method: Method, samples: Sequence[Sample], batch: int, pad: int, device: torch.device) -> float:
    """Cross entropy per labelled token, in nats."""
    total, tokens = 0.0, 0
    for at in range(0, len(samples), batch):
        ids, labels = (t.to(device) for t in collate(samples[at : at + batch], pad))
        total += method.loss(ids, labels).item()
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return total / max(tokens, 1)


def newline_words(tokenizer: Any) -> list[list[int]]:
    """The ids of one and of two line breaks, which the papers ban; GPT-2's are [[628], [198]]."""
    words = (tokenizer("\n" * n, add_special_tokens=False)["input_ids"] for n in (2, 1))
    return [word for word in words if len(word) == 1]


@torch.no_grad()
def decode(
    method: Method,
    tokenizer: Any,
    sources: Sequence[str],
    progress: Path,
    fingerprint: str,
    device: torch.device,
    limit: int,  # positions of the model that prompt and output may fill
    beams: int = 5,
    max_new: int = 100,
    rows: int = 16,
    label: str = "decode",
    alive: Callable[[], bool] = lambda: True,
) -> list[str]:
    """One text for each source by beam search; what is done is kept in `progress` and not done again."""
    prompts = [ids[-(limit - max_new) :] for ids in prompt_ids(tokenizer, sources)]
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):  # stable, hence the same groups on each run
        if groups and len(groups[-1]) < rows and len(prompts[groups[-1][0]]) == len(prompts[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    done: dict[str, str] = {}
    if progress.exists():
        found = read_json(progress)
        whole = isinstance(found, dict) and isinstance(found.get("texts"), dict)
        if not whole or found.get("fingerprint") != fingerprint:
            raise Refusal(f"{progress}: decoded texts of another run; delete it or choose another --out")
        done = found["texts"]
    options = {
        "do_sample": False,
        "max_new_tokens": max_new,
        "min_length": 5,
        "length_penalty": 1.0,
        "early_stopping": False,
        "bad_words_ids": newline_words(tokenizer) or None,
        "pad_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with progress_bar(total=len(prompts), initial=len(done), desc=label, unit="prompt") as bar:
        for group in groups:
            if all(str(i) in done for i in group):
                continue
            ids = torch.tensor([prompts[i] for i in group], device=device)
            for i, new in zip(group, method.generate(ids, num_beams=beams, **options).tolist(), strict=True):
                if tokenizer.eos_token_id in new:
                    new = new[: new.index(tokenizer.eos_token_id)]
                text = tokenizer.decode(new, clean_up_tokenization_spaces=False)
                done[str(i)] = " ".join(text.split()) or "Error"  # one line, whatever other tokens hold a break
            write_json(progress, {"fingerprint": fingerprint, "texts": done})
            bar.update(len(group))
            if not alive():
                raise SystemExit(1)
    return [done[str(i)] for i in range(len(prompts))]


def progress_bar(*arguments: Any, **options: Any) -> Any:
    # into a file or a log, twice a minute is enough
    return tqdm(*arguments, mininterval=1.0 if sys.stderr.isatty() else 30.0, **options)
