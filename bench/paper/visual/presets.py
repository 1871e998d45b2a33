"""Grids by suite: files in grids/, and the paper's, made from what it publishes (paper.py)."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.paper.runs import Refusal
from bench.paper.sweeps.grid import RESERVED, Grid, grid_of, load_grid
from bench.paper.visual import paper, tasks
from bench.paper.visual.train import Settings

GRIDS = Path(__file__).resolve().parents[1] / "grids"
SUITES = ("tiny", "small", "fgvc", "vtab1k")
PRESETS = ("search", "published")
SETTINGS = tuple(field.name for field in fields(Settings) if field.name not in RESERVED)


def grid_for(suite: str, preset: str) -> Grid:
    """The grid of a suite; "published" of fgvc: the 30 settings of the scripts, without a search."""
    if suite == "fgvc":
        content = published() if preset == "published" else fgvc()
    elif preset != "search":
        raise Refusal(f"--preset {preset}: only of --suite fgvc; VTAB's rates were not published")
    elif suite == "vtab1k":
        content = vtab1k()
    else:
        return read(GRIDS / f"{suite}.toml")
    return grid_of(content, f"preset {content['name']}", SETTINGS)


def read(path: Path) -> Grid:
    return load_grid(path, SETTINGS)


def _common() -> dict[str, Any]:
    return {"backbone": paper.BACKBONE, **paper.FIXED}


def published() -> dict[str, Any]:
    methods = []
    for layers in ("all", "first"):
        for method in ("deep", "simple", "none"):
            rows = [row for row in paper.PUBLISHED if (row.layers, row.method) == (layers, method)]
            of_task = {
                row.task: {
                    "lr": [row.lr], "weight_decay": [row.weight_decay], "length": row.length, "dropout": row.dropout
                }
                for row in rows
            }  # fmt: skip
            methods.append({"name": method, "layers": layers, "label": f"{method}-{layers}", "task": of_task})
    return _grid("fgvc-published", tasks.names("fgvc"), methods)


def _searched(task_names: tuple[str, ...], rates: tuple[float, ...]) -> list[dict[str, Any]]:
    """Every method of the tables; P of each task for what has a length."""
    wide, adamw = {"lr": list(rates)}, {"lr": list(paper.LR_ADAMW)}
    linear = {"lr": list(paper.LR_VTAB)}  # VPT's for FGVC too
    decays = {"weight_decay": list(paper.WEIGHT_DECAY)}
    blocks = []
    for layers in ("all", "first"):
        for name in ("deep", "simple", "none", "vpt"):
            of_task = {task: {"length": paper.length(task, layers)} for task in task_names}
            dropout = 0.1 if layers == "all" else 0.0
            blocks.append({"name": name, "layers": layers, "label": f"{name}-{layers}", **wide, **decays,
                           "dropout": dropout, "task": of_task})  # fmt: skip
    others = {name: adamw for name in ("finetune", "partial", "bias", "adapter", "lora")}
    for name, rated in {"linear": linear, **others, "plus": wide}.items():
        blocks.append({"name": name, "layers": "all", "label": name, **rated, **decays})
    return blocks


def fgvc() -> dict[str, Any]:
    names = tasks.names("fgvc")
    return _grid("fgvc", names, _searched(names, paper.LR_FGVC))


def vtab1k() -> dict[str, Any]:
    names = tasks.names("vtab1k")
    return _grid("vtab1k", names, _searched(names, paper.LR_VTAB))


def _grid(name: str, task_names: tuple[str, ...], methods: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "tasks": list(task_names),
        "seeds": list(paper.SEEDS),
        "common": _common(),
        "methods": methods,
    }
