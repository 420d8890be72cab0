"""Hold the skip rate of each kind of step at its budget while training."""

import torch
from torch import Tensor, nn

from layerroute.config import KINDS, BudgetConfig


class BudgetController(nn.Module):
    """A two-sided constraint on the hard skip rate of each kind: an augmented Lagrangian.

    Penalty = sum over kinds of  multiplier * v + quadratic / 2 * v**2  with v = skip rate - target,
    and after each batch that holds the kind multiplier += multiplier_rate * v. The rate is hard (what would really be
    skipped) and its gradient soft: a penalty on soft gates is met without skipping anything.
    """

    multiplier: Tensor

    def __init__(self, config: BudgetConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("multiplier", torch.zeros(len(KINDS)))

    def penalty(self, skipped: Tensor, kinds: Tensor, totals: Tensor, scale: float = 1.0) -> Tensor:
        """Return the penalty of one batch and move the multipliers.

        Args:
            skipped: straight-through skip rate of each local step, (batch,).
            kinds: index into KINDS of each local step, (batch,).
            totals: over all ranks, per kind, the sum of hard skip rates and the number of steps, (2, kinds).
            scale: ranks whose gradients will be averaged, so that the sum is the global penalty's gradient.
        """
        loss = skipped.new_zeros(())
        for index, kind in enumerate(KINDS):
            total, count = totals[0, index], totals[1, index]
            if count == 0:
                continue
            violation = total / count - self.config.target(kind)
            pull = self.multiplier[index] + self.config.quadratic * violation
            local = (skipped * (kinds == index)).sum() / count
            loss = loss + pull.detach() * local * scale
            self.multiplier[index] += self.config.multiplier_rate * violation.detach()
        return loss


def rate_totals(skipped: Tensor, kinds: Tensor) -> Tensor:
    """Return the sum of `skipped` (batch,) and the number of steps for each kind, (2, kinds) float32."""
    return kind_totals(torch.stack([skipped, torch.ones_like(skipped)]), kinds)


def kind_totals(figures: Tensor, kinds: Tensor) -> Tensor:
    """Return each row's sum of `figures` (rows, batch) over the steps of each kind, (rows, kinds) float32."""
    return figures.detach().float() @ torch.nn.functional.one_hot(kinds, len(KINDS)).float()
