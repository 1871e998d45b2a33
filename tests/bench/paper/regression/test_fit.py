"""The fitter: its formulas against torch.func on the definition; that it finds minima, and says where it did not."""

import pytest
import torch
from torch.func import grad, jacrev

from bench.paper.regression import families, fit, model
from bench.paper.regression.families import Family
from bench.paper.regression.model import Sample

FAMILIES = (Family("separate", 2, 3), Family("simple", 3, 2), Family("tanh", 2, 3, 2), Family("sigmoid", 2, 3, 3),
            Family("linear", 2, 3, 2))  # fmt: skip


def observations(family: Family, n: int, replicates: int, design: str = "support") -> Sample:
    return model.sample(model.experts(family.d), families.truth(family).atoms, n, replicates, design, [1, n])


def about(family: Family, replicates: int, distance: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    base = families.true_angles(family, 0 if family.atoms == 3 else None)
    return base + distance * torch.randn(replicates, family.size, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("design", ("support", "uniform"))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_derivatives_are_those_of_the_definition(family: Family, design: str) -> None:
    observed, angles = observations(family, 300, 2, design), about(family, 2, 0.1)
    found = fit.in_angles(observed, family, angles)
    for row in range(2):
        own = observed.rows(torch.tensor([row]))

        def objective(one: torch.Tensor, own: Sample = own) -> torch.Tensor:
            return model.objective(own, family.measure(one)[None])[0]

        for ours, exact in ((found.value, objective), (found.gradient, grad(objective)),
                            (found.hessian, jacrev(grad(objective)))):  # fmt: skip
            expected = exact(angles[row])
            assert (ours[row] - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_weight_of_zero_has_derivatives() -> None:
    """exp(b) = 0 is the edge where an atom is absent; its place then moves nothing."""
    family = Family("separate", 2, 2)
    observed = observations(family, 300, 1)
    angles = families.true_angles(family)[None].clone()
    angles[0, 1] = -torch.pi / 2
    found = fit.in_angles(observed, family, angles)
    places = [2 + 4 + i for i in range(4)]  # of the second atom
    assert found.hessian.isfinite().all() and (found.gradient[0, places] == 0).all()


def test_fits_end_at_a_minimum_below_the_truth() -> None:
    family, n = Family("simple", 2, 2), 1000
    observed = observations(family, n, 4)
    found, best = fit.minimise(observed, family, torch.stack([about(family, 4, 0.1), about(family, 4, 0.3)], 1), n)
    assert found.converged.all() and best.converged.all()
    torch.testing.assert_close(best.value, found.value.min(1).values)
    truth = model.objective(observed, families.truth(family).atoms.expand(4, -1, -1))
    assert (found.value < truth.unsqueeze(1)).all()
    torch.testing.assert_close(found.value[:, 0], found.value[:, 1], rtol=1e-9, atol=0)
    assert model.distance(observed.known, family.measure(found.angles[:, 0]), families.truth(family).atoms).max() < 0.03


def test_what_has_not_converged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    family, n = Family("simple", 2, 2), 1000
    monkeypatch.setattr(fit, "STEPS", 1)
    monkeypatch.setattr(fit, "MORE_STEPS", 2)
    found, best = fit.minimise(observations(family, n, 2), family, about(family, 2, 0.3).unsqueeze(1), n)
    assert not found.converged.any() and found.steps.tolist() == [[1], [1]] and (found.gradient > fit.FLAT).all()
    assert not best.converged.any() and best.steps.tolist() == [2, 2] and (best.value < found.value[:, 0]).all()


def test_a_saddle_is_left() -> None:
    """Three atoms of which two are the same: their gradients are the same too, and symmetry would keep them so."""
    family, n = Family("simple", 2, 3), 10**4
    observed = observations(family, n, 8)
    begin = families.true_angles(family, 0).expand(8, 1, -1)
    found = fit.from_starts(observed, family, begin, n, 40)
    places = family.inputs(found.angles[:, 0])[0]
    apart = (places[:, 0] - places[:, 2]).norm(dim=-1)
    assert apart.max() > 0.1 and found.converged.any()


def test_blocks_of_replicates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    family, n = Family("simple", 2, 2), 1000
    observed, begin = observations(family, n, 3), about(family, 3, 0.1).unsqueeze(1)
    whole = fit.from_starts(observed, family, begin, n, 50)
    monkeypatch.setattr(fit, "ROWS", model.SUPPORT)
    parts = fit.from_starts(observed, family, begin, n, 50)
    torch.testing.assert_close(whole.value, parts.value, rtol=1e-9, atol=0)
