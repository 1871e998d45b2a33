"""Several ways to compute one thing: each is checked, all are timed in alternation; one that cannot run says why."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.command import Refusal
from bench.harness.record import header, write_rows
from bench.harness.timing import Call, interleave, quantiles

Row = dict[str, Any]
NO_BACKWARD = "FlexAttention has no backward on a CPU"


def in_words(error: Exception) -> str:
    """One line, for a record."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def rows_of(
    case: Row, calls: dict[str, Call], check: Callable[[str], float], rounds: int, absent: dict[str, str]
) -> list[Row]:
    """A row for each way: the process's milliseconds and its error, or the reason why it is absent.

    The first way is ours, which must run. `check` returns a way's error, and refuses one that computes something else.
    """
    errors: dict[str, float] = {}
    for way in calls:
        try:
            errors[way] = check(way)
        except Refusal:
            raise
        except Exception as error:  # a peer that cannot run is a line in the record, not the end of it
            if way == next(iter(calls)):
                raise
            absent = {**absent, way: in_words(error)}
    rows = []
    for way, found in interleave({way: calls[way] for way in errors}, 0.0, (rounds, rounds), time.process_time).items():
        ms = [round(t, 2) for t in quantiles(found)]
        rows.append(case | {"way": way, "cpu_ms": ms, "rounds": rounds, "error": errors[way]})
    return rows + [case | {"way": way, "absent": why} for way, why in absent.items()]


def cell(row: Row | None, ours: float) -> str:
    """Of a table: milliseconds, and how many times ours they are; None is a row that earlier records lack."""
    if row is None or row.get("absent") == NO_BACKWARD:
        return "no backward"
    if "absent" in row:
        return "cannot run"
    ms = row["cpu_ms"][1]
    return f"{ms:.1f} ms ({ms / ours:.1f} times)"


def compared(
    description: str,
    rounds: int,
    shape: dict[str, int],
    measured: Callable[[int], list[Row]],
    table: Callable[[list[Row]], list[str]],
    arguments: list[str] | None,
) -> int:
    """A command of one shape: measures, writes the record that is asked for, prints the table; the exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="calls of each way that are timed")
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        raise Refusal(f"--rounds {args.rounds}: expected a number from 1 up")
    rows = measured(args.rounds)
    if args.out is not None:
        write_rows(args.out, header() | {"shape": shape, "rows": rows})
    print("\n".join(table(rows)))
    return 0
