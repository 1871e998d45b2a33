"""Slopes on log-log axes, their bootstrap intervals, and what they say about a rate.

A rate of a theorem is a power of n, or of log n / n: over given sample sizes the latter's slope is a little less steep.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
LEAST = 8  # replicates that a sample size needs to count
TAIL = 3  # of the largest sample sizes, for the second slope
MARGIN = 0.05  # a slope is told from a rate if the interval lies beyond this
AGREES, CONTRADICTS, UNKNOWN = "agrees", "contradicts", "cannot tell"
Curve = Sequence[tuple[int, Sequence[float | None]]]  # n and each replicate's value, None where there is none


@dataclass(frozen=True)
class Slope:
    """Of the mean over replicates: the slope, its interval, those of the TAIL largest n, and the median's slope."""

    slope: float
    low: float
    high: float
    tail: float
    tail_low: float
    tail_high: float
    median: float
    sizes: tuple[int, ...]


def of(curve: Curve) -> Slope | None:
    """None where fewer than TAIL sample sizes have LEAST replicates, or a mean is not positive."""
    kept = [(n, np.array([v for v in values if v is not None])) for n, values in curve]
    kept = [(n, values) for n, values in kept if len(values) >= LEAST]
    if len(kept) < TAIL or any(values.mean() <= 0 or np.median(values) <= 0 for _, values in kept):
        return None
    sizes = np.array([n for n, _ in kept], dtype=float)
    random = np.random.default_rng(0)
    drawn = np.stack(
        [values[random.integers(len(values), size=(RESAMPLES, len(values)))].mean(-1) for _, values in kept], -1
    )
    logs = np.log(np.where(drawn > 0, drawn, np.nan))
    edges = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    means = np.log([values.mean() for _, values in kept])
    low, high = np.nanquantile(_fitted(sizes, logs), edges)
    tail_low, tail_high = np.nanquantile(_fitted(sizes[-TAIL:], logs[:, -TAIL:]), edges)
    medians = np.log([np.median(values) for _, values in kept])
    tail = _fitted(sizes[-TAIL:], means[-TAIL:])
    numbers = (_fitted(sizes, means), low, high, tail, tail_low, tail_high, _fitted(sizes, medians))
    return Slope(*(float(number) for number in numbers), tuple(n for n, _ in kept))


def of_rate(sizes: Sequence[int], power: float, log: bool) -> float:
    """The slope of n**-power, or of (log n / n)**power, over these sizes."""
    logs = np.log(np.array(sizes, dtype=float))
    return float(_fitted(np.array(sizes, dtype=float), power * ((np.log(logs) if log else 0.0) - logs)))


def _fitted(sizes: np.ndarray, logs: np.ndarray) -> np.ndarray:
    x = np.log(sizes) - np.log(sizes).mean()
    return (logs * x).sum(-1) / (x**2).sum()


def verdict(found: Slope, kind: str, rate: float) -> str:
    """Of a slope against a rate's slope; a contradiction needs the largest n too, for rates are of large n.

    kind: "upper", a bound from above: faster is no contradiction; "lower", a bound from below on the worst truth, so
    that one truth that is faster tells nothing; "slower", a claim of slowness.
    """
    line = rate + MARGIN
    slow = found.low > line and found.tail_low > line
    fast = found.high <= line
    if kind == "upper":
        return AGREES if fast else CONTRADICTS if slow else UNKNOWN
    if kind == "slower":
        return AGREES if slow else CONTRADICTS if fast and found.tail_high <= line else UNKNOWN
    if kind == "lower":
        return AGREES if found.low >= rate - MARGIN else UNKNOWN
    raise ValueError(f"kind {kind!r}: expected upper, lower or slower")


def power(value: float, log: bool) -> str:
    """A rate in words."""
    whole = f"1/{round(1 / value)}" if math.isclose(1 / value, round(1 / value)) else f"{value:g}"
    return f"(log n / n)^{whole}" if log else f"n^-{whole}"
