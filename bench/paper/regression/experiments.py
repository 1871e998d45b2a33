"""The plan of the simulation, cell by cell, and what a cell does: one setting, one sample size, all replicates."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.paper.regression import attention_head, families, fit, losses, model, splits
from bench.paper.regression.families import Family
from bench.paper.sweeps.ledger import Run

SEED = 2410
SUPPORT_SIZES = tuple(10**i for i in range(2, 11))
UNIFORM_SIZES = (100, 316, 1000, 3162, 10000)
FROM_TRUTH, FROM_RANDOM = 4, 2  # starts of a replicate
NEAR = 0.01  # in the objective, where noise moves the truth's by about 1: two fits this near are one


@dataclass(frozen=True)
class Setting:
    """A family fitted with `atoms` to a truth with two; its name says as much."""

    family: str
    d: int
    atoms: int
    inner: int = 0
    design: str = "support"
    sizes: Sequence[int] = SUPPORT_SIZES

    @property
    def label(self) -> str:
        width = f"-inner{self.inner}" if self.inner else ""
        design = "" if self.design == "support" else f"-{self.design}"
        return f"{self.family}-d{self.d}-L{self.atoms}{width}{design}"


def settings() -> list[Setting]:
    found = [Setting(name, d, atoms) for name in ("separate", "simple") for d in (2, 4, 8) for atoms in (2, 3)]
    for name, widths in (("tanh", (2, 4)), ("sigmoid", (2,)), ("linear", (2,))):
        for d in widths:
            found += [Setting(name, d, atoms, inner) for atoms, inner in ((2, 2), (3, 2), (3, 3))]
    return found + [Setting(name, 2, 3, 0, "uniform", UNIFORM_SIZES) for name in ("separate", "simple")]


def plan(chosen: Sequence[Setting], replicates: int, bridge: Sequence[attention_head.Setting] = ()) -> list[Run]:
    """Small samples first: what is wrong shows early. The splits, which are no simulation, are one run."""
    cells = [(n, one) for one in chosen for n in one.sizes]
    runs = [Run("splits/all", {"kind": "splits"})]
    for n, one in sorted(cells, key=lambda cell: cell[0]):
        config = {"kind": "regression", **asdict(one), "n": n, "replicates": replicates, "seed": SEED}
        del config["sizes"]
        runs.append(Run(f"regression/{one.label}/n{n}", config))
    for head in bridge:
        for n in head.sizes:
            runs.append(Run(f"attention/{head.label}/n{n}", {"kind": "attention", **head.config(n, replicates, SEED)}))
    return runs


def work(config: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What the sweep calls for a run; seconds to minutes, so nothing is kept of one that is killed."""
    if config["kind"] == "splits":
        return {"rows": splits.rows()}
    if config["kind"] == "attention":
        return attention_head.cell(config)
    return regression_cell(config)


def regression_cell(config: dict[str, Any]) -> dict[str, Any]:
    family = Family(config["family"], config["d"], config["atoms"], config["inner"])
    n, replicates, true = config["n"], config["replicates"], families.truth(family)
    given = model.experts(family.d)
    own = [config["seed"], families.NAMES.index(family.name), family.d, family.atoms, family.inner, n]
    observed = model.sample(given, true.atoms, n, replicates, config["design"], own)
    spare = 0 if family.atoms == 3 else None
    found, last = fit.minimise(observed, family, starts(family, replicates, n, own), n)
    angles, lowest = last.angles, last.value
    noise = fit.in_angles(observed, family, families.true_angles(family, spare).expand(replicates, -1)).gradient
    at_truth = model.objective(observed, true.atoms.expand(replicates, -1, -1))
    at = losses.cells(family.split(angles)[0], *family.inputs(angles), true)
    measures = {"l2": model.distance(model.known(given, evaluated(config)), family.measure(angles), true.atoms)}
    measures |= of_losses(family, at)
    fits = {
        "starts": found.value.shape[1],
        "steps": float(found.steps.double().mean()),
        "not_converged": int((~found.converged).sum()),
        "best_not_converged": int((~last.converged).sum()),
        "worse_than_truth": int((lowest > at_truth + NEAR).sum()),
        "best_from_random": int((found.value.argmin(1) >= FROM_TRUTH).sum()),
        "near_best": float((found.value <= lowest.unsqueeze(1) + NEAR).double().mean()),
        "random_near_best": float((found.value[:, FROM_TRUTH:] <= lowest.unsqueeze(1) + NEAR).double().mean()),
        "largest_gradient": float(last.gradient.max()),
        "noise_gradient": float(torch.linalg.vector_norm(noise, dim=-1).mean() / n**0.5),
        "gain": float((at_truth - lowest).mean()),
    }
    return {"measures": {name: losses.rounded(values) for name, values in measures.items()}, "fits": fits}


def of_losses(family: Family, at: losses.Cells) -> dict[str, Tensor]:
    """The losses of the family's theorem and the distances of its atoms; nan where a kind of cell is empty."""
    found = {"imbalance": at.imbalance}
    if family.name == "separate":
        found |= {"d1_1": losses.d1(at, 1), "d1_2": losses.d1(at, 2), "d3": losses.d3(at)}
    elif family.name == "simple":
        found["d2"] = losses.d2(at)
    else:
        found["d3"] = losses.d3(at)
    for side in ("key",) if family.name == "simple" else ("key", "value"):
        for alone in (True, False):
            name = f"{side}_{'alone' if alone else 'crowd'}"
            found[name] = losses.mean_in(at, getattr(at, side), alone)
    return found


def evaluated(config: dict[str, Any]) -> Tensor:
    """Inputs at which the error of a regression is taken: the design's own, or many points for the uniform."""
    return model.support(config["d"], model.SUPPORT if config["design"] == "support" else 4096)


def starts(family: Family, replicates: int, n: int, seed: list[int]) -> Tensor:
    """[R, S, P]: about the truth, each atom split in turn, at two distances; then anywhere."""
    draw = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

    def normal() -> Tensor:
        return torch.randn(replicates, family.size, generator=draw, dtype=torch.float64)

    found = []
    for i in range(FROM_TRUTH):
        base = families.true_angles(family, i % 2 if family.atoms == 3 else None)
        found.append(base + (0.15 if i < 2 else n**-0.25) * normal())
    for _ in range(FROM_RANDOM):
        found.append(0.6 * (2 * torch.rand(replicates, family.size, generator=draw, dtype=torch.float64) - 1))
    return torch.stack(found, 1)
