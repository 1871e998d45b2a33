"""Whether images arrive in time: FGVC's reading and augmenting beside a step of training, on photographs made anew.

    python bench/paper/loading.py                                    # ViT-B/16, batch 64: some ten minutes on two cores
    python bench/paper/loading.py --model vit_small_patch16_224      # a faster model waits sooner

Oxford Flowers' lists are made with as many JPEGs of 500 x 400 pixels as its train part has (1,020), and are read,
cropped and mirrored as the set itself would be. A step is busy if it waits for its images at most 5 % of its time. The
loaders run beside the model on the same cores; `images_per_second` is what they reach without it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import NOTHING, command
from bench.harness.record import RESULTS, device_slug, header, kept
from bench.paper import runs
from bench.paper.visual import fgvc, train
from bench.paper.visual.transforms import loader

SET = "flowers"
WHAT_TELLS_RUNS_APART = ("device", "capability", "threads", "torch", "commit", "tree")
SIDES = 500, 400  # pixels, as a photograph from the web; resized to 256 on its shorter side
NOISE, QUALITY = 12.0, 90  # make files of about 80 kB


def photograph(path: Path, number: int) -> None:
    """Soft fields of colour, and noise that keeps the decoder as busy as texture does."""
    draw = np.random.default_rng(number)
    field = Image.fromarray(draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)).resize(SIDES, Image.Resampling.BICUBIC)
    pixels = np.asarray(field, dtype=np.float32) + draw.normal(0, NOISE, (SIDES[1], SIDES[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def flowers(folder: Path) -> float:
    """The set's lists, with photographs for train alone; returns the mean kB of a file."""
    the = fgvc.SETS[SET]
    images = folder / "fgvc" / the.folders[0] / the.images
    for part, count in the.counts.items():
        rows = {f"{part}/{number}.jpg": number % the.classes + 1 for number in range(count)}
        lists = folder / "fgvc_splits" / the.folders[0]
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.json").write_text(json.dumps(rows))
    for number in range(the.counts["train"]):
        photograph(images / f"train/{number}.jpg", number)
    return statistics.mean(file.stat().st_size for file in images.glob("train/*.jpg")) / 1000


def measure(model: str, batch: int, loaders: int, epochs: int, bf16: bool) -> dict[str, Any]:
    settings = train.Settings(
        f"fgvc-{SET}", "deep", 0.1, 0.0, 42, dropout=0.1, backbone=f"random:{model}", epochs=epochs, warmup=0,
        batch=batch, bf16=bf16,
    )  # fmt: skip
    run = train.Run(settings, loaders)
    began = time.perf_counter()
    seen = sum(len(y) for _, y in loader(run.train_part, run.augmented, batch, loaders, 0, 0, True))
    alone = seen / (time.perf_counter() - began)
    print(f"{model}: {alone:.0f} images a second without a model", flush=True)
    seconds: list[float] = []
    for epoch in range(epochs):
        began = time.perf_counter()
        run.epoch(epoch)
        seconds.append((time.perf_counter() - began) * batch / seen)
        print(f"epoch {epoch + 1} of {epochs}: {seconds[-1]:.2f} s a step, {busy(run.waits):.1%} busy", flush=True)
    first = run.waits[: len(run.waits) // epochs]
    return {
        "model": model, "batch": batch, "loaders": loaders, "bf16": bf16, "epochs": epochs, "steps": len(run.waits),
        "seconds_per_step": round(statistics.median(seconds), 3), "images_per_second": round(alone, 1),
        "busy_steps": round(busy(run.waits), 4), "busy_steps_first_epoch": round(busy(first), 4),
        "longest_wait": round(max(run.waits), 4), "mean_wait": round(statistics.mean(run.waits), 5),
    }  # fmt: skip


def busy(waits: list[float]) -> float:
    return sum(wait <= train.WAIT for wait in waits) / len(waits)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a ViT of timm's; random weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--loaders", type=int, default=2, help="processes that read images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/loading-<device>.json")
    given = parser.parse_args(arguments)
    for name, least in (("batch", 1), ("loaders", 0), ("epochs", 1)):
        if getattr(given, name) < least:
            raise runs.Refusal(f"--{name} is {getattr(given, name)}, expected {least} or more")
    path: Path = given.out or RESULTS / f"loading-{device_slug()}.json"
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = flowers(Path(folder))
        os.environ["PREFIXATTN_DATA"] = folder
        os.environ.pop("PREFIXATTN_SPLITS", None)
        train.task_of.cache_clear()  # what was read of another folder
        row = measure(given.model, given.batch, given.loaders, given.epochs, given.bf16)
    row["kilobytes_per_image"] = round(kilobytes, 1)
    what = {key: row[key] for key in ("model", "batch", "loaders", "bf16")}
    head = header()
    before = kept(path, head, WHAT_TELLS_RUNS_APART)
    rows = [other for other in before if any(other[key] != value for key, value in what.items())]
    runs.write_json(path, head | {"op": "loading", "threads": torch.get_num_threads(), "rows": [*rows, row]})
    print(f"{row['busy_steps']:.1%} of {row['steps']} steps were busy; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(command("loading.py", main, NOTHING))
