"""Several processes train a run as one, with `torchrun` or `accelerate launch` in front of nlg.py.

Each takes its part of every batch and of what is decoded; all hold the same numbers after each step. The first one
keeps the ledger and writes checkpoints, which the others read: several machines need one folder of runs.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.paper.runs import Refusal
from bench.paper.sweeps.ledger import free

Work = Callable[[dict[str, Any], Path], object]
PATIENCE = timedelta(days=7)  # the first one may wait for a run of another launch; torchrun ends what hangs on a death


def expected() -> int:
    """The processes that whoever started this one speaks of."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise Refusal(f"WORLD_SIZE is {given!r}, expected the number of processes")
    return int(given)


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
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    except ValueError as error:
        raise Refusal(f"{expected()} processes cannot find each other ({error}); torchrun tells them how") from None
    try:
        try:
            yield
        except Refusal:
            if rank() == 0:
                lead(None)
            raise
        if rank() == 0:
            lead(None)
    finally:
        dist.destroy_process_group()


def lead(task: tuple[dict[str, Any], str] | None) -> None:
    """Tells the other processes what is worked on next: config and scratch folder, or None for nothing more."""
    if size() > 1:
        dist.broadcast_object_list([task], src=0)


def follow(work: Work, threads: int) -> None:
    """What the other processes do: the runs that the first one begins. What only one of them meets ends them all."""
    torch.set_num_threads(threads)
    while True:
        told: list[tuple[dict[str, Any], str] | None] = [None]
        dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            return
        config, scratch = told[0]
        free("cuda" if torch.cuda.is_available() else "cpu")
        with suppress(Refusal):  # which all meet, and the first one notes
            work(config, Path(scratch))


def same(what: str, own: Any) -> None:
    """Refusal, in every process, where not all have the same."""
    found = everyones(own)
    if any(other != found[0] for other in found):
        raise Refusal(f"the processes of this run differ in {what}: {', '.join(map(str, found))}; they need one folder")


def agreed(try_it: Callable[[], Any]) -> Any:
    """What `try_it` returns, unless it is refused in one of the processes: then in all."""
    own, said = None, ""
    try:
        own = try_it()
    except Refusal as refusal:
        said = str(refusal)
    if words := next(filter(None, everyones(said)), ""):
        raise Refusal(words)
    return own


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


def everyones(own: Any) -> list[Any]:
    """What each process has, by rank."""
    if size() == 1:
        return [own]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, own)
    return found
