"""One run: a method, a task, a rate, a seed; trained as the paper's, resumed where it was stopped, scored at its end.

SGD with momentum 0.9 (AdamW where VPT has it), rate = lr * batch / 256, stepped by epochs: epoch / warmup at first,
then a cosine to 0. Epoch 0 of the published schedule has the rate 0; `start="first"` begins with 1 / warmup. The
backbone is frozen and in eval(), a prefix's dropout is drawn for each sample. The last epoch's accuracy counts.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.paper.runs import Refusal, digest, load_state, save_state
from bench.paper.sweeps import settings as settings_of_runs
from bench.paper.visual import backbones, tasks
from bench.paper.visual.data import Part, Task
from bench.paper.visual.features import Features
from bench.paper.visual.methods import Choices, tune
from bench.paper.visual.transforms import loader, test_transform, train_transform

STATE = {"epoch", "trained", "optimizer", "curve", "waits"}
SAVED_EVERY = 30.0  # seconds between checkpoints, at least
WAIT = 0.05  # of a step: a step that waits longer for its images is not a busy one
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings(settings_of_runs.Settings):
    """All that a run's numbers depend on, beside the data, the backbone's weights and the versions of libraries."""

    WORDS: ClassVar = {
        "phase": ("search", "final"), "layers": ("all", "first"), "start": ("zero", "first"),
        "colours": ("imagenet", "backbone"), "reader": ("folder", "tfds"),
    }  # fmt: skip
    LEAST: ClassVar = {
        "length": 1, "hidden": 1, "last": 1, "reduction": 1, "rank": 1, "size": 1, "epochs": 1, "warmup": 0,
        "batch": 1, "most_test": 0, "every": 0, "seed": 0, "protocol_seed": 0,
    }  # fmt: skip
    RATES = ("lr", "weight_decay", "dropout")

    task: str
    method: str
    lr: float  # for 256 images; the paper's BASE_LR
    weight_decay: float
    seed: int
    phase: str = "final"  # "search": trained on train, scored on val; "final": on the task's final part and test
    layers: str = "all"
    length: int = 10
    dropout: float = 0.0
    hidden: int = 48
    last: int = 1
    reduction: int = 8
    rank: int = 8
    backbone: str = "vit_base_patch16_224.augreg_in21k"
    weights: str = ""  # their digest; "": whatever is found
    size: int = 224
    colours: str = "imagenet"  # mean and deviation of the pixels, the paper's; "backbone": what timm says of it
    epochs: int = 100
    warmup: int = 10
    start: str = "zero"  # or "first"
    batch: int = 64
    bf16: bool = False
    most_test: int = 0  # images of the test part, drawn once for all runs; 0: all
    every: int = 0  # epochs between points of the curve; 0: the end alone
    protocol_seed: int = 0  # of what a task draws: its 1,000 examples
    reader: str = "folder"  # of VTAB: the processed folder, or "tfds"
    shifted_labels: bool = False  # NABirds' labels as the original maps them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout >= 1:
            raise Refusal(f"dropout is {self.dropout!r}, expected less than 1")

    def rate(self, epoch: int) -> float:
        """Of the optimizer in an epoch, from 0."""
        base = self.lr * self.batch / 256
        if epoch < self.warmup:
            return base * (epoch + (self.start == "first")) / self.warmup
        return base * 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup) / max(1, self.epochs - self.warmup)))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Limited:
    """Some of a part's images."""

    part: Part
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.part.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Any:
        return self.part.image(int(self.rows[i]))


def limited(part: Part, most: int) -> Part:
    """At most `most` images, drawn with one seed whatever the run; 0: all."""
    if not 0 < most < len(part):
        return part
    return Limited(part, np.sort(np.random.default_rng(0).permutation(len(part))[:most]))


@lru_cache(maxsize=32)
def task_of(name: str, seed: int, reader: str, shifted_labels: bool) -> Task:
    """Read once for all runs of a process."""
    return tasks.load(name, seed, tfds=reader == "tfds", shifted_labels=shifted_labels)


class Run:
    """`first`: the epoch to go on with."""

    def __init__(self, settings: Settings, workers: int = 2) -> None:
        self.settings, self.workers = settings, workers
        self.task = task_of(settings.task, settings.protocol_seed, settings.reader, settings.shifted_labels)
        self.device = device()
        self.weights = backbones.fingerprint(settings.backbone)
        if settings.weights not in ("", self.weights):
            raise Refusal(f"{settings.backbone}: weights {self.weights}, but the run is of {settings.weights}")
        model, mean, std = backbones.load(settings.backbone, settings.size)
        if settings.colours == "imagenet":
            mean, std = backbones.IMAGENET
        names = {field.name for field in fields(Choices)}
        choices = Choices(**{name: value for name, value in asdict(settings).items() if name in names})
        self.tuned = tune(settings.method, model, self.task.classes, settings.seed, choices)
        self.tuned.model.to(self.device)
        self.tuned.added.to(self.device)
        self.optimizer = self.tuned.optimizer(settings.rate(0), settings.weight_decay)
        self.plain = test_transform(self.task.style, settings.size, mean, std)
        augmenting = train_transform(self.task.style, settings.size, mean, std)
        self.augmented = augmenting if self.task.style == "fgvc" else None
        self.train_part = self.task.parts["train" if settings.phase == "search" else self.task.final]
        scored = "val" if settings.phase == "search" else "test"
        self.test_part = limited(self.task.parts[scored], settings.most_test if scored == "test" else 0)
        self.forward: Callable[[Tensor], Tensor] = self.tuned
        self.before: Callable[[Tensor], Tensor] | None = None
        if self.augmented is None and Features.possible(self.tuned):
            features = Features(self.tuned)
            self.before, self.forward = features.before, features.after
        self.kept: list[Batch] | None = None  # the training images, where no augmentation changes them
        self.waits: list[float] = []  # share of each step that it waited for its images
        self.first = 0
        self.augmenting: Iterator[Batch] | None = None

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def images(self, part: Part) -> Iterator[Batch]:
        """All images of a part in their order, nothing drawn."""
        return loader(part, self.plain, max(self.settings.batch, 128), self.workers, 0, 0, False)

    @torch.no_grad()
    def made(self, part: Part) -> Batch:
        """All images of a part after the frozen blocks, on the CPU; augmented ones are never kept."""
        xs, ys = [], []
        for x, y in self.images(part):
            if self.before is not None:
                with self.autocast():
                    x = self.before(x.to(self.device)).float().cpu()
            xs.append(x)
            ys.append(y)
        return torch.cat(xs), torch.cat(ys)

    def batches(self, epoch: int) -> Iterator[Batch]:
        settings = self.settings
        if self.augmented is not None:
            if self.augmenting is None:  # one loader for all epochs, which reads ahead over their ends
                left = range(self.first, settings.epochs)
                self.augmenting = loader(
                    self.train_part, self.augmented, settings.batch, self.workers, settings.seed, left, True
                )
            yield from islice(self.augmenting, -(-len(self.train_part) // settings.batch))
            return
        if self.kept is None:
            self.kept = [self.made(self.train_part)]
        x, y = self.kept[0]
        order = torch.from_numpy(np.random.default_rng([settings.seed, epoch]).permutation(len(y)))
        for rows in order.split(settings.batch):
            yield x[rows], y[rows]

    def epoch(self, epoch: int) -> float:
        """Trains an epoch; returns its mean loss, nan if it was not finite."""
        torch.manual_seed(self.settings.seed * 100_003 + epoch)  # dropout, whether resumed or not
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(epoch)
        self.tuned.train(True)
        total, seen = 0.0, 0
        ended = time.perf_counter()
        for x, y in self.batches(epoch):
            got = time.perf_counter()
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            with self.autocast():
                logits = self.forward(x)
            loss = F.cross_entropy(logits.float(), y)
            value = float(loss.detach())
            if not math.isfinite(value):
                return math.nan
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            now = time.perf_counter()
            self.waits.append((got - ended) / (now - ended))
            ended, total, seen = now, total + value * len(y), seen + len(y)
        return total / seen

    @torch.no_grad()
    def accuracy(self, part: Part) -> float:
        """Top 1 over all of the part."""
        self.tuned.train(False)
        right = 0
        for x, y in self.images(part):
            with self.autocast():
                x = x.to(self.device)
                logits = self.forward(self.before(x) if self.before is not None else x)
            right += int((logits.float().argmax(-1).cpu() == y).sum())
        return right / len(part)


def work(config: dict[str, Any], scratch: Path, workers: int | None = None) -> dict[str, Any]:
    """Trains and scores one run; `scratch` holds its checkpoint while it is under way.

    A loss that is not finite ends it: the result says so and has no accuracy, as the published search has it.
    """
    settings = Settings.of(config)
    if workers is None:
        workers = int(os.environ.get("PREFIXATTN_LOADERS", "0"))
    run = Run(settings, workers)
    score = "val_accuracy" if settings.phase == "search" else "test_accuracy"
    key = digest(asdict(settings), run.weights)
    curve: list[list[Any]] = []
    checkpoint = scratch / "checkpoint.pt"
    if (state := load_state(checkpoint, key, STATE)) is not None:
        run.tuned.load_state(state["trained"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.first, curve, run.waits = state["epoch"], state["curve"], state["waits"]
    steps = -(-len(run.train_part) // settings.batch)
    seconds: list[float] = []
    saved = time.perf_counter()
    for epoch in range(run.first, settings.epochs):
        began = time.perf_counter()
        loss = run.epoch(epoch)
        seconds.append((time.perf_counter() - began) / steps)
        last = epoch + 1 == settings.epochs
        if math.isnan(loss):
            return {"diverged": epoch, score: None, "curve": curve, "weights": run.weights, **run.tuned.numbers()}
        scored = last or (settings.every and (epoch + 1) % settings.every == 0)
        curve.append([epoch + 1, round(loss, 5), round(run.accuracy(run.test_part), 6) if scored else None])
        if not last and time.perf_counter() - saved > SAVED_EVERY:
            state = {"epoch": epoch + 1, "trained": run.tuned.state(), "optimizer": run.optimizer.state_dict()}
            save_state(checkpoint, key, {**state, "curve": curve, "waits": run.waits[-2000:]})
            saved = time.perf_counter()
    return {
        score: curve[-1][2],
        "weights": run.weights,
        "images": {"train": len(run.train_part), "scored": len(run.test_part)},
        "classes": run.task.classes,
        "curve": curve,
        **run.tuned.numbers(),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "busy_steps": round(sum(w <= WAIT for w in run.waits) / len(run.waits), 4) if run.waits else None,
        "cached": run.before is not None,
        "notes": list(run.task.notes),
    }
