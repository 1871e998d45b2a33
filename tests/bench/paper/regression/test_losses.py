"""Voronoi cells and the reconstructed losses, against sums done by hand."""

import math

import pytest
import torch

from bench.paper.regression import losses
from bench.paper.regression.families import Truth

KEY = torch.tensor([[0.0, 0.0], [10.0, 0.0]], dtype=torch.float64)
TRUE = Truth(torch.tensor([1.0, 2.0], dtype=torch.float64), KEY, KEY, torch.empty(0))


def at(weights: list[float], key: list[list[float]], value: list[list[float]]) -> losses.Cells:
    return losses.cells(*(torch.tensor([one], dtype=torch.float64) for one in (weights, key, value)), TRUE)


def test_two_atoms_in_a_cell_and_one_alone() -> None:
    found = at([0.5, 0.6, 1.9], [[0.3, 0.4], [0.0, -0.1], [10.0, 0.2]], [[0.0, 0.2], [0.1, 0.0], [10.0, 0.3]])
    assert found.crowd.tolist() == [[2, 2, 1]]
    torch.testing.assert_close(found.key, torch.tensor([[0.5, 0.1, 0.2]], dtype=torch.float64))
    imbalance = 0.1 + 0.1
    for r in (1, 2):
        distances = 0.5 * (0.5**r + 0.2**r) + 0.6 * (0.1**r + 0.1**r) + 1.9 * (0.2**r + 0.3**r)
        assert losses.d1(found, r).item() == pytest.approx(imbalance + distances)
    assert losses.d2(found).item() == pytest.approx(imbalance + 0.5 * 0.25 + 0.6 * 0.01 + 1.9 * 0.2)
    squares = 0.5 * (0.25 + 0.04) + 0.6 * 0.02
    assert losses.d3(found).item() == pytest.approx(imbalance + squares + 1.9 * (0.2 + 0.3))
    assert losses.mean_in(found, found.key, True).item() == pytest.approx(0.2)
    assert losses.mean_in(found, found.key, False).item() == pytest.approx((0.5 * 0.5 + 0.6 * 0.1) / 1.1)


def test_an_empty_cell_costs_its_weight_and_has_no_mean() -> None:
    found = at([1.0], [[0.0, 0.0]], [[0.0, 0.0]])
    assert losses.d2(found).item() == 2.0
    assert math.isnan(losses.mean_in(found, found.key, False).item())
    assert losses.rounded(losses.mean_in(found, found.key, False)) == [None]


def test_the_cell_is_by_key_and_value_together() -> None:
    """A key that is nearer to one true atom, and a value that is much nearer to the other."""
    found = at([1.0], [[4.9, 0.0]], [[10.0, 0.0]])
    assert found.key.item() == pytest.approx(5.1)


def test_atoms_may_change_places() -> None:
    torch.manual_seed(0)
    key, value, weights = torch.rand(3, 2) * 10, torch.rand(3, 2) * 10, torch.rand(3)
    order = [2, 0, 1]
    first, second = (at(w.tolist(), k.tolist(), v.tolist()) for w, k, v in
                     ((weights, key, value), (weights[order], key[order], value[order])))  # fmt: skip
    assert losses.d3(first).item() == pytest.approx(losses.d3(second).item(), rel=1e-12)
