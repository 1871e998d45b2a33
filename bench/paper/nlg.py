"""The papers' language half: prefixes for table-to-text and summaries beside fine-tuning and what else the tables have.

    python bench/paper/nlg.py --suite demo                         # minutes: SmolLM2 on a part of E2E
    python bench/paper/nlg.py --suite smollm2 --data FOLDER        # the study of this repository, hours on two cores
    python bench/paper/nlg.py --suite smollm2-all --data FOLDER    # all test inputs, for three methods of it
    python bench/paper/nlg.py --suite gpt2-medium --data FOLDER    # E2E and WebNLG with the published settings
    python bench/paper/nlg.py --suite bart-large --data FOLDER     # XSUM
    torchrun --nproc-per-node 5 bench/paper/nlg.py --suite gpt2-large --data FOLDER    # several processes for each run
    python bench/paper/nlg.py check --data FOLDER                  # what of the data is there; published counts
    python bench/paper/nlg.py status --suite smollm2               # what is done, running, failed and left
    python bench/paper/nlg.py report --suite smollm2               # tables and page from finished runs
    python bench/paper/nlg.py times --suite smollm2                # what a step takes, beside PEFT's

A run is a name and a JSON in --out; finished runs are never repeated, and whatever is killed is taken up again. The
data folder has e2e/, webnlg/ and xsum/; `check` says what is to be had where.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import command
from bench.harness.peak_rss import keep_memory
from bench.paper import runs
from bench.paper.sweeps import options
from bench.paper.sweeps.grid import Grid
from bench.paper.sweeps.ledger import Ledger

HERE = Path(__file__).resolve().parent
VERBS = ("run", "check", "status", "report", "times")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, default="run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suite", help="smollm2 (default), smollm2-all, demo, gpt2-medium, gpt2-large, bart-large")
    what.add_argument("--grid", type=Path, help="a grid file (bench/paper/grids/language/ has some)")
    parser.add_argument("--data", type=Path, help="default: PREFIXATTN_DATA")
    parser.add_argument(
        "--model", help="over the grid's: small, smollm2, a folder (status needs it again) or a name on the hub"
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--rounds", type=int, default=12, help="times: steps of each method")
    parser.add_argument("--both", action="store_true", help="times: in float32 and in bfloat16")
    parser.add_argument("--decoding", action="store_true", help="times: of texts too, together and one at a time")
    options.add(parser, "nlg")
    return parser.parse_args(arguments)


def grid_of(given: argparse.Namespace) -> Grid:
    """The whole grid, with what the command line says over its settings."""
    from bench.paper.language import backbones, presets
    from bench.paper.language.train import Settings

    grid = presets.read(given.grid) if given.grid else presets.grid_for(given.suite or "smollm2")
    over: dict[str, Any] = {}
    if given.model:
        over["backbone"] = given.model
        if (folder := Path(given.model).expanduser()).is_dir():  # its place is nobody's business, its weights are
            os.environ[backbones.FOLDER] = str(folder.resolve())
            over["backbone"] = folder.resolve().name
    over |= {"bf16": True} if given.bf16 else {}
    methods = []
    for method in grid.methods:
        settings = {**method.settings, **over}
        settings["weights"] = backbones.fingerprint(settings.get("backbone", Settings.backbone))
        methods.append(replace(method, settings=settings))
    return replace(grid, methods=tuple(methods))


def readable(grid: Grid) -> None:
    """Reads each task and backbone once, before workers would fail one by one, and says what was found."""
    from bench.paper import bfloat16
    from bench.paper.language import backbones, tasks
    from bench.paper.language.train import Settings

    bfloat16.warn_if_slow(any(method.settings.get("bf16", Settings.bf16) for method in grid.methods))
    said = {}
    for method in grid.methods:
        settings = Settings(method.task, method.name, 0.0, 0.0, 0, **method.settings)
        said[tasks.load(settings.task, settings.entry_zero_quirk).where] = None
    print("\n".join(said), flush=True)
    for name in {method.settings.get("backbone", Settings.backbone) for method in grid.methods}:
        backbones.load(name)


def together(given: argparse.Namespace, whole: Grid, out: Path) -> int:
    """`run`, with the other processes that were started beside this one, if there are."""
    from bench.paper.language import ranks
    from bench.paper.language.train import trained_and_scored

    if ranks.expected() > 1 and (given.workers, given.launcher) != (1, "local"):
        raise runs.Refusal(
            f"{ranks.expected()} processes train each run together; --workers and --launcher are for one"
        )
    with ranks.joined():
        if ranks.rank() == 0:
            return run(given, whole, out)
        ranks.follow(trained_and_scored, options.threads_of(given, ranks.expected()))
        return 0


def run(given: argparse.Namespace, whole: Grid, out: Path) -> int:
    from bench.paper.language import ranks, report

    grid, ledger = whole.only(given.tasks, given.methods), Ledger(out)
    readable(grid)
    failed = options.run(given, grid, ledger, "bench.paper.language.train:work", options.variables(), ranks.expected())
    print(report.write(whole, ledger, out))
    return failed


def times(given: argparse.Namespace, whole: Grid, out: Path) -> int:
    """Of the settings of the grid's first task; --methods names methods, in the grid or not."""
    from bench.paper.language import decode_times, times
    from bench.paper.language.train import Settings
    from bench.paper.sweeps.tables import markdown

    if (given.workers, given.launcher) != (1, "local"):
        raise runs.Refusal("times: what is compared alternates in one process; no --workers and no --launcher")
    grid = whole.only(given.tasks)
    first = grid.methods[0]
    settings = Settings(first.task, first.name, min(first.lr), 0.0, first.seeds[0], **first.settings)
    types = (False, True) if given.both else (settings.bf16,)
    file = out.with_name(f"{out.name}-times.json")
    found = times.compare(settings, given.methods or times.USUAL, given.rounds, types)
    runs.write_json(file, found)  # before what may fail
    shown = times.tables(found)
    if given.decoding:
        found["decoding"] = decode_times.compare(settings)
        runs.write_json(file, found)
        shown.append(decode_times.table(found["decoding"]))
    text = markdown(f"{grid.name}: what a step takes", found["provenance"]["device"], shown)
    runs.write_text(file.with_suffix(".md"), text)
    print(text)
    return 0


def check(given: argparse.Namespace) -> int:
    """Counts of each task beside the published; of all three unless --tasks names some."""
    from bench.paper.language import tasks
    from bench.paper.language.check import check_task

    if (folder := os.environ.get("PREFIXATTN_DATA")) is None:
        raise runs.Refusal("no data folder; give --data or set PREFIXATTN_DATA")
    well = True
    for name in given.tasks or tasks.NAMES:
        lines, good = check_task(name, folder)
        print("\n".join(lines), end="\n\n")
        well &= good
    return 0 if well else 1


def run_command(arguments: list[str]) -> int:
    given = parse(arguments)
    if given.verb != "run" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise runs.Refusal(f"{given.verb}: for one process; torchrun is for runs")
    options.check(given, {"rounds": 1})
    if given.data is not None:
        if not given.data.is_dir():
            raise runs.Refusal(f"--data {given.data}: no such folder")
        os.environ["PREFIXATTN_DATA"] = str(given.data.resolve())
    if given.verb == "check":
        return check(given)
    grid = grid_of(given)
    out = options.out_of(given, HERE / "results" / f"nlg-{grid.name}")
    if given.verb == "run":
        return together(given, grid, out)
    if given.verb == "times":
        return times(given, grid, out)
    if not out.is_dir():
        raise runs.Refusal(f"{out}: no such folder; nothing of grid {grid.name} was run")
    if given.verb == "status":
        from bench.paper.sweeps.launch import status

        print(status(Ledger(out), grid.only(given.tasks, given.methods).plan))
    else:
        from bench.paper.language import report

        print(report.write(grid, Ledger(out), out))
    return 0


def main(arguments: list[str] | None = None) -> int:
    keep_memory()
    return command("nlg.py", lambda: run_command(sys.argv[1:] if arguments is None else arguments), options.AGAIN)


if __name__ == "__main__":
    sys.exit(main())
