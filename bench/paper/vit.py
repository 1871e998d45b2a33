"""A small real ViT (4.8M parameters, 64 x 64 images, patches of 8) trained on 150 classes of Tiny ImageNet.

    python bench/paper/vit.py --data FOLDER --out bench/paper/vit

An hour and a half on two cores with AMX and other work; never run on a GPU. 50 classes are held out
(visual/tiny_imagenet.py), so that the paper's study can use them. Writes the model (fp16, loads as float32 into timm's
VisionTransformer), training.json and curve.png. Interrupted, the same command goes on from the last checkpoint; until
the decay begins, with another --epochs too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import command
from bench.paper import runs
from bench.paper.runs import Refusal, load_state, move_in, save_state, write_json
from bench.paper.visual import tiny_imagenet
from bench.paper.visual.backbones import SMALL, small_vit, write_small

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Config:
    """Everything the weights depend on, beside the data and the number of threads."""

    epochs: int = 60
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 5  # epochs
    decay: float = 0.35  # share of all epochs, at the end, over which lr falls to 0
    weight_decay: float = 0.05  # matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    smoothing: float = 0.1
    mixed: float = 0.5  # share of batches with mixup or cutmix, in the first `mixed_epochs`: they slow a short training
    mixed_epochs: int = 11
    scale: tuple[float, float] = (0.35, 1.0)  # share of the image that a crop shows
    kept: float = 0.5  # share of the patches that a step sees until the decay begins; all of them from then on
    drop_path: float = 0.05
    seed: int = 101
    bf16: bool = True

    @property
    def decay_start(self) -> int:
        return self.epochs - round(self.decay * self.epochs)

    def lr_at(self, epoch: float) -> float:
        """Warm-up, constant, straight to 0. Until the decay it does not depend on `epochs`."""
        left = (self.epochs - epoch) / max(1, self.epochs - self.decay_start)
        return self.lr * min(1.0, (epoch + 1e-2) / self.warmup, left)


class Augment:
    """Batches of random crops, flips, colours, mixup and cutmix; a function of (epoch, step) alone."""

    def __init__(self, images: tiny_imagenet.Images, config: Config) -> None:
        self.pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(images.labels)
        self.classes, self.config = len(images.classes), config

    def steps(self) -> int:
        return len(self.labels) // self.config.batch

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """([batch, 3, 64, 64], [batch, classes]): images in -1 to 1, targets that sum to 1."""
        config = self.config
        random = np.random.default_rng([config.seed, epoch])
        order = random.permutation(len(self.labels))[step * config.batch : (step + 1) * config.batch]
        random = np.random.default_rng([config.seed, epoch, step])
        chosen = torch.from_numpy(order)
        x = self.pixels[chosen].float() / 127.5 - 1
        x = F.grid_sample(x, self.crops(random, len(x)), padding_mode="reflection", align_corners=False)
        x = self.coloured(random, x)
        y = F.one_hot(self.labels[chosen], self.classes).float()
        y = y * (1 - config.smoothing) + config.smoothing / self.classes
        if epoch < config.mixed_epochs and random.random() < config.mixed:
            x, y = self.mixed(random, x, y)
        return x, y

    def crops(self, random: np.random.Generator, n: int) -> Tensor:
        """Grids of RandomResizedCrop with a flip in half of them."""
        area = random.uniform(*self.config.scale, n)
        ratio = np.exp(random.uniform(math.log(3 / 4), math.log(4 / 3), n))
        wide, high = np.minimum(1, np.sqrt(area * ratio)), np.minimum(1, np.sqrt(area / ratio))
        theta = np.zeros((n, 2, 3), np.float32)
        theta[:, 0, 0] = wide * random.choice((-1, 1), n)
        theta[:, 1, 1] = high
        theta[:, 0, 2], theta[:, 1, 2] = random.uniform(-1, 1, (2, n)) * (1 - wide, 1 - high)
        size = (n, 3, tiny_imagenet.SIDE, tiny_imagenet.SIDE)
        return F.affine_grid(torch.from_numpy(theta), size, align_corners=False)

    def coloured(self, random: np.random.Generator, x: Tensor) -> Tensor:
        """Brightness, contrast and saturation by up to 40 %."""
        light, contrast, colour = torch.from_numpy(random.uniform(0.6, 1.4, (3, len(x), 1, 1, 1)).astype(np.float32))
        x = (x + 1) * light - 1
        x = (x - x.mean((1, 2, 3), keepdim=True)) * contrast + x.mean((1, 2, 3), keepdim=True)
        grey = x.mean(1, keepdim=True)
        return (grey + (x - grey) * colour).clamp_(-1, 1)

    def mixed(self, random: np.random.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Half mixup (beta 0.8), half cutmix (beta 1), each with the batch backwards."""
        other_x, other_y = x.flip(0), y.flip(0)
        if random.random() < 0.5:
            share = float(random.beta(0.8, 0.8))
            return share * x + (1 - share) * other_x, share * y + (1 - share) * other_y
        side = tiny_imagenet.SIDE
        edge = side * math.sqrt(1 - random.beta(1.0, 1.0))
        row, column = random.uniform(0, side, 2)
        top, bottom = (int(np.clip(row + sign * edge / 2, 0, side)) for sign in (-1, 1))
        left, right = (int(np.clip(column + sign * edge / 2, 0, side)) for sign in (-1, 1))
        x = x.clone()
        x[:, :, top:bottom, left:right] = other_x[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / side**2
        return x, share * y + (1 - share) * other_y


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "pos_embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() <= 1 or "pos_embed" in name]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: tiny_imagenet.Images, device: torch.device, batch: int = 500) -> float:
    model.eval()
    right = 0
    for at in range(0, len(images.labels), batch):
        x = torch.from_numpy(images.pixels[at : at + batch]).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16):
            found = model(x).argmax(-1).cpu().numpy()
        right += int((found == images.labels[at : at + batch]).sum())
    model.train()
    return right / len(images.labels)


STATE = {"epoch", "seconds", "curve", "model", "optimizer", "config"}


def go_on(path: Path, key: str, config: Config) -> dict[str, Any] | None:
    """The state of an interrupted run of these settings; before the decay, also of other epochs."""
    state = load_state(path, key, STATE)
    if state is not None:
        saved, asked = state["config"], asdict(config)
        before_decay = state["epoch"] <= min(config.decay_start, Config(**saved).decay_start)
        free = {"epochs", "decay"} if before_decay else set()
        if differing := [name for name in asked if saved.get(name) != asked[name] and name not in free]:
            raise Refusal(f"{path}: from a run with other {', '.join(differing)}; --restart ignores it")
    return state


def train(config: Config, key: str, data: dict[str, tiny_imagenet.Images], out: Path, device: torch.device):
    """Trains to the end; returns (model, curve of [epoch, loss, accuracy], seconds)."""
    torch.manual_seed(config.seed)
    model = small_vit(classes=len(data["train"].classes), patch_drop_rate=1 - config.kept, drop_path=config.drop_path)
    model = model.to(device).train()
    optimizer = build_optimizer(model, config)
    first, seconds, curve = 0, 0.0, []
    if (state := go_on(out / "checkpoint.pt", key, config)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, curve = state["epoch"], state["seconds"], state["curve"]
        print(f"going on after epoch {first}", flush=True)
    augment = Augment(data["train"], config)
    began = time.perf_counter() - seconds
    for epoch in range(first, config.epochs):
        if epoch >= config.decay_start:
            model.patch_drop = nn.Identity()
        torch.manual_seed(config.seed * 1_000 + epoch)  # dropped patches and paths, whether resumed or not
        total = 0.0
        for step in range(augment.steps()):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(epoch + step / augment.steps())
            x, y = augment.batch(epoch, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                logits = model(x.to(device, non_blocking=True))
            loss = F.cross_entropy(logits.float(), y.to(device, non_blocking=True))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() if device.type == "cpu" or step % 20 == 0 else 0.0
            if step % 20 == 0 and sys.stderr.isatty():
                print(f"\repoch {epoch + 1}, step {step}/{augment.steps()}", end="", file=sys.stderr, flush=True)
        seen = augment.steps() if device.type == "cpu" else len(range(0, augment.steps(), 20))
        last = epoch + 1 == config.epochs
        right = accuracy(model, data["val"], device) if last or (epoch + 1) % 5 == 0 else None
        curve.append([epoch + 1, round(total / seen, 4), right])
        elapsed = time.perf_counter() - began
        tail = "" if right is None else f", accuracy {right:.3f}"
        print(f"epoch {epoch + 1}/{config.epochs}: loss {total / seen:.3f}{tail}, {elapsed:.0f} s", flush=True)
        state = {"epoch": epoch + 1, "seconds": elapsed, "curve": curve, "config": asdict(config)}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_state(out / "checkpoint.pt", key, state)
    return model, curve, time.perf_counter() - began


def plot(folder: Path) -> None:
    """curve.png from training.json."""
    from matplotlib.figure import Figure

    record = json.loads((folder / "training.json").read_text())
    left, right = (figure := Figure(figsize=(7, 3), layout="constrained")).subplots(1, 2)
    left.plot([row[0] for row in record["curve"]], [row[1] for row in record["curve"]])
    left.set(xlabel="epoch", ylabel="loss (mixed, smoothed)")
    scored = [(row[0], 100 * row[2]) for row in record["curve"] if row[2] is not None]
    right.plot(*zip(*scored, strict=True), marker="o", markersize=3)
    right.set(xlabel="epoch", ylabel="accuracy on validation, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(folder / "curve.png", dpi=90)


def run(folder: Path, out: Path, config: Config, restart: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, new = out / "checkpoint.pt", out / "new"
    if restart:
        checkpoint.unlink(missing_ok=True)
    elif (out / "training.json").exists() and not checkpoint.exists():
        print(f"{out / 'training.json'} is there: trained already; --restart trains anew")
        return
    classes = [wnid for wnid in tiny_imagenet.all_classes(folder) if wnid not in tiny_imagenet.HELD_OUT]
    files = tiny_imagenet.fingerprint(folder)
    data = {part: tiny_imagenet.read(folder, part, classes) for part in ("train", "val")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key = json.dumps([files, SMALL], sort_keys=True)
    model, curve, seconds = train(config, key, data, out, device)

    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    write_small(model, new / "model.safetensors", classes)
    model.patch_drop = nn.Identity()
    rounded = model.half().float()  # what is scored is what is shipped
    record = {
        "model": SMALL,
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": asdict(config),
        "optimizer": "AdamW; lr: linear warm-up, constant, linear to 0 over the last share `decay`",
        "data": {"files": files, "classes": len(classes), "held_out": list(tiny_imagenet.HELD_OUT)},
        "images": {part: len(images.labels) for part, images in data.items()},
        "accuracy": accuracy(rounded.to(device), data["val"], device),
        "seconds": round(seconds, 1),
        "device": runs.device_name(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "curve": curve,
    }
    write_json(new / "training.json", record)
    plot(new)
    move_in(new, out, "training.json")
    checkpoint.unlink(missing_ok=True)
    images = f"{len(data['val'].labels):,} validation images of {len(classes)} classes"
    print(f"accuracy on the {images}: {record['accuracy']:.3f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFIXATTN_DATA"), help="or PREFIXATTN_DATA")
    parser.add_argument("--out", type=Path, default=Path("build/vit"))
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--restart", action="store_true", help="ignore a checkpoint or a finished run in --out")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.data is None:
            raise Refusal("no data folder: give --data or set PREFIXATTN_DATA")
        if args.epochs < 1:
            raise Refusal(f"--epochs is {args.epochs}, expected 1 or more")
        folder = Path(args.data)
        folder = folder / "tiny_imagenet" if (folder / "tiny_imagenet").is_dir() else folder
        run(folder, args.out, Config(epochs=args.epochs, seed=args.seed), args.restart)

    return command("vit.py", work, f"the same command goes on from {args.out / 'checkpoint.pt'}")


if __name__ == "__main__":
    sys.exit(main())
