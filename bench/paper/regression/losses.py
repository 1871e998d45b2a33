"""Voronoi cells and the losses of Theorems 4.1 to 4.3. Reconstructed: the text at hand has lost the formulas.

They are put together from the prose around them, from the proofs' steps (what goes to zero, and what is summed), and
from the usual form of such losses. Let w = exp(b), let an atom's place be omega = (p^K, p^V) for Theorem 4.1, p for
4.2 and (W1 p, W2 p) for 4.3, and let D be the difference of an atom's place from that of the true atom of its cell.

    V_j = {i : |omega_i - omega*_j| <= |omega_i - omega*_l| for all l}                       (ties: the first)
    D_1,r = sum_j |sum_{V_j} w_i - w*_j| + sum_j sum_{V_j} w_i (|D p^K_i|^r + |D p^V_i|^r)
    D_2   = sum_j |sum_{V_j} w_i - w*_j| + sum_{|V_j| = 1} w_i |D p_i| + sum_{|V_j| > 1} w_i |D p_i|^2
    D_3   = as D_2, with |D W1 p_i| + |D W2 p_i|, and with their squares
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.paper.regression.families import Truth

DIGITS = 5  # of a replicate's numbers in a record


@dataclass(frozen=True)
class Cells:
    """Where fitted atoms lie: [..., L] each, and the weights' part of every loss, [...]."""

    weights: Tensor
    key: Tensor  # |D| of the key's place
    value: Tensor
    crowd: Tensor  # atoms in the same cell, this one included
    imbalance: Tensor


def cells(weights: Tensor, key: Tensor, value: Tensor, true: Truth) -> Cells:
    """Of measures with the weights [..., L] and the places key and value [..., L, d]."""
    from_key = torch.linalg.vector_norm(key.unsqueeze(-2) - true.key, dim=-1)  # [..., L, true]
    from_value = torch.linalg.vector_norm(value.unsqueeze(-2) - true.value, dim=-1)
    nearest = (from_key.square() + from_value.square()).argmin(-1, keepdim=True)  # [..., L, 1]
    inside = nearest == torch.arange(len(true.weights))  # [..., L, true]
    imbalance = ((weights.unsqueeze(-1) * inside).sum(-2) - true.weights).abs().sum(-1)
    crowd = inside.sum(-2, keepdim=True).expand_as(from_key)

    def own(of_each: Tensor) -> Tensor:
        return of_each.gather(-1, nearest).squeeze(-1)

    return Cells(weights, own(from_key), own(from_value), own(crowd), imbalance)


def d1(at: Cells, r: float) -> Tensor:
    return at.imbalance + (at.weights * (at.key**r + at.value**r)).sum(-1)


def d2(at: Cells) -> Tensor:
    """For places with one prompt, p^K = p^V = p."""
    return at.imbalance + (at.weights * torch.where(at.crowd == 1, at.key, at.key**2)).sum(-1)


def d3(at: Cells) -> Tensor:
    alone, others = at.key + at.value, at.key**2 + at.value**2
    return at.imbalance + (at.weights * torch.where(at.crowd == 1, alone, others)).sum(-1)


def mean_in(at: Cells, distances: Tensor, alone: bool) -> Tensor:
    """Mean of |D|, by weight, over atoms that are alone in their cells, or over all others; nan where there are none.

    By weight, because a place without weight is no part of the measure.
    """
    weights = at.weights * ((at.crowd == 1) if alone else (at.crowd > 1))
    return (weights * distances).sum(-1) / weights.sum(-1)


def rounded(values: Tensor) -> list[float | None]:
    """A replicate each, as a record keeps them."""
    return [None if value != value else float(f"{value:.{DIGITS}g}") for value in values.tolist()]
