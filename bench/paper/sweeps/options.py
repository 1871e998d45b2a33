"""What the commands of a sweep have in common: options for its runs and their launcher, and the launch."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from bench.paper.runs import Refusal
from bench.paper.sweeps.grid import Grid
from bench.paper.sweeps.launch import HOW, launch, status
from bench.paper.sweeps.ledger import Ledger

AGAIN = "finished runs are kept, and the same command goes on with the others"
LEAST = {"workers": 1, "minutes": 1, "gpus": 0, "cpus": 1}


def add(parser: argparse.ArgumentParser, kind: str) -> None:
    """Where runs are, which of a grid's are meant, who does them."""
    parser.add_argument("--out", type=Path, help=f"the runs' folder (default: bench/paper/results/{kind}-NAME)")
    parser.add_argument("--tasks", nargs="+", help="only these of the grid's")
    parser.add_argument("--methods", nargs="+", help="only these labels or names of the grid's")
    parser.add_argument("--launcher", choices=HOW, default="local")
    parser.add_argument("--workers", type=int, default=1, help="processes, Ray tasks or jobs at a time")
    parser.add_argument("--retry", action="store_true", help="try failed runs once more")
    parser.add_argument("--address", help="of a Ray cluster")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--minutes", type=int, help="of a Slurm job")
    parser.add_argument("--gpus", type=int, help="of a Slurm job or a Ray task; of this machine, to spread over (all)")
    parser.add_argument("--cpus", type=int, help="of a Slurm job or a Ray task; threads of a worker")


def check(given: argparse.Namespace, more: Mapping[str, int]) -> None:
    """Refusal for a number below its least; `more` are of the command's own options."""
    for name, least in {**LEAST, **more}.items():
        value = getattr(given, name)
        if value is not None and value < least:
            raise Refusal(f"--{name} is {value}, expected {least} or more")


def out_of(given: argparse.Namespace, usual: Path) -> Path:
    """The folder of runs; what is made of them stands beside it under its name."""
    return Path(given.out or usual).absolute()


def threads_of(given: argparse.Namespace, processes: int) -> int:
    """Of each of `processes` on this machine, unless --cpus says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(given.cpus or max(1, cores // processes))


def run(
    given: argparse.Namespace, grid: Grid, ledger: Ledger, work: str, environment: Mapping[str, str], processes: int = 1
) -> int:
    """Launches what is left of the grid and prints how it stands; 1 if runs failed. `processes` work on each run."""
    threads = threads_of(given, given.workers * processes) if given.launcher == "local" else given.cpus
    state = launch(
        given.launcher, ledger, grid.plan, work, given.workers, given.retry, address=given.address,
        partition=given.partition, timeout_min=given.minutes, gpus_per_node=given.gpus, cpus_per_task=given.cpus,
        threads=threads, environment=environment,
    )  # fmt: skip
    print(status(ledger, grid.plan))
    return 1 if state["failed"] else 0


def variables() -> dict[str, str]:
    """What every worker must know and no run's numbers depend on: where things are."""
    return {name: value for name, value in os.environ.items() if name.startswith("PREFIXATTN_")}
