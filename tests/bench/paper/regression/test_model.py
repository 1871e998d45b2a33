"""The regression, its samples and its families: what they say is compared with sums written out."""

import numpy as np
import pytest
import torch

from bench.paper.regression import families, model
from bench.paper.regression.families import Family


def test_the_regression_is_eq_11_written_out() -> None:
    given, true = model.experts(3), families.truth(Family("tanh", 3, 2, 2))
    x = model.support(3, 8)
    found = model.regression(model.known(given, x), true.atoms)
    for row, one in zip(found, x, strict=True):
        top, bottom = torch.zeros(3, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        for i in range(2):
            weight = torch.exp(one @ given.A[i] @ one + given.a[i])
            top, bottom = top + weight * (given.E[i] @ one + given.e[i]), bottom + weight
        for j in range(2):
            weight = true.weights[j] * torch.exp((given.B @ torch.tanh(true.key[j])) @ one)
            top, bottom = top + weight * (given.C @ torch.tanh(true.value[j])), bottom + weight
        torch.testing.assert_close(row, top / bottom, rtol=1e-13, atol=1e-14)


def test_sufficient_statistics_are_those_of_single_observations() -> None:
    """The mean at a point has the variance of its count, and counts add up to n."""
    given, true = model.experts(2), families.truth(Family("simple", 2, 2))
    observed = model.sample(given, true.atoms, 5000, 40, "support", [3])
    assert observed.count.sum(-1).tolist() == [5000.0] * 40
    error = (observed.mean - model.regression(observed.known, true.atoms)) * observed.count.sqrt().unsqueeze(-1)
    seen = error[observed.count > 0] / model.NOISE
    assert abs(seen.square().mean() - 1) < 0.05 and abs(seen.mean()) < 0.05
    single = model.sample(given, true.atoms, 50, 2, "uniform", [3])
    assert single.mean.shape == (2, 50, 2) and single.count.unique().tolist() == [1.0]
    assert single.known.xb.shape == (2, 50, 2)


@pytest.mark.parametrize("family", [Family("separate", 2, 3), Family("simple", 2, 3), Family("sigmoid", 2, 3, 2),
                                    Family("sigmoid", 2, 3, 3)], ids=str)  # fmt: skip
@pytest.mark.parametrize("split", (0, 1))
def test_a_split_atom_is_the_true_function(family: Family, split: int) -> None:
    true = families.truth(family)
    at = model.known(model.experts(2), model.support(2))
    angles = families.true_angles(family, split, share=0.3)
    assert angles.shape == (family.size,)
    assert model.distance(at, family.measure(angles), true.atoms) < 1e-14
    assert model.distance(at, family.measure(angles + 0.1), true.atoms) > 1e-3


def test_parameters_stay_in_a_compact_set() -> None:
    family = Family("separate", 2, 3)
    angles = torch.from_numpy(np.random.default_rng(0).uniform(-99, 99, (500, family.size)))
    weights, places = family.split(angles)
    assert weights.min() >= 0 and weights.max() <= families.HEAVIEST
    assert places.abs().max() <= families.FARTHEST


@pytest.mark.parametrize("call, words", [
    (lambda: Family("shared", 2, 3), "family 'shared': expected one of separate, simple"),
    (lambda: Family("tanh", 2, 3), "tanh: inner is 0; expected 1 or more"),
    (lambda: Family("simple", 2, 3, 2), "simple: inner is 2"),
    (lambda: families.true_angles(Family("simple", 2, 3)), "3 atoms, split None"),
    (lambda: families.true_angles(Family("tanh", 2, 3, 1), 0), "inner is 1"),
    (lambda: Family("simple", 2, 2).angles(torch.tensor([9.0, 1]), torch.zeros(2, 2)), "outside of the parameter"),
])  # fmt: skip
def test_refusals_are_in_words(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
