"""Several processes train a run as one, with `torchrun` or `accelerate launch` in front of nlg.py.

Each takes its part of every batch and of what is decoded; all hold the same numbers after each step. The first one
keeps the ledger and writes checkpoints, which the others read: several machines need one folder of runs.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Work = Callable[[dict[str, Any], Path], object]


def expected() -> int:
    """The processes that whoever started this one speaks of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else torch.cuda.current_device())


@contextmanager
def joined() -> Iterator[None]:
    """All of them together; the first tells the others when it ends."""
    if expected() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        if rank() == 0:
            lead(None)
    finally:
        dist.destroy_process_group()


def lead(task: tuple[dict[str, Any], str] | None) -> None:
    """Tells the other processes what is worked on next: config and scratch folder, or None for nothing more."""
    if size() > 1:
        dist.broadcast_object_list([task], src=0)


def follow(work: Work) -> None:
    """What the other processes do: the runs that the first one begins."""
    while True:
        told: list[tuple[dict[str, Any], str] | None] = [None]
        dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            return
        config, scratch = told[0]
        try:
            work(config, Path(scratch))
        except Exception:  # the first one meets it too, and notes the run as failed
            traceback.print_exc(file=sys.stderr)


def part(rows: Sequence[Any]) -> Sequence[Any]:
    """Those of this process."""
    return rows[rank() :: size()]


def summed(*values: float) -> list[float]:
    """Each value's sum over the processes."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def average(gradients: Sequence[Tensor]) -> None:
    """In place, over the processes."""
    for gradient in gradients if size() > 1 else ():
        dist.all_reduce(gradient)
        gradient /= size()


def gathered(own: dict[str, str]) -> dict[str, str]:
    """The entries of all processes."""
    if size() == 1:
        return own
    found: list[dict[str, str]] = [{} for _ in range(size())]
    dist.all_gather_object(found, own)
    return {key: value for each in found for key, value in each.items()}
