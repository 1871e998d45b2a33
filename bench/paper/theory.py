"""Theorems 4.1 to 4.3 of the paper, simulated: least squares over prefix mixtures of experts, error against n.

    python bench/paper/theory.py --workers 2        # what is not done yet, then tables and figure
    python bench/paper/theory.py --only simple-d2   # a part of it: settings whose names hold these words
    python bench/paper/theory.py status             # what is done, running, failed and left
    python bench/paper/theory.py report             # tables and figure from finished cells

A cell is a setting at one sample size, and a JSON in --out; finished cells are never repeated. Definitions and what is
reconstructed: docs/theory.md.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import command
from bench.harness.peak_rss import keep_memory
from bench.paper.runs import Refusal
from bench.paper.sweeps.launch import launch, status
from bench.paper.sweeps.ledger import Ledger, Run
from bench.paper.sweeps.options import AGAIN

HERE = Path(__file__).resolve().parent
VERBS = ("run", "status", "report")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, default="run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "theory", help="the cells' folder")
    parser.add_argument("--only", nargs="+", help="settings whose names hold one of these words")
    parser.add_argument("--largest", type=int, help="no sample size above this")
    parser.add_argument("--replicates", type=int, default=40, help="of each cell")
    parser.add_argument("--workers", type=int, default=1, help="processes of this machine")
    parser.add_argument("--retry", action="store_true", help="try failed cells once more")
    return parser.parse_args(arguments)


def planned(given: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """The cells that the command line asks for, and all, which tables and figure are of."""
    from bench.paper.regression import attention_head, experiments

    if given.replicates < 2 or given.workers < 1:
        raise Refusal(f"--replicates {given.replicates}, --workers {given.workers}: expected at least 2 and 1")
    whole = experiments.plan(experiments.settings(), given.replicates, attention_head.settings())
    runs = whole
    if given.largest is not None:
        runs = [run for run in runs if run.config.get("n", 0) <= given.largest]
    if given.only:
        runs = [run for run in runs if any(word in run.name for word in given.only)]
    if not runs:
        names = sorted({run.name.split("/")[1] for run in whole if "n" in run.config})
        raise Refusal(f"--only, --largest: nothing is left; there are {', '.join(names)}")
    return runs, whole


def run_command(arguments: list[str]) -> int:
    given = parse(arguments)
    (runs, whole), out = planned(given), given.out.absolute()
    ledger, failed = Ledger(out), 0
    if given.verb != "run" and not out.is_dir():
        raise Refusal(f"{out}: no such folder; nothing was run")
    if given.verb == "run":
        # one thread each: the work is on small matrices, and on a busy machine threads wait for each other
        state = launch(
            "local", ledger, lambda _: runs, "bench.paper.regression.experiments:work", given.workers, given.retry,
            device="cpu", threads=1,
        )  # fmt: skip
        failed = len(state["failed"])
    print(status(ledger, lambda _: runs))
    if given.verb != "status":
        from bench.paper.regression import report

        print(report.write(whole, ledger, out))
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    keep_memory()
    return command("theory.py", lambda: run_command(sys.argv[1:] if arguments is None else arguments), AGAIN)


if __name__ == "__main__":
    sys.exit(main())
