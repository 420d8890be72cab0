"""Logistic regression that also says how each example would be scored by a fit without it."""

from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)  # each fit starts where a stronger one ended
NEWTON_STEPS = 50


@dataclass(frozen=True, slots=True)
class LogisticFit:
    """A linear score whose sign is the class. Its scale is such that left-out scores are 1 in size on average."""

    weight: Tensor  # (dim,)
    bias: Tensor  # ()
    left_out: Tensor  # (examples,): the score of each by a fit without it


def fit_logistic(x: Tensor, y: Tensor) -> LogisticFit:
    """Fit y (examples,) = +1 / -1 from x (examples, dim), each class weighing one half.

    Minimises sum_i w_i log(1 + exp(-y_i f_i)) + penalty / 2 |weight|^2 by Newton's method, in float64; penalties are
    relative to the mean |x|^2. The one with the least loss over left-out scores is taken. Those come from one Newton
    step away from the whole fit, not from as many fits as examples (Rad and Maleki 2020, "A scalable estimate of the
    out-of-sample prediction error via approximate leave-one-out cross-validation", section 2).
    """
    share = torch.where(y > 0, (y > 0).double().mean(), (y < 0).double().mean())
    w, y = 0.5 / share / len(y), y.double()
    basis, rotated = torch.linalg.qr(x.double().T)  # as many unknowns as examples at most, and the same penalty
    z = torch.cat([rotated.T, torch.ones_like(y)[:, None]], dim=1)
    length = float(rotated.square().sum()) / len(y) or 1.0  # examples of zeros alone still need a penalty
    solution = z.new_zeros(z.shape[1])
    fits: list[tuple[float, Tensor, Tensor]] = []
    for penalty in PENALTIES:
        pull = torch.full_like(solution, penalty * length)
        pull[-1] = 1e-9  # the bias is free, as far as a finite answer allows
        solution = _newton(z, y, w, pull, solution)
        left_out = _left_out(z, y, w, pull, solution)
        fits.append((float(_loss(left_out, y, w)), solution, left_out))
    _, solution, left_out = min(fits, key=lambda fit: fit[0])
    size = (w * left_out.abs()).sum()
    weight, bias, left_out = ((t / size).to(x.dtype) for t in (basis @ solution[:-1], solution[-1], left_out))
    return LogisticFit(weight, bias, left_out)


def _newton(z: Tensor, y: Tensor, w: Tensor, pull: Tensor, start: Tensor) -> Tensor:
    """Return the minimum, a step halved for as long as it does not go down."""

    def objective(at: Tensor) -> Tensor:
        return _loss(z @ at, y, w) + 0.5 * (pull * at.square()).sum()

    at, value = start, objective(start)
    for _ in range(NEWTON_STEPS):
        slope, curve = _derivatives(z @ at, y, w)
        gradient = z.T @ slope + pull * at
        step = torch.cholesky_solve(gradient[:, None], _factor(z, curve, pull))[:, 0]
        expected = gradient @ step  # twice what a quadratic would go down by
        if expected < 1e-10 * value:
            break
        size = 1.0
        while size > 1e-3 and objective(at - size * step) > value - 0.1 * size * expected:
            size /= 2
        at = at - size * step
        value = objective(at)
    return at


def _left_out(z: Tensor, y: Tensor, w: Tensor, pull: Tensor, at: Tensor) -> Tensor:
    slope, curve = _derivatives(z @ at, y, w)
    influence = (z * torch.cholesky_solve(z.T, _factor(z, curve, pull)).T).sum(dim=1)
    return z @ at + slope * influence / (1.0 - curve * influence).clamp(min=1e-3)


def _derivatives(score: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    wrong = torch.sigmoid(-y * score)
    return -w * y * wrong, w * wrong * (1.0 - wrong)


def _factor(z: Tensor, curve: Tensor, pull: Tensor) -> Tensor:
    factor: Tensor = torch.linalg.cholesky((z.T * curve) @ z + torch.diag(pull))
    return factor


def _loss(score: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w * torch.nn.functional.softplus(-y * score)).sum()
