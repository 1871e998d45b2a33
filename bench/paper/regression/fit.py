"""Least squares over measures: damped Newton in float64 from many starts, all replicates at once.

The objective is not convex and, with atoms to spare, singular at the truth, where Gauss-Newton creeps: so the Hessian
is the whole one. It is known in closed form in the atoms (w, k, v); torch.func carries it over to a family's angles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from bench.paper.regression.families import Family
from bench.paper.regression.model import NOISE, Sample, parts

STEPS = 200  # from each start
MORE_STEPS = 400  # from the best of a replicate
FLAT = 1e-4  # a fit has converged at a gradient of at most FLAT * sqrt(n); noise makes 3 to 21 sqrt(n) at the truth
STIFF = 1e-5  # of n: a curvature below this is that of a valley, or of nothing
LONGEST = 0.7  # of a step, in radians
ROWS = 2**17  # problems times inputs that are worked on at once


@dataclass(frozen=True)
class Local:
    """The objective and its derivatives, for each of M problems."""

    value: Tensor  # [M]
    gradient: Tensor  # [M, P]
    hessian: Tensor  # [M, P, P]


@dataclass(frozen=True)
class Fit:
    """`steps` were taken; `converged` says whether the gradient is small and no direction leads down."""

    angles: Tensor  # [M, P]
    value: Tensor  # [M]
    gradient: Tensor  # [M], the norm over sqrt(n)
    converged: Tensor  # [M]
    steps: Tensor  # [M]


def in_atoms(observed: Sample, atoms: Tensor) -> Local:
    """`objective` of model.py for atoms [M, L, 1 + 2d], by its formula; P = L (1 + 2d), atom by atom.

    With D the denominator, s_i = exp((B k_i)'x) / D, c_i = C v_i, u_i = c_i - f and r = f - y: df/dw_i = s_i u_i,
    df/dk_i = w_i s_i u_i (B'x)', df/dv_i = w_i s_i C, and d2f/dw_i dw_j = -s_i s_j (u_i + u_j).
    """
    at, (w, k, v) = observed.known, parts(atoms)
    M, L, d = k.shape
    scale = observed.count / NOISE**2  # [M, K]
    gates = torch.exp(k @ at.xb.mT)  # [M, L, K]
    D = at.denominator + (w.unsqueeze(-1) * gates).sum(-2)  # [M, K]
    s = gates / D.unsqueeze(-2)
    c = v @ at.C.mT  # [M, L, d]
    f = at.numerator / D.unsqueeze(-1) + (w.unsqueeze(-1) * s).mT @ c  # [M, K, d]
    r = f - observed.mean
    value = (scale * r.square().sum(-1)).sum(-1) / 2

    # products over the outputs, [M, L, K] and [M, L, L, K]
    cr, cf = c @ r.mT, c @ f.mT
    a = s * (cr - (f * r).sum(-1).unsqueeze(-2))  # r . df/dw_i
    uu = (c @ c.mT).unsqueeze(-1) - cf.unsqueeze(1) - cf.unsqueeze(2) + f.square().sum(-1)[:, None, None]
    pair = s.unsqueeze(1) * s.unsqueeze(2) * scale[:, None, None]
    sa = s.unsqueeze(1) * a.unsqueeze(2) * scale[:, None, None]
    Q = pair * uu - sa - sa.transpose(1, 2)

    # sums over the inputs, against 1, B'x, their squares and what multiplies C
    one = torch.cat([torch.ones_like(at.xb[..., :1]), at.xb], -1)  # [M or 1, K, 1 + d]
    two = (one.unsqueeze(-1) * one.unsqueeze(-2)).flatten(-2)
    two = two.expand(M, -1, -1)
    one_m = one.expand(M, -1, -1)
    Q2 = (Q.flatten(1, 2) @ two).view(M, L, L, 1 + d, 1 + d)
    a2 = ((a * scale.unsqueeze(-2)) @ two).view(M, L, 1 + d, 1 + d)
    s1r = torch.einsum("mlk,mkp,mko->mlpo", s * scale.unsqueeze(-2), one_m, r) @ at.C  # [M, L, 1 + d, d]
    pair1 = (pair.flatten(1, 2) @ one_m).view(M, L, L, 1 + d)
    shifted = (one_m.unsqueeze(-1) * (f + r).unsqueeze(-2)).flatten(-2)  # f + r = 2f - y
    V = c[:, :, None, None] * pair1.unsqueeze(-1) - (pair.flatten(1, 2) @ shifted).view(M, L, L, 1 + d, d)
    V = V @ at.C  # [M, L, L, 1 + d, d]

    # the weight of an atom multiplies all but its own derivative
    by = torch.cat([torch.ones_like(w).unsqueeze(-1), w.unsqueeze(-1).expand(M, L, d)], -1)  # [M, L, 1 + d]
    same = torch.eye(L, dtype=w.dtype)[..., None, None]  # [L, L, 1, 1]
    gate = Q2 * by[:, :, None, :, None] * by[:, None, :, None, :]
    own = a2.clone()  # d2f/dw_i dk_i has s_i u_i (B'x)' too, d2f/dk_i dk_i has w_i s_i u_i (B'x)(B'x)'
    own[..., 0, 0] = 0
    own[..., 1:, 1:] *= w[..., None, None]
    gate = gate + same * own.unsqueeze(2)
    cross = V * by[..., None, :, None] * w[:, None, :, None, None]
    cross = cross + same * (s1r * by.unsqueeze(-1)).unsqueeze(2)  # [M, i, j, 1 + d, d]
    both = (w.unsqueeze(1) * w.unsqueeze(2) * pair1[..., 0])[..., None, None] * (at.C.mT @ at.C)
    whole = torch.cat([torch.cat([gate, cross], -1), torch.cat([cross.transpose(1, 2).mT, both], -1)], -2)
    gradient = torch.cat([a2[..., 0] * by, w.unsqueeze(-1) * s1r[..., 0, :]], -1)
    size = L * (1 + 2 * d)
    return Local(value, gradient.flatten(1), whole.transpose(2, 3).reshape(M, size, size))


def in_angles(observed: Sample, family: Family, angles: Tensor) -> Local:
    """The same for a family's angles [M, P]."""

    def flat(one: Tensor) -> Tensor:
        return family.measure(one).flatten()

    def weighed(one: Tensor, by: Tensor) -> Tensor:
        return flat(one) @ by

    found = in_atoms(observed, family.measure(angles))
    J = vmap(jacrev(flat))(angles)  # [M, atoms, P]
    curved = vmap(jacrev(grad(weighed)))(angles, found.gradient)  # jacrev: torch.func.hessian warns of torch.jit
    whole = J.mT @ found.hessian @ J + curved
    return Local(found.value, (found.gradient.unsqueeze(-2) @ J).squeeze(-2), (whole + whole.mT) / 2)


def minimise(observed: Sample, family: Family, starts: Tensor, n: int) -> tuple[Fit, Fit]:
    """Fits from every start [R, S, P] of the R replicates, fields [R, S, ...]; and the best of each, fields [R, ...].

    The best goes on for a while if it has not converged.
    """
    every = from_starts(observed, family, starts, n, STEPS)
    row, best = torch.arange(len(starts)), every.value.argmin(1)
    last = from_starts(observed, family, every.angles[row, best].unsqueeze(1), n, MORE_STEPS)
    return every, Fit(**{name: getattr(last, name).squeeze(1) for name in Fit.__dataclass_fields__})


def from_starts(observed: Sample, family: Family, starts: Tensor, n: int, most: int) -> Fit:
    """In blocks of replicates that memory holds."""
    R, S = starts.shape[:2]
    each = max(1, ROWS // (observed.count.shape[1] * S))
    found = []
    for first in range(0, R, each):
        rows = torch.arange(first, min(first + each, R)).repeat_interleave(S)
        found.append(newton(observed.rows(rows), family, starts[first : first + each].flatten(0, 1), n, most))
    joined = {name: torch.cat([getattr(fit, name) for fit in found]) for name in Fit.__dataclass_fields__}
    return Fit(**{name: one.unflatten(0, (R, S)) for name, one in joined.items()})


def newton(observed: Sample, family: Family, angles: Tensor, n: int, most: int) -> Fit:
    """Newton's steps on |H| + mu n, one problem a row; a step that leads up is not taken, and the next is shorter.

    Two atoms for one make a curved valley, along which the objective changes by less than noise can tell. Each third
    step only goes back to its bottom, or the gradient across it would never be small.
    """
    angles = angles.clone()
    here = in_angles(observed, family, angles)
    value, norm, lowest = here.value.clone(), _norm(here, n), torch.full_like(here.value, -torch.inf)
    steps, mu = torch.zeros(len(angles), dtype=torch.int64), torch.ones_like(value)
    left = torch.arange(len(angles))  # rows that still move
    for count in range(most + 1):
        spectrum, basis = torch.linalg.eigh(here.hessian)
        lowest[left] = spectrum[:, 0] / n
        moving = (norm[left] > FLAT) | (lowest[left] < -STIFF)
        if count == most or not moving.any():
            break
        if not moving.all():
            left, spectrum, basis = left[moving], spectrum[moving], basis[moving]
            here = Local(here.value[moving], here.gradient[moving], here.hessian[moving])
            observed = observed.rows(moving.nonzero().squeeze(-1))
        across = count % 3 == 2
        step = _step(here, spectrum, basis, n, mu[left], across)
        tried = in_angles(observed, family, angles[left] + (basis @ step.unsqueeze(-1)).squeeze(-1))
        along = (basis.mT @ here.gradient.unsqueeze(-1)).squeeze(-1)
        promised = -(along * step + spectrum * step.square() / 2).sum(-1)
        kept = ((here.value - tried.value) / promised.abs().clamp(min=1e-300)).clamp(-1, 1)
        better = tried.value <= here.value
        angles[left] += torch.where(better.unsqueeze(-1), (basis @ step.unsqueeze(-1)).squeeze(-1), 0.0)
        here = Local(
            torch.where(better, tried.value, here.value),
            torch.where(better[:, None], tried.gradient, here.gradient),
            torch.where(better[:, None, None], tried.hessian, here.hessian),
        )
        value[left], norm[left] = here.value, _norm(here, n)
        if not across:  # steps that keep half of their promise keep their length
            factor = torch.where(better, (1 - (2 * kept - 1) ** 3).clamp(min=0.2), 8.0)
            mu[left] = (mu[left] * factor).clamp(min=1e-10)
        steps[left] += 1
    return Fit(angles, value, norm, (norm <= FLAT) & (lowest >= -STIFF), steps)


def _step(here: Local, spectrum: Tensor, basis: Tensor, n: int, mu: Tensor, across: bool) -> Tensor:
    """In the Hessian's own basis; `across`: without damping, where the curvature is more than a valley's."""
    size = spectrum.abs()
    along = (basis.mT @ here.gradient.unsqueeze(-1)).squeeze(-1)
    if across:
        step = torch.where(size > STIFF * n, -along / size, 0.0)
    else:
        step = -along / (size + n * mu.unsqueeze(-1))
        saddle = (_norm(here, n) <= FLAT) & (spectrum[:, 0] < -STIFF * n)  # its gradient says nothing of the way down
        step[:, 0] += torch.where(saddle, 0.05 / mu.clamp(min=1), 0.0)
    return step * (LONGEST / torch.linalg.vector_norm(step, dim=-1, keepdim=True).clamp(min=LONGEST))


def _norm(here: Local, n: int) -> Tensor:
    return torch.linalg.vector_norm(here.gradient, dim=-1) / n**0.5
