"""What the prompts share: from the parameters of a fit to the atoms of a measure, and back for the truth.

| family | p^K | p^V | theorem |
|---|---|---|---|
| separate | k | v | 4.1 |
| simple | p | p | 4.2 |
| tanh, sigmoid, linear | s(W1 p) | s(W2 p) | 4.3; linear breaks its assumption A.2 |

W1 and W2 are [d, inner], learned and common to all atoms. Where `inner` is at least the number of atoms, any W1 p_j
and W2 p_j can be had, one for each atom: what is shared binds nothing then. The p_j are the unit vectors there, for no
other choice has more, and the columns of W are what is fitted.

Parameters are angles t: a coordinate is middle + radius * sin(t). So the parameter space is the theorems' compact set,
its edges are reached, and least squares over it has no constraint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HEAVIEST = 4.0  # weights are in [0, 4]
FARTHEST = 1.5  # coordinates of prompts, of weights of the network and of its inputs are in [-1.5, 1.5]
WEIGHTS = (1.0, 0.7)  # of the true atoms
RADIUS = 1.2  # of the true prompts, before the activation
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}
NAMES = ("separate", "simple", *ACTIVATIONS)


@dataclass(frozen=True)
class Family:
    """One way to share, with `atoms` atoms in d dimensions; `inner` is the width of a network's input."""

    name: str
    d: int
    atoms: int
    inner: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"family {self.name!r}: expected one of {', '.join(NAMES)}")
        if (self.name in ACTIVATIONS) != (self.inner > 0):
            raise ValueError(f"{self.name}: inner is {self.inner}; expected 1 or more for a network, else 0")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters: weights first."""
        L, d = self.atoms, self.d
        if self.name == "separate":
            return [(L,), (L, 2 * d)]
        if self.name == "simple":
            return [(L,), (L, d)]
        if self.free:
            return [(L,), (d, L), (d, L)]
        return [(L,), (L, self.inner), (d, self.inner), (d, self.inner)]

    @property
    def free(self) -> bool:
        """A network that is wide enough for every pair of prompts of every atom."""
        return self.inner >= self.atoms

    @property
    def size(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def split(self, angles: Tensor) -> list[Tensor]:
        """The parameters that the angles [..., size] stand for."""
        sines, found, at = angles.sin(), [], 0
        for shape in self.shapes:
            one = sines[..., at : at + torch.Size(shape).numel()].unflatten(-1, shape)
            found.append(HEAVIEST / 2 * (1 + one) if at == 0 else FARTHEST * one)
            at += torch.Size(shape).numel()
        return found

    def inputs(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Of an atom's key and value, what the theorem's loss is of, [..., L, d] each: prompts, or W1 p and W2 p."""
        _, *shared = self.split(angles)
        if self.name == "separate":
            return shared[0][..., : self.d], shared[0][..., self.d :]
        if self.name == "simple":
            return shared[0], shared[0]
        if self.free:
            return shared[0].mT, shared[1].mT
        p, first, second = shared
        return p @ first.mT, p @ second.mT

    def measure(self, angles: Tensor) -> Tensor:
        """Atoms [..., L, 1 + 2d]."""
        key, value = self.activated(*self.inputs(angles))
        return torch.cat([self.split(angles)[0].unsqueeze(-1), key, value], -1)

    def activated(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        s = ACTIVATIONS.get(self.name)
        return (s(key), s(value)) if s else (key, value)

    def angles(self, weights: Tensor, *shared: Tensor) -> Tensor:
        """The angles of given parameters: the inverse of `split`."""
        sines = [(2 / HEAVIEST * weights - 1).flatten(), *(one.flatten() / FARTHEST for one in shared)]
        found = torch.cat(sines)
        if found.shape != (self.size,) or found.abs().max() > 1:
            raise ValueError(f"{self.name}: parameters of the wrong number or outside of the parameter space")
        return found.asin()


@dataclass(frozen=True)
class Truth:
    """The true measure of two atoms: weights [2], what the losses are of [2, d] twice, the atoms [2, 1 + 2d]."""

    weights: Tensor
    key: Tensor
    value: Tensor
    atoms: Tensor


def truth(family: Family) -> Truth:
    """Of a family: one truth for separate and simple (p^K = p^V), another for the networks, whatever their width."""
    base = torch.linalg.qr(
        torch.randn(family.d, 2, generator=torch.Generator().manual_seed(7 * family.d), dtype=torch.float64)
    )[0].T  # [2, d], orthonormal
    weights, key = torch.tensor(WEIGHTS, dtype=torch.float64), RADIUS * base
    value = key
    if family.name in ACTIVATIONS:  # turned by 45 degrees
        value = RADIUS * torch.stack([base[0] + base[1], base[1] - base[0]]) / 2**0.5
    k, v = family.activated(key, value)
    return Truth(weights, key, value, torch.cat([weights[:, None], k, v], -1))


def true_angles(family: Family, split: int | None = None, share: float = 0.5) -> Tensor:
    """Angles of a family that give the truth: its two atoms or, of three, a copy of atom `split` with `share` of its w.

    A network that is not wide enough for three atoms has the unit vectors as inputs of the true two.
    """
    true = truth(family)
    extra = family.atoms - 2
    if extra not in (0, 1) or (extra == 1) != (split is not None):
        raise ValueError(f"{family.atoms} atoms, split {split}: expected 2, or 3 and the atom that is split")
    order = [0, 1] if split is None else [0, 1, split]
    weights = true.weights[order].clone()
    if split is not None:
        weights[split], weights[2] = true.weights[split] * (1 - share), true.weights[split] * share
    if family.name == "separate":
        return family.angles(weights, torch.cat([true.key, true.value], -1)[order])
    if family.name == "simple":
        return family.angles(weights, true.key[order])
    if family.free:
        return family.angles(weights, true.key[order].T, true.value[order].T)
    if family.inner != 2:
        raise ValueError(f"{family.name}: inner is {family.inner}; the true atoms are two, and need 2 or more")
    return family.angles(weights, torch.eye(2, dtype=torch.float64)[order], true.key.T, true.value.T)
