"""What to run: grids in grids/, and the papers' settings as they published them."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.paper import bfloat16
from bench.paper.language import backbones
from bench.paper.language.train import Settings
from bench.paper.runs import Refusal
from bench.paper.sweeps.grid import RESERVED, Grid, Score, grid_of, load_grid

GRIDS = Path(__file__).resolve().parents[1] / "grids" / "language"
SUITES = ("demo", "smollm2", "smollm2-all", "gpt2-medium", "gpt2-large", "bart-large")
SETTINGS = tuple(field.name for field in fields(Settings) if field.name not in RESERVED)
DEV_LOSS = Score("dev_loss", larger=False)
SEED = 101  # the papers' only one
TABLE_TO_TEXT = {  # ReparamPrefix's README: task, batch, Deep-share's rate, No-share's
    "e2e": (10, 1e-4, 1e-2),
    "webnlg": (5, 1e-4, 5e-2),
}


def grid_for(suite: str) -> Grid:
    if suite in ("smollm2", "smollm2-all"):
        return read(GRIDS / f"{suite}.toml")
    if suite == "demo":
        content = demo()
    elif suite == "bart-large":
        content = summaries()
    elif suite in SUITES:
        content = tables(suite)
    else:
        raise Refusal(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    return grid_of(content, f"preset {suite}", SETTINGS, DEV_LOSS)


def read(path: Path) -> Grid:
    return load_grid(path, SETTINGS, DEV_LOSS)


def demo() -> dict[str, Any]:
    """Minutes: SmolLM2, or where its wheel cannot be had our own small GPT-2, on a part of E2E."""
    common = {"length": 10, "epochs": 1, "batch": 10, "hidden": 512, "dev": 100, "prompts": 40}
    try:
        backbones.smollm2()
    except Refusal as refusal:
        print(f"{refusal}. The demo takes our own GPT-2 of 4M instead, which copies names badly.", file=sys.stderr)
        name = "demo-small"
        common |= {"backbone": backbones.SMALL, "subset": 4_000, "prompts": 60, "dev": 300}
        rates = {"deep": 1e-3, "none": 3e-1}
    else:
        bf16 = bfloat16.is_fast()
        name = "demo" if bf16 else "demo-float32"
        common |= {"backbone": backbones.SMOLLM2, "subset": 600, "warmup": 10, "bf16": bf16}
        rates = {"deep": 2e-3, "none": 2e-2}
    methods = [
        {"name": name, "layers": "all", "label": name, "lr": [lr], "weight_decay": [0.0]} for name, lr in rates.items()
    ]
    return {"name": name, "tasks": ["e2e"], "seeds": [SEED], "common": common, "methods": methods}


def tables(model: str) -> dict[str, Any]:
    """GPT-2 on E2E and WebNLG: P 5, five epochs; No-share with P free rows, and from the one token of a word."""
    rates = {
        "deep": {task: {"lr": [deep]} for task, (_, deep, _) in TABLE_TO_TEXT.items()},
        "none": {task: {"lr": [free]} for task, (_, _, free) in TABLE_TO_TEXT.items()},
    }
    methods = []
    for name, like in (("deep", "deep"), ("original", "deep"), ("none", "none"), ("none-word", "none")):
        methods.append(_method(name, rates[like]))
    return {
        "name": model,
        "tasks": list(TABLE_TO_TEXT),
        "seeds": [SEED],
        "common": {"backbone": model, "length": 5, "epochs": 5, "batch": 10, "hidden": 512, "dev": 5_000},
        "task": {task: {"batch": batch} for task, (batch, _, _) in TABLE_TO_TEXT.items()},
        "methods": methods,
    }


def summaries() -> dict[str, Any]:
    """BART on XSUM: P 200, thirty epochs, half precision; beams of six, 11 to 62 tokens, length penalty 0.8."""
    common = {
        "backbone": "facebook/bart-large", "length": 200, "epochs": 30, "batch": 16, "hidden": 512, "bf16": True,
        "objective": "mean", "beams": 6, "least_new": 11, "most_new": 62, "length_penalty": 0.8, "dev": 500,
        "source_limit": 512, "target_limit": 60,
    }  # fmt: skip
    methods = [_method("deep", {"xsum": {"lr": [5e-5]}}), _method("none", {"xsum": {"lr": [5e-4]}})]
    return {"name": "bart-large", "tasks": ["xsum"], "seeds": [SEED], "common": common, "methods": methods}


def _method(name: str, of_task: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "layers": "all", "label": name, "weight_decay": [0.0], "task": of_task}
