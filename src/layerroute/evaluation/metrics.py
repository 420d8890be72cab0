"""Figures from scores: pure functions of per-step tensors, with bootstrap intervals over conversations.

Every figure here is a function of sums over steps. Steps of one conversation are not independent, so a
bootstrap draw takes whole conversations, and a figure of a draw is that function of the draw's sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerroute.config import KINDS

BINS_PER_OCTAVE = 4  # bins of context length are about 19 % wide


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval; None where the steps do not give one."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Draws of conversations with replacement; the same draws for every figure, so that figures are paired."""

    groups: Tensor  # (steps,) int64: which conversation each step is of
    counts: Tensor  # (1 + draws, conversations) float64: how often each is in a draw; row 0 is the sample itself

    @classmethod
    def over(cls, conversations: Sequence[str], draws: int, seed: int) -> "Bootstrap":
        """Draw from the distinct names in `conversations`, one name a step; a single one gives no intervals."""
        place = {name: index for index, name in enumerate(dict.fromkeys(conversations))}
        groups = torch.tensor([place[name] for name in conversations], dtype=torch.int64)
        random = torch.Generator().manual_seed(seed)
        counts = torch.ones(1 + (draws if len(place) > 1 else 0), len(place), dtype=torch.float64)
        for draw in range(1, len(counts)):
            picked = torch.randint(len(place), (len(place),), generator=random)
            counts[draw] = torch.bincount(picked, minlength=len(place))
        return cls(groups, counts)

    def sums(self, columns: Tensor) -> Tensor:
        """Sum `columns` (steps, k) over the steps of each draw, giving (1 + draws, k)."""
        each = torch.zeros(self.counts.shape[1], columns.shape[1], dtype=torch.float64)
        return self.counts @ each.index_add(0, self.groups, columns.double())


def interval(values: Tensor) -> Interval:
    """Return the figure values[0] and the 2.5th and 97.5th percentile of its draws values[1:].

    Draws without the figure (a kind is missing from them) are left out; None where too few are left.
    """
    draws = values[1:]
    draws = draws[draws.isfinite()]
    value = number(values[0])
    if value is None or len(draws) < 2:
        return Interval(value, None, None)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def number(value: Tensor | float) -> float | None:
    """Return `value` as a float that JSON can hold: None for NaN and infinities."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def perplexity(nll: Tensor, tokens: Tensor) -> float | None:
    """Return exp of the mean negative log-likelihood per response token; None without tokens."""
    return number(torch.exp(nll.double().sum() / tokens.sum()))


def mean(values: Tensor) -> float | None:
    """Return the mean over steps; None without steps."""
    return number(values.double().mean())


def differential(skipped: Tensor, kinds: Tensor, bootstrap: Bootstrap) -> Interval:
    """Return the skip rate on tool calls minus that on planning, in points.

    Args:
        skipped: share of blocks each step skipped, (steps,).
        kinds: index into KINDS of each step, (steps,).
        bootstrap: over the steps' conversations.
    """
    one_hot = _one_hot(kinds)
    total = bootstrap.sums(torch.cat([one_hot * skipped.double()[:, None], one_hot], dim=1))
    rates = total[:, : len(KINDS)] / total[:, len(KINDS) :]
    return interval(100.0 * (rates[:, 0] - rates[:, 1]))


@dataclass(frozen=True, slots=True)
class Matched:
    """A differential between steps of like context length, and how many steps it rests on."""

    points: Interval
    steps: int
    tools_offered: bool  # on steps with tools on offer alone


def length_matched(
    skipped: Tensor, kinds: Tensor, lengths: Tensor, tools_offered: Tensor, bootstrap: Bootstrap
) -> Matched | None:
    """Return the differential between tool calls and planning with contexts of like length, or None.

    Only steps with tools on offer count, where both kinds have such. Context lengths fall into bins a quarter
    of an octave wide; each bin that holds both kinds gives one difference, and bins are averaged by the
    number of steps of the rarer kind in them. None where no bin holds both kinds.

    Args:
        skipped: share of blocks each step skipped, (steps,).
        kinds: index into KINDS, (steps,).
        lengths: context tokens, (steps,).
        tools_offered: (steps,) bool.
        bootstrap: over the steps' conversations.
    """
    one_hot = _one_hot(kinds)
    offered = one_hot * tools_offered.double()[:, None]
    both = bool((offered.sum(dim=0) > 0).all())
    eligible = offered if both else one_hot
    bins = torch.floor(BINS_PER_OCTAVE * torch.log2(lengths.double())).long()
    used, place = torch.unique(bins, return_inverse=True)
    in_bin = torch.nn.functional.one_hot(place, len(used)).double()
    count = in_bin[:, :, None] * eligible[:, None, :]  # (steps, bins, kinds)
    columns = torch.stack([count, count * skipped.double()[:, None, None]], dim=1)
    total = bootstrap.sums(columns.flatten(1)).reshape(-1, 2, len(used), len(KINDS))
    steps, closed = total[:, 0], total[:, 1]
    weight = steps.amin(dim=2)
    rates = torch.where(steps > 0, closed / steps, 0.0)
    points = ((rates[..., 0] - rates[..., 1]) * weight).sum(dim=1) / weight.sum(dim=1)
    if not bool(weight[0].sum() > 0):
        return None
    return Matched(interval(100.0 * points), int(steps[0][weight[0] > 0].sum()), both)


def relative_perplexity(nll: Tensor, reference: Tensor, tokens: Tensor, bootstrap: Bootstrap) -> Interval:
    """Return perplexity over the reference's perplexity, minus 1: on the same steps, so the draws are paired.

    Args:
        nll: of each step, (steps,); 0 on steps that do not count.
        reference: of the same steps, likewise.
        tokens: response tokens, (steps,); 0 on steps that do not count.
        bootstrap: over the steps' conversations.
    """
    total = bootstrap.sums(torch.stack([nll.double() - reference.double(), tokens.double()], dim=1))
    return interval(torch.expm1(total[:, 0] / total[:, 1]))


def accuracy(right: Tensor, bootstrap: Bootstrap, reference: Tensor | None = None) -> Interval:
    """Return the share of right answers, less that of `reference` on the same questions, with its interval.

    Args:
        right: (questions,) bool, or the share of several runs that answer each right.
        bootstrap: over the questions' conversations.
        reference: likewise, or None.
    """
    gained = right.double() if reference is None else right.double() - reference.double()
    total = bootstrap.sums(torch.stack([gained, torch.ones_like(gained)], dim=1))
    return interval(total[:, 0] / total[:, 1])


def run_rate(gates: Tensor) -> list[float | None]:
    """Return the share of steps that run each block, from gates (steps, blocks)."""
    return [number(rate) for rate in gates.double().mean(dim=0)]


def histogram(values: Tensor, bins: int) -> list[int]:
    """Count `values` from 0 to 1 in `bins` equal bins; 1 itself is in the last."""
    place = (values.flatten().double() * bins).long().clamp(0, bins - 1)
    return [int(count) for count in torch.bincount(place, minlength=bins)]


def _one_hot(kinds: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(kinds, len(KINDS)).double()
