"""One run: a method, a task, a rate, a seed; trained as the papers', resumed where it was stopped, scored at its end.

AdamW without weight decay, linear decay to 0 behind a linear warm-up (none, as published), gradients clipped to norm 1;
the loss is the sum over a sample's tokens, averaged over the batch (objective "sum", the original's mode 1), or the
mean over tokens. The frozen model stays in eval(). The last state counts.

Differs from the authors' code: padding repeats eos (there "[PAD]" was added to the vocabulary; neither is ever seen by
a labelled position); logits are computed where a label is, but for `original`, `peft` and `prompt`; positions are those
that the prefix leaves (there 1024). Dropout, which fine-tuning has, is drawn from (seed, step, process): with it
several processes do not equal one.
"""

import math
import random
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from bench.paper.language import backbones, encode, ranks, shared_prompts, tasks
from bench.paper.language.data import Pair, Prompt
from bench.paper.language.decode import Search, decode
from bench.paper.language.methods import Choices, tune
from bench.paper.language.webnlg import seen
from bench.paper.runs import Refusal, digest, load_state, room, save_state, thinned
from bench.paper.sweeps import settings as settings_of_runs

STATE = {"step", "trained", "optimizer", "losses", "norms", "seconds"}
SAVED_EVERY = 60.0  # seconds between checkpoints, at least
SHOWN = 5  # records whose texts a report shows beside their references
WARMED = 5  # first steps that are not timed: first touch of memory, thread pools


@dataclass(frozen=True)
class Settings(settings_of_runs.Settings):
    """All that a run's numbers depend on, beside the data, the backbone's weights and the versions of libraries."""

    WORDS: ClassVar = {
        "phase": ("search", "final"), "layers": ("all",), "objective": ("sum", "mean"),
        "positions": ("model", "shifted", "unshifted"), "moments": ("float32", "bfloat16", "8bit"),
    }  # fmt: skip
    LEAST: ClassVar = {
        "length": 1, "hidden": 1, "last": 1, "reduction": 1, "rank": 1, "epochs": 1, "subset": 0, "batch": 1,
        "accumulation": 1, "warmup": 0, "dev": 0, "search_subset": 0, "search_dev": 0, "prompts": 0, "beams": 1,
        "least_new": 0, "most_new": 1, "rows": 1, "seed": 0, "source_limit": 8, "target_limit": 4,
    }  # fmt: skip
    RATES = ("lr", "weight_decay", "clip", "length_penalty")

    task: str
    method: str
    lr: float
    weight_decay: float
    seed: int
    phase: str = "final"  # "search": scored by the loss on dev alone
    layers: str = "all"
    backbone: str = "small"
    weights: str = ""  # their digest; "": whatever is found
    length: int = 5
    hidden: int = 512
    positions: str = "model"
    labelled: bool = True
    last: int = 2
    reduction: int = 8
    rank: int = 8
    epochs: int = 5
    subset: int = 0  # training pairs, drawn with the first seed of all; 0: all
    batch: int = 10
    packed: bool = False  # the sequences of a batch behind one another, without padding
    accumulation: int = 1  # batches for one step of the optimizer
    warmup: int = 0  # steps
    clip: float = 1.0
    objective: str = "sum"
    bf16: bool = False
    checkpointing: bool = False  # activations are computed again in the backward
    moments: str = "float32"
    dev: int = 1000  # pairs; 0: all
    search_subset: int = 0  # of a run in a search; 0: as the others
    search_dev: int = 0
    prompts: int = 0  # test records that are decoded; 0: all
    beams: int = 5
    least_new: int = 0
    most_new: int = 100
    length_penalty: float = 1.0
    rows: int = 16  # prompts decoded together
    source_limit: int = encode.SOURCE  # of an encoder-decoder
    target_limit: int = encode.TARGET
    entry_zero_quirk: bool = False  # WebNLG's first entry, decoded without bars as the original does

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip == 0:
            raise Refusal("clip is 0, which would leave nothing of a gradient; expected a number above 0")
        if self.checkpointing and self.method in ("original", "peft"):
            raise Refusal(f"checkpointing and {self.method}: a checkpointed layer drops the cache with its prefix")

    def rate(self, step: int, steps: int) -> float:
        """Of the optimizer at a step, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * max(0.0, 1 - (step - self.warmup) / max(1, steps - self.warmup))


def drawn(rows: Sequence[Any], most: int) -> list[Any]:
    """The rows at `places`."""
    return [rows[place] for place in places(len(rows), most)]


def places(count: int, most: int) -> list[int]:
    """At most `most` of `count` places in their order, the same in every run; of more the fewer are a part. 0: all."""
    order = random.Random(101).sample(range(count), count)
    return sorted(order[:most] if most else order)


class Run:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.task = tasks.load(settings.task, settings.entry_zero_quirk)
        self.weights = backbones.fingerprint(settings.backbone)
        if settings.weights not in ("", self.weights):
            raise Refusal(f"{settings.backbone}: weights {self.weights}, but the run is of {settings.weights}")
        self.backbone = backbones.load(settings.backbone)
        self.device = ranks.device()
        self.backbone.model.to(self.device)
        names = {field.name for field in fields(Choices)}
        choices = Choices(**{name: value for name, value in asdict(settings).items() if name in names})
        self.tuned = tune(settings.method, self.backbone, settings.seed, choices)
        self.tuned.added.to(self.device)
        if settings.packed and not self.tuned.packs:
            raise Refusal(f"packed and {settings.method} on {settings.backbone}: it takes padded batches only")
        if settings.bf16 and settings.method != "simple":  # whose vectors go through the projections in float32
            cast_once(self.backbone.model)
        if settings.checkpointing:
            model: Any = self.backbone.model
            # transformers 5.23 renamed it
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            self.tuned.checkpointing = True
        reach = 0 if self.backbone.seq2seq else settings.most_new
        self.limit = min(encode.LIMIT, room(self.backbone.positions, self.tuned.length, reach) + reach)
        tokenizer = self.backbone.tokenizer
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def samples(self, pairs: Sequence[Pair]) -> list[Any]:
        if not self.backbone.seq2seq:
            return encode.causal(self.backbone.tokenizer, pairs, self.limit)
        return encode.seq2seq(self.backbone.tokenizer, pairs, self.settings.source_limit, self.settings.target_limit)

    def collated(self, samples: Sequence[Any], packed: bool = False) -> dict[str, Tensor]:
        if packed:
            batch = encode.collate_packed(samples)
        elif self.backbone.seq2seq:
            batch = encode.collate_seq2seq(samples, self.pad)
        else:
            batch = encode.collate(samples, self.pad)
        return {name: value.to(self.device) for name, value in batch.items()}

    def loss(self, batch: dict[str, Tensor], past: Any = None) -> Tensor:
        """The sum over labelled tokens. `past`: the cache of what lies before them."""
        with self.autocast():
            return self.tuned.loss(batch if past is None else {**batch, "past_key_values": past}).float()

    @torch.no_grad()
    def dev_loss(self, samples: Sequence[Any]) -> float:
        """Cross entropy per labelled token, in nats."""
        self.tuned.train(False)
        alone, groups = shared_prompts.parted(samples) if self.tuned.cached else (samples, [])
        alone = sorted(alone, key=encode.tokens)  # of a batch alike in length: little padding
        size = self.settings.batch
        parts: list[Any] = [*groups, *(alone[at : at + size] for at in range(0, len(alone), size))]
        total, tokens = 0.0, 0
        for part in ranks.part(parts):
            for batch, past in self.batches(part):
                total += float(self.loss(batch, past))
                tokens += self.tokens(batch["labels"])
        total, tokens_of_all = ranks.summed(total, tokens)
        return total / max(1.0, tokens_of_all)

    def batches(self, part: shared_prompts.Group | Sequence[Any]) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """Of a group with the cache of their prompts."""
        if not isinstance(part, shared_prompts.Group):
            yield self.collated(part, self.settings.packed), None
            return
        with self.autocast():
            ids = torch.tensor(part.ids, device=self.device)
            past = shared_prompts.read(self.tuned.model, ids, torch.ones_like(ids))
        for places_of, samples in part.batches(self.settings.batch):
            yield self.collated(samples), shared_prompts.picked(past, places_of)

    def tokens(self, labels: Tensor) -> int:
        return int(((labels if self.backbone.seq2seq else labels[:, 1:]) != -100).sum())

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        sources = [prompt.source for prompt in prompts]
        if self.backbone.seq2seq:
            return [
                s.source
                for s in encode.seq2seq(self.backbone.tokenizer, [(t, "") for t in sources], self.settings.source_limit)
            ]
        cut = self.limit - self.settings.most_new
        return [ids[-cut:] for ids in encode.prompt_ids(self.backbone.tokenizer, sources)]


def cast_once(model: torch.nn.Module) -> None:
    """Frozen matrices in bfloat16, in place: the numbers of autocast, which casts what takes no gradient at each call.

    A matrix that is an embedding too stays: rows that are looked up are not cast.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear | Conv1D) or weight.requires_grad or id(weight) in looked_up:
            continue
        if weight.dtype == torch.float32:  # not what is packed
            weight.data = weight.data.bfloat16()


class Loop:
    """The steps of a run; whatever stops it, the next one goes on from the last checkpoint to the same numbers."""

    def __init__(self, run: Run, samples: Sequence[Any], checkpoint: Path, key: str) -> None:
        self.run, self.samples, self.checkpoint, self.key = run, samples, checkpoint, key
        settings = run.settings
        self.rows = settings.batch * settings.accumulation  # of a step
        self.per_epoch = math.ceil(len(samples) / self.rows)
        self.steps = settings.epochs * self.per_epoch
        self.optimizer = run.tuned.optimizer(lr=settings.lr, weight_decay=settings.weight_decay)
        self.first, self.losses, self.norms, self.seconds = 0, [], [], []
        if (state := load_state(checkpoint, key, STATE)) is not None:
            run.tuned.load_state(state["trained"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.first, self.losses = state["step"], state["losses"]
            self.norms, self.seconds = state["norms"], state["seconds"]

    def order(self, epoch: int) -> list[int]:
        """A function of (seed, epoch) alone, so that a resumed run meets the same batches."""
        generator = torch.Generator().manual_seed(self.run.settings.seed * 100_003 + epoch)
        return torch.randperm(len(self.samples), generator=generator).tolist()

    def train(self) -> bool:
        """False if a loss was not finite."""
        self.run.tuned.train(True)
        order, order_of, saved = [], -1, time.perf_counter()
        for step in range(self.first, self.steps):
            epoch, at = divmod(step, self.per_epoch)
            if epoch != order_of:
                order, order_of = self.order(epoch), epoch
            began = time.perf_counter()
            loss = self.step(step, [self.samples[i] for i in order[at * self.rows : (at + 1) * self.rows]])
            self.losses.append(loss)
            if not math.isfinite(loss):
                return False
            self.seconds.append(time.perf_counter() - began)
            if time.perf_counter() - saved > SAVED_EVERY and step + 1 < self.steps:
                self.save(step + 1)
                saved = time.perf_counter()
        self.save(self.steps)  # decoding may be long
        return True

    def step(self, step: int, rows: Sequence[Any]) -> float:
        """One step of the optimizer; returns the objective, nan or infinite if it was so before the step."""
        settings, parameters = self.run.settings, [p for _, p in self.run.tuned.parameters()]
        torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + ranks.rank())  # of dropout, if any
        batches = [rows[at : at + settings.batch] for at in range(0, len(rows), settings.batch)]
        of = len(rows)
        if settings.objective == "mean":
            of = sum(self.run.tokens(self.run.collated(batch, settings.packed)["labels"]) for batch in batches)
        total = 0.0
        for batch in batches:
            mine = ranks.part(batch)
            loss = self.run.loss(self.run.collated(mine or batch[:1], settings.packed)) / of
            if not mine:  # every process goes backward as often
                loss = loss * 0.0
            total += ranks.summed(float(loss.detach()))[0]
            if not math.isfinite(total):
                return total
            (loss * ranks.size()).backward()  # gradients are averaged over the processes
        self.run.tuned.average()
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip)))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def save(self, step: int) -> None:
        if ranks.rank():
            return
        state = {
            "step": step, "trained": self.run.tuned.state(), "optimizer": self.optimizer.state_dict(),
            "losses": self.losses, "norms": self.norms, "seconds": self.seconds,
        }  # fmt: skip
        save_state(self.checkpoint, self.key, state)


def work(config: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What a worker of a sweep does, and other processes with it, if there are."""
    ranks.lead((config, str(scratch)))
    try:
        return trained_and_scored(config, scratch)
    except Refusal:
        raise
    except Exception as error:
        if ranks.size() == 1:
            raise
        traceback.print_exc()  # the others may be anywhere: torchrun ends them, and the next launch goes on
        raise SystemExit(f"{type(error).__name__} in one of {ranks.size()} processes") from None


def trained_and_scored(config: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Trains and scores one run; `scratch` holds its checkpoint and the texts written so far.

    A loss that is not finite ends it: the result says so and has no score.
    """
    settings = Settings.of(config)
    run = Run(settings)
    key = digest(asdict(settings), run.weights, run.task.sha256)
    score = "dev_loss"
    trained, searched = settings.method != "frozen", settings.phase == "search"
    loop = None
    if trained:
        pairs = drawn(run.task.train.pairs(), (settings.search_subset if searched else 0) or settings.subset)
        loop = ranks.agreed(lambda: Loop(run, run.samples(pairs), scratch / "checkpoint.pt", key))
        ranks.same("their data or their checkpoint", (key[:12], loop.first))
        if not loop.train():
            return {"diverged": len(loop.losses), score: None, "weights": run.weights, **run.tuned.numbers()}
    pairs = drawn(run.task.dev.pairs(), (settings.search_dev if searched else 0) or settings.dev)
    dev = run.dev_loss(run.samples(pairs))
    result = {
        score: dev if math.isfinite(dev) else None,
        "weights": run.weights,
        "data": run.task.where,
        "data_sha256": run.task.sha256,
        "notes": [*run.backbone.notes, *run.task.notes],
        "length": run.tuned.length,  # of a word its tokens; 0: no prefix
        **run.tuned.numbers(),
    }
    if loop is not None:
        timed = loop.seconds[WARMED:] or loop.seconds
        result |= {
            "pairs": len(loop.samples),
            "steps": loop.steps,
            "losses": thinned(loop.losses, 100),
            "norms": thinned(loop.norms, 100),  # of the gradient, before it is clipped
            "seconds_per_step": statistics.median(timed),
        }
    if settings.phase == "final":
        result |= written(run, scratch / "texts.json", key)
    return result


def written(run: Run, progress: Path, key: str) -> dict[str, Any]:
    """Texts of the test part, their scores, and how long they took."""
    settings = run.settings
    every = run.task.test.prompts()
    chosen = places(len(every), settings.prompts)
    prompts = [every[place] for place in chosen]
    search = Search(settings.beams, settings.most_new, settings.least_new, settings.length_penalty, settings.rows)
    run.tuned.train(False)
    began = time.perf_counter()
    own = progress.with_stem(f"{progress.stem}-{ranks.rank()}") if ranks.size() > 1 else progress
    texts = decode(run.tuned, run.prompt_ids(prompts), search, own, key, run.autocast)
    took = time.perf_counter() - began
    if ranks.rank():
        return {}
    scored = tasks.scores(
        run.task.name, [prompt.references for prompt in prompts], texts, [seen(prompt.category) for prompt in prompts]
    )
    shown = [chosen.index(place) for place in places(len(every), SHOWN) if place in chosen]
    records = [{"place": at, "source": prompts[at].source, "references": prompts[at].references} for at in shown]
    return {"scores": scored, "seconds_decoding": took, "decoded": len(texts), "texts": texts, "records": records}
