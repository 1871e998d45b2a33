"""Slopes, intervals and verdicts, on powers of n that are known."""

import math

import numpy as np
import pytest

from bench.paper.regression import slopes
from bench.paper.regression.slopes import AGREES, CONTRADICTS, UNKNOWN

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)


def curve(power: float, spread: float = 0.3, replicates: int = 40, seed: int = 0) -> list[tuple[int, list[float]]]:
    random = np.random.default_rng(seed)
    return [(n, list(n**-power * np.exp(spread * random.standard_normal(replicates)))) for n in SIZES]


def test_the_interval_holds_the_power_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(100):
        found = slopes.of(curve(0.3, seed=seed))
        assert found is not None
        held += found.low <= -0.3 <= found.high
    assert 85 <= held <= 100


def test_a_log_makes_the_rate_less_steep() -> None:
    assert slopes.of_rate(SIZES, 0.5, False) == pytest.approx(-0.5)
    ends = [0.5 * (math.log(math.log(n)) - math.log(n)) for n in (SIZES[0], SIZES[-1])]
    assert slopes.of_rate((SIZES[0], SIZES[-1]), 0.5, True) == pytest.approx((ends[1] - ends[0]) / math.log(10**4))


@pytest.mark.parametrize("power, kind, rate, expected", [
    (0.5, "upper", -0.46, AGREES), (0.8, "upper", -0.46, AGREES), (0.25, "upper", -0.46, CONTRADICTS),
    (0.41, "upper", -0.46, UNKNOWN), (0.0, "lower", -0.5, AGREES), (0.5, "lower", -0.5, AGREES),
    (0.9, "lower", -0.5, UNKNOWN), (0.0, "slower", -0.23, AGREES), (0.25, "slower", -0.23, CONTRADICTS),
    (0.18, "slower", -0.23, UNKNOWN),
])  # fmt: skip
def test_verdicts(power: float, kind: str, rate: float, expected: str) -> None:
    found = slopes.of(curve(power))
    assert found is not None and slopes.verdict(found, kind, rate) == expected


def test_a_wide_interval_tells_nothing() -> None:
    found = slopes.of(curve(0.25, spread=3.0, replicates=8))
    assert found is not None and slopes.verdict(found, "upper", -0.46) == UNKNOWN


def test_a_contradiction_needs_the_largest_sizes() -> None:
    """Slow at first and at the rate then: rates are of large n."""
    slow = [(n, [value * (1 if n < 10**6 else (n / 10**6) ** -0.5) for value in values]) for n, values in curve(0.0)]
    found = slopes.of(slow)
    assert found is not None and found.low > -0.41 and slopes.verdict(found, "upper", -0.46) == UNKNOWN


def test_nothing_is_said_of_too_few() -> None:
    absent = [(n, [None] * 33 + values[:7]) for n, values in curve(0.5)]
    assert slopes.of(absent) is None
    assert slopes.of(curve(0.5)[: slopes.TAIL - 1]) is None
    some = slopes.of([(n, [None, *values]) for n, values in curve(0.5)])
    assert some == slopes.of(curve(0.5))


def test_rates_in_words() -> None:
    assert slopes.power(0.5, True) == "(log n / n)^1/2" and slopes.power(0.25, False) == "n^-1/4"
