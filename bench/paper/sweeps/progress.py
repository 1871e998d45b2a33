"""What a sweep has done and has left, as a table or line by line."""

import os
import time
from typing import TextIO

from bench.paper.sweeps.ledger import DONE, FAILED, STATES, Ledger, Run

State = dict[str, list[Run]]


class Screen:
    """Progress: a table that is drawn over itself on a terminal, else a line for each run that ends."""

    def __init__(self, out: TextIO, ledger: Ledger, workers: int) -> None:
        self.out, self.ledger, self.workers, self.start = out, ledger, workers, time.monotonic()
        self.live, self.drawn, self.told = out.isatty(), 0, None

    def show(self, state: State) -> None:
        left = remaining(self.ledger, state, self.workers)
        if self.live:
            try:
                height = os.get_terminal_size(self.out.fileno()).lines
            except (OSError, ValueError):
                height = 24
            rows = [
                *table(self.ledger, state, max(3, height - 4)),
                f"elapsed {clock(time.monotonic() - self.start)}{left}",
            ]
            self.out.write((f"\x1b[{self.drawn}F" if self.drawn else "") + "".join(f"\x1b[2K{row}\n" for row in rows))
            self.out.write("\x1b[J")
            self.drawn = len(rows)
        ended = {run.name: run for name in (DONE, FAILED) for run in state[name]}
        total = sum(map(len, state.values()))
        if self.told is None:
            self.told = set(ended)
            if ended and not self.live:
                self.out.write(f"{len(ended)} of {total} runs had ended before\n")
        for name in [name for name in ended if name not in self.told] if not self.live else []:
            self.told.add(name)
            record = self.ledger.record(ended[name])
            words = f"{record['seconds']:.1f} s" if record else f"failed: {self.ledger.failure(ended[name])}"
            self.out.write(f"{name}: {words} ({len(self.told)} of {total}{left})\n")
        self.out.flush()

    def close(self) -> None:
        self.drawn = 0  # what follows stands below


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def remaining(ledger: Ledger, state: State, workers: int) -> str:
    """An estimate of the time left from the mean of the finished runs, those under way counted whole."""
    seconds = [record["seconds"] for run in state[DONE] if (record := ledger.record(run))]
    todo = len(state["left"]) + len(state["running"])
    if not seconds or not todo:
        return ""
    return f", about {clock(sum(seconds) / len(seconds) * -(-todo // workers))} left"


def table(ledger: Ledger, state: State, most: int | None = None) -> list[str]:
    """Lines: for each group, the first two parts of a name, how many runs are in each state; at most `most` groups."""
    groups: dict[str, list[int]] = {}
    for at, name in enumerate(STATES):
        for run in state[name]:
            groups.setdefault("/".join(run.name.split("/")[:2]), [0] * len(STATES))[at] += 1
    order = sorted(groups, key=lambda group: (-groups[group][1], not groups[group][3])) if most else sorted(groups)
    shown = order[:most]
    width = max([len("group"), *map(len, shown)])
    rows = [f"{'group':{width}}" + "".join(f"{name:>9}" for name in STATES)]
    rows += [f"{group:{width}}" + "".join(f"{count:9}" for count in groups[group]) for group in shown]
    if len(order) > len(shown):
        rows.append(f"and {len(order) - len(shown)} more groups")
    if len(groups) != 1:
        rows.append(f"{'all':{width}}" + "".join(f"{len(state[name]):9}" for name in STATES))
    return rows
