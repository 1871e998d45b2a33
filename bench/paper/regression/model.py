"""The regression of eq. 10 and 11: a softmax over known experts and, beside them, unknown ones, the prefix.

Letters: d width of an input, of an output and of both prompts; N known experts; L atoms of a measure; K support points.
A measure G = sum_j w_j delta(k_j, v_j) is a tensor [..., L, 1 + 2d] of its atoms (w, k, v), where w is the paper's
exp(b) and k, v are its prompts p^K, p^V. A weight may be zero: "at most L atoms" is then a closed set.

    f_G(x) = (sum_i exp(x'A_i x + a_i) (E_i x + e_i) + sum_j w_j exp((B k_j)'x) C v_j) / (the same sums of weights)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOISE = 0.1  # standard deviation of each coordinate of the noise
SUPPORT = 256  # points of the finite design


@dataclass(frozen=True)
class Experts:
    """What is known: the pre-trained experts, linear in x, and the projections of the prompts."""

    A: Tensor  # [N, d, d]
    a: Tensor  # [N]
    E: Tensor  # [N, d, d]
    e: Tensor  # [N, d]
    B: Tensor  # [d, d]
    C: Tensor  # [d, d]


@dataclass(frozen=True)
class Known:
    """What the known experts add at given inputs, so that no fit computes it twice."""

    numerator: Tensor  # [..., K, d]
    denominator: Tensor  # [..., K]
    xb: Tensor  # [..., K, d]: B'x
    C: Tensor  # [d, d]


@dataclass(frozen=True)
class Sample:
    """Replicates of n observations, as their sufficient statistics: at each input how many there are and their mean.

    Inputs without an observation have the count 0. `known` has one sample for all replicates (the finite design) or
    one for each.
    """

    known: Known  # leading axis 1 or R
    mean: Tensor  # [R, K, d]
    count: Tensor  # [R, K]

    def rows(self, which: Tensor) -> "Sample":
        """The replicates `which`, each as often as it is named."""
        known = self.known
        if known.xb.shape[0] != 1:
            known = Known(known.numerator[which], known.denominator[which], known.xb[which], known.C)
        return Sample(known, self.mean[which], self.count[which])


def experts(d: int, seed: int = 0) -> Experts:
    """Two pre-trained experts and projections that are orthogonal up to a factor, the same for every run."""
    draw = torch.Generator().manual_seed(1000 * d + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    A = normal(2, d, d) * (0.5 / d)
    B, C = (torch.linalg.qr(normal(d, d))[0] for _ in range(2))
    return Experts((A + A.mT) / 2, torch.zeros(2, dtype=torch.float64), normal(2, d, d) / d, normal(2, d) / d**0.5,
                   1.5 * B, C)  # fmt: skip


def known(given: Experts, x: Tensor) -> Known:
    """x [..., K, d]."""
    gates = torch.exp(torch.einsum("...ki,nij,...kj->...kn", x, given.A, x) + given.a)
    outputs = torch.einsum("nij,...kj->...kni", given.E, x) + given.e
    return Known((gates.unsqueeze(-1) * outputs).sum(-2), gates.sum(-1), x @ given.B, given.C)


def regression(at: Known, atoms: Tensor) -> Tensor:
    """f_G at the inputs of `at`: [..., K, d] of a measure [..., L, 1 + 2d]."""
    w, k, v = parts(atoms)
    gates = w.unsqueeze(-1) * torch.exp(k @ at.xb.mT)  # [..., L, K]
    values = v @ at.C.mT  # [..., L, d]
    return (at.numerator + gates.mT @ values) / (at.denominator + gates.sum(-2)).unsqueeze(-1)


def parts(atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = (atoms.shape[-1] - 1) // 2
    return atoms[..., 0], atoms[..., 1 : 1 + d], atoms[..., 1 + d :]


def support(d: int, points: int = SUPPORT) -> Tensor:
    """[K, d]: points of a scrambled Sobol sequence in [-1, 1]^d, the same for every run."""
    return 2 * torch.quasirandom.SobolEngine(d, scramble=True, seed=d).draw(points, dtype=torch.float64) - 1


def distance(at: Known, atoms: Tensor, truth: Tensor) -> Tensor:
    """|f_G - f_G*| in L2 of the uniform measure on the inputs of `at`."""
    return (regression(at, atoms) - regression(at, truth)).square().sum(-1).mean(-1).sqrt()


def sample(given: Experts, truth: Tensor, n: int, replicates: int, design: str, seed: list[int]) -> Sample:
    """n observations Y = f_G*(X) + noise, `replicates` times.

    design "support": X is uniform on `support(d)`. Then counts are multinomial, and the mean of c observations at a
    point is normal with the variance NOISE^2 / c: so any n is drawn exactly, at the same cost. "uniform": X is uniform
    on [-1, 1]^d, and every observation is kept.
    """
    random = np.random.default_rng(seed)
    d = given.B.shape[0]
    if design == "support":
        x = support(d)[None]
        counts = random.multinomial(n, np.full(SUPPORT, 1 / SUPPORT), size=replicates)
        count = torch.from_numpy(counts.astype(np.float64))
    else:
        x = torch.from_numpy(random.uniform(-1, 1, (replicates, n, d)))
        count = torch.ones(replicates, n, dtype=torch.float64)
    at = known(given, x)
    noise = torch.from_numpy(random.standard_normal((replicates, x.shape[1], d)))
    mean = regression(at, truth) + NOISE * noise / count.clamp(min=1).sqrt().unsqueeze(-1)
    return Sample(at, mean, count)


def objective(observed: Sample, atoms: Tensor) -> Tensor:
    """Half the sum of squares in units of the noise, without what no measure changes: [R] of atoms [R, L, 1 + 2d].

    At the truth it is about half the number of coordinates that were observed.
    """
    residual = (regression(observed.known, atoms) - observed.mean) / NOISE
    return (observed.count * residual.square().sum(-1)).sum(-1) / 2
