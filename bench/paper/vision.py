"""The paper's vision half: prefixes that share between key and value against those that do not, and the baselines.

    python bench/paper/vision.py --suite tiny                       # train to report in two minutes, nothing to fetch
    python bench/paper/vision.py --suite small --data FOLDER        # the study of this repository, hours on two cores
    python bench/paper/vision.py --suite fgvc --preset published --data FOLDER    # the 30 published settings
    python bench/paper/vision.py --suite fgvc --data FOLDER         # the paper's search over rates, then five seeds
    python bench/paper/vision.py --suite vtab1k --data FOLDER --launcher slurm --workers 64
    python bench/paper/vision.py check --suite vtab1k --data FOLDER # what of the data is there; published counts
    python bench/paper/vision.py status --suite small               # what is done, running, failed and left
    python bench/paper/vision.py report --suite small               # tables, figure and page from finished runs

A run is a name and a JSON in --out; finished runs are never repeated, and whatever is killed is taken up again. The
data folder has fgvc/ (images), fgvc_splits/, vtab-1k/, cifar10/, tiny_imagenet/; `check` says what is to be had where.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import command
from bench.harness.peak_rss import keep_memory
from bench.paper import runs
from bench.paper.sweeps import options
from bench.paper.sweeps.grid import Grid
from bench.paper.sweeps.ledger import Ledger
from bench.paper.visual import presets
from bench.paper.visual.train import Settings

HERE = Path(__file__).resolve().parent
VERBS = ("run", "check", "status", "report")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, default="run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suite", choices=presets.SUITES, help="default: tiny")
    what.add_argument("--grid", type=Path, help="a grid file (bench/paper/grids/ has some)")
    parser.add_argument("--preset", choices=presets.PRESETS, default="search")
    parser.add_argument("--data", type=Path, help="default: PREFIXATTN_DATA")
    parser.add_argument("--splits", type=Path, help="FGVC's JSON splits (default: DATA/fgvc_splits)")
    parser.add_argument("--tfds", type=Path, help="read VTAB by tensorflow_datasets from this folder")
    parser.add_argument("--shifted-labels", action="store_true", help="NABirds' labels as the original maps them")
    parser.add_argument("--backbone", help="over the grid's: small, focus, a name of timm's, NAME=FILE, random:NAME")
    parser.add_argument("--size", type=int, help="over the grid's: pixels of an image's side")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--loaders", type=int, default=2, help="processes that read images for a run of FGVC")
    options.add(parser, "vision")
    parser.add_argument("--deep", action="store_true", help="check: decode every image")
    return parser.parse_args(arguments)


def grid_of(given: argparse.Namespace) -> Grid:
    """The whole grid, with what the command line says over its settings."""
    from bench.paper.visual import backbones

    grid = presets.read(given.grid) if given.grid else presets.grid_for(given.suite or "tiny", given.preset)
    over: dict[str, object] = {}
    if given.backbone:
        name, _, file = given.backbone.partition("=")
        if file and not Path(file).is_file():
            raise runs.Refusal(f"--backbone {name}={file}: no such file")
        if file:
            os.environ["PREFIXATTN_WEIGHTS"] = str(Path(file).resolve())
        over["backbone"] = name
    if given.size is not None:
        over["size"] = given.size
    over |= {"bf16": True} if given.bf16 else {}
    over |= {"shifted_labels": True} if given.shifted_labels else {}
    over |= {"reader": "tfds"} if given.tfds else {}
    methods = []
    for method in grid.methods:
        settings = {**method.settings, **over}
        settings["weights"] = backbones.fingerprint(settings.get("backbone", Settings.backbone))
        methods.append(replace(method, settings=settings))
    return replace(grid, methods=tuple(methods))


def environment(given: argparse.Namespace) -> dict[str, str]:
    """Where things are: what every worker must know and no run's numbers depend on."""
    for name, value in (("DATA", given.data), ("SPLITS", given.splits), ("TFDS", given.tfds)):
        if value is not None:
            if not value.is_dir():
                raise runs.Refusal(f"--{name.lower()} {value}: no such folder")
            os.environ[f"PREFIXATTN_{name}"] = str(value.resolve())
    os.environ["PREFIXATTN_LOADERS"] = str(given.loaders)
    return options.variables()


def readable(grid: Grid) -> None:
    """Reads each task and backbone once, before workers would fail one by one."""
    from bench.paper import bfloat16
    from bench.paper.visual import backbones, train

    bfloat16.warn_if_slow(any(method.settings.get("bf16", Settings.bf16) for method in grid.methods))
    for method in grid.methods:
        settings = Settings(method.task, method.name, 0.0, 0.0, 0, **method.settings)
        train.task_of(settings.task, settings.protocol_seed, settings.reader, settings.shifted_labels)
    for name, size in {(m.settings.get("backbone", ""), m.settings.get("size", 224)) for m in grid.methods}:
        backbones.load(name or Settings.backbone, size)


def run(given: argparse.Namespace, whole: Grid, out: Path) -> int:
    from bench.paper.visual import report

    options.check(given, {"loaders": 0})
    grid, ledger = whole.only(given.tasks, given.methods), Ledger(out)
    readable(grid)
    failed = options.run(given, grid, ledger, "bench.paper.visual.train:work", environment(given))
    print(report.write(whole, ledger, out))
    return failed


def check(given: argparse.Namespace) -> int:
    from bench.paper.visual import check as checking
    from bench.paper.visual import fgvc, tasks, vtab

    suite = {"fgvc": fgvc.SUITE, "vtab1k": vtab.SUITE}.get(given.suite or "")
    data = tasks.folder("DATA")
    if suite is None:
        return _check_tasks(given)
    if data is None:
        raise runs.Refusal("no data folder; give --data or set PREFIXATTN_DATA")
    if suite == fgvc.SUITE:
        folders = checking.Folders(data / "fgvc", tasks.folder("SPLITS") or data / "fgvc_splits")
    elif given.tfds:
        raise runs.Refusal("check: reads VTAB's processed folder; with --tfds the library checks what it downloads")
    else:
        folders = checking.Folders(data / "vtab-1k")
    names = [name.partition("-")[2] if "-" in name else name for name in given.tasks or ()]
    rows = checking.check(suite, folders, names, given.deep)
    print(checking.table(rows), end="")
    return 0 if checking.well(rows) else 1


def _check_tasks(given: argparse.Namespace) -> int:
    """Reads each task of a grid whole; every image of it with --deep."""
    from bench.paper.visual import tasks

    bad = 0
    for name in grid_of(given).only(given.tasks, given.methods).tasks:
        try:
            task = tasks.load(name)
            counts = ", ".join(f"{part} {len(images):,}" for part, images in task.parts.items())
            if given.deep:
                for images in task.parts.values():
                    for row in range(len(images)):
                        images.image(row)
            print(f"{name}: {task.classes} classes, {counts}")
        except runs.Refusal as refusal:
            bad += 1
            print(f"{name}: {refusal}")
    return 1 if bad else 0


def run_command(arguments: list[str]) -> int:
    given = parse(arguments)
    environment(given)
    if given.verb == "check":
        return check(given)
    grid = grid_of(given)
    out = options.out_of(given, HERE / "results" / f"vision-{grid.name}")
    if given.verb == "run":
        return run(given, grid, out)
    if not out.is_dir():
        raise runs.Refusal(f"{out}: no such folder; nothing of grid {grid.name} was run")
    if given.verb == "status":
        from bench.paper.sweeps.launch import status

        print(status(Ledger(out), grid.only(given.tasks, given.methods).plan))
    else:
        from bench.paper.visual import report

        print(report.write(grid, Ledger(out), out))
    return 0


def main(arguments: list[str] | None = None) -> int:
    keep_memory()
    return command("vision.py", lambda: run_command(sys.argv[1:] if arguments is None else arguments), options.AGAIN)


if __name__ == "__main__":
    sys.exit(main())
