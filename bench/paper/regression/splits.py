"""The proof's own sequences, without noise or fit: an atom is split in two, and the loss is set against the error.

The theorems' upper bounds stand on a constant below which |f_G - f_G*| / D does not fall, whatever G is near G*;
Theorem 4.1's lower bound on a sequence along which |f_G - f_G*| / D_1,r goes to 0. These are such sequences.
"""

from typing import Any

import torch
from torch import Tensor

from bench.paper.regression import families, losses, model
from bench.paper.regression.families import ACTIVATIONS, Family

SPLITS = (10, 30, 100, 300, 1000)
D = 3


def rows() -> list[dict[str, Any]]:
    """One for each sequence, loss and n: `error` |f_G - f_G*|, `loss`, `ratio` of the two."""
    found = []
    for r in (1, 2):
        found += [_row(f"4.1: values apart, D_1,{r}", n, *separate(n, r)) for n in SPLITS]
    found += [_row("4.2: prompts apart, D_2", n, *simple(n)) for n in SPLITS]
    for name in ACTIVATIONS:
        found += [_row(f"4.3 {name}: inputs apart, W the true one, D_3", n, *network(name, n)) for n in SPLITS]
    for name in ACTIVATIONS:
        found += [_row(f"4.3 {name}: values apart, W free, D_3", n, *free(name, n)) for n in SPLITS]
    return found


def separate(n: int, r: int) -> tuple[float, float]:
    """The split of the proof of Theorem 4.1: weights w/2 + n^-(r+1)/2 each, keys as they are, values 1/n apart."""
    family = Family("separate", D, 3)
    true = families.truth(family)
    weights = torch.cat([true.weights[:1] / 2, true.weights[1:], true.weights[:1] / 2])
    weights[[0, 2]] += n ** -(r + 1) / 2
    key, value = true.key[[0, 1, 0]], true.value[[0, 1, 0]].clone()
    value[0, 0] += 1 / n
    value[2, 0] -= 1 / n
    at = losses.cells(weights, key, value, true)
    return _error(family, weights, key, value), float(losses.d1(at, r))


def simple(n: int) -> tuple[float, float]:
    family = Family("simple", D, 3)
    true = families.truth(family)
    weights, p = _halved(true.weights), true.key[[0, 1, 0]].clone()
    p[0, 0] += 1 / n
    p[2, 0] -= 1 / n
    return _error(family, weights, p, p), float(losses.d2(losses.cells(weights, p, p, true)))


def network(name: str, n: int) -> tuple[float, float]:
    """Inputs p apart under the true W1 and W2, which are one to one: key and value part together."""
    family = Family(name, D, 3, 2)
    true = families.truth(family)
    weights, p = _halved(true.weights), torch.eye(2, dtype=torch.float64)[[0, 1, 0]].clone()
    p[0] += 1 / n
    p[2] -= 1 / n
    key, value = p @ true.key, p @ true.value
    return _error(family, weights, key, value), float(losses.d3(losses.cells(weights, key, value, true)))


def free(name: str, n: int) -> tuple[float, float]:
    """W1 and W2 with a column for each atom: keys as they are, and s(W2 p) apart, so that the two values' mean stays.

    The function is the true one then, exactly: v enters it linearly. n**-0.5 apart, so that D_3 is of order 1/n.
    """
    family = Family(name, D, 3, 3)
    true = families.truth(family)
    weights, key = _halved(true.weights), true.key[[0, 1, 0]]
    value = true.value[[0, 1, 0]].clone()
    output = family.activated(key, value)[1]
    apart = 0.1 * n**-0.5
    value[0, 0] = _inverse(name, output[0, 0] + apart)
    value[2, 0] = _inverse(name, output[2, 0] - apart)
    return _error(family, weights, key, value), float(losses.d3(losses.cells(weights, key, value, true)))


def _inverse(name: str, output: Tensor) -> Tensor:
    return {"tanh": torch.atanh, "sigmoid": torch.logit, "linear": torch.clone}[name](output)


def _halved(weights: Tensor) -> Tensor:
    return torch.stack([weights[0] / 2, weights[1], weights[0] / 2])


def _error(family: Family, weights: Tensor, key: Tensor, value: Tensor) -> float:
    at = model.known(model.experts(D), model.support(D))
    k, v = family.activated(key, value)
    atoms = torch.cat([weights[:, None], k, v], -1)
    return float(model.distance(at, atoms, families.truth(family).atoms))


def _row(sequence: str, n: int, error: float, loss: float) -> dict[str, Any]:
    return {"sequence": sequence, "n": n, "error": error, "loss": loss, "ratio": error / loss}
