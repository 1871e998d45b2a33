"""A short run with a fixed seed: slopes of cells against n must be those of theory. Some seconds of one core."""

from typing import Any

import pytest

from bench.paper.regression import claims, experiments, slopes
from bench.paper.regression.experiments import Setting

SIZES = (10**4, 10**6, 10**8)
REPLICATES = 10


@pytest.fixture(scope="module")
def cells() -> dict[str, list[tuple[int, dict[str, Any]]]]:
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for setting in (Setting("simple", 2, 2, sizes=SIZES), Setting("simple", 2, 3, sizes=SIZES),
                    Setting("separate", 2, 3, sizes=SIZES)):  # fmt: skip
        for run in experiments.plan([setting], REPLICATES):
            if run.config["kind"] == "regression":
                found.setdefault(setting.label, []).append((run.config["n"], experiments.regression_cell(run.config)))
    return found


def slope(cells: list[tuple[int, dict[str, Any]]], measure: str) -> float:
    found = slopes.of([(n, result["measures"][measure]) for n, result in cells])
    assert found is not None
    return found.slope


@pytest.mark.parametrize("label", ("simple-d2-L2", "simple-d2-L3", "separate-d2-L3"))
def test_regressions_are_learned_as_n_to_the_half(cells: dict[str, Any], label: str) -> None:
    assert -0.55 < slope(cells[label], "l2") < -0.45


def test_shared_prompts_have_their_rates(cells: dict[str, Any]) -> None:
    assert -0.6 < slope(cells["simple-d2-L2"], "d2") < -0.4
    assert -0.6 < slope(cells["simple-d2-L2"], "key_alone") < -0.4
    assert -0.65 < slope(cells["simple-d2-L3"], "d2") < -0.4
    assert -0.35 < slope(cells["simple-d2-L3"], "key_crowd") < -0.15


def test_separate_values_that_share_a_cell_are_not_found(cells: dict[str, Any]) -> None:
    assert slope(cells["separate-d2-L3"], "value_crowd") > -0.22
    assert -0.35 < slope(cells["separate-d2-L3"], "d1_1") < 0


def test_fits_are_at_least_as_good_as_the_truth(cells: dict[str, Any]) -> None:
    for label, found in cells.items():
        for _, result in found:
            assert result["fits"]["worse_than_truth"] == 0, label
            assert result["fits"]["best_not_converged"] <= REPLICATES // 4, label


def test_every_measure_that_a_theorem_is_about_is_measured(cells: dict[str, Any]) -> None:
    for family, label, needed in (("simple", "simple-d2-L3", ("l2", "d2", "key_crowd")),
                                  ("separate", "separate-d2-L3", ("d1_1", "d1_2"))):  # fmt: skip
        for measure in needed:
            assert measure in cells[label][0][1]["measures"]
            assert claims.of({"family": family, "atoms": 3}, measure) is not None
