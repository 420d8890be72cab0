"""Steps -> batches of tensors, and the order in which steps are seen."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from layerroute.config import KINDS, Kind
from layerroute.data.steps import Step

WINDOW = 16  # updates whose steps are sorted by length together


class Span(NamedTuple):
    """Updates one after another with the same mix of kinds."""

    updates: int
    tool_share: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded steps. On pads both masks are false; their token is 0, which no real token sees."""

    input_ids: Tensor  # (batch, seq) int64
    context_mask: Tensor  # (batch, seq) bool
    response_mask: Tensor  # (batch, seq) bool
    kinds: Tensor  # (batch,) int64, index into KINDS

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`."""
        moved = (t.to(device) for t in (self.input_ids, self.context_mask, self.response_mask, self.kinds))
        return Batch(*moved)


def collate(steps: Sequence[Step]) -> Batch:
    """Return `steps` as one batch, in order."""
    width = max(len(step.input_ids) for step in steps)
    ids = torch.zeros(len(steps), width, dtype=torch.int64)
    for row, step in enumerate(steps):
        ids[row, : len(step.input_ids)] = torch.tensor(step.input_ids)
    place = torch.arange(width)[None]
    context = torch.tensor([step.context_length for step in steps])[:, None]
    length = torch.tensor([len(step.input_ids) for step in steps])[:, None]
    kinds = torch.tensor([KINDS.index(step.kind) for step in steps])
    return Batch(ids, place < context, (place >= context) & (place < length), kinds)


def by_length(steps: Sequence[Step], batch_tokens: int) -> list[list[int]]:
    """Group the indices of `steps` into batches of at most `batch_tokens` tokens, pads counted, shortest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(steps)), key=lambda i: (len(steps[i].input_ids), i)):
        if groups and len(steps[index].input_ids) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def schedule(steps: Sequence[Step], spans: Sequence[Span], *, size: int, seed: int) -> list[int]:
    """Return indices into `steps`, `size` for each update: its tool calls, then its planning.

    Every update of a span has the same mix of kinds, fractions of a step carried over within the span. Within a kind
    the order is a shuffle, drawn anew each time the kind is used up; of the steps drawn for the next `WINDOW` updates
    of a span, those of similar length go into the same update, so that little is computed on pads. What follows a
    span changes nothing in it.
    """
    draw = random.Random(seed)
    decks: dict[Kind, list[int]] = {k: [i for i, s in enumerate(steps) if s.kind == k] for k in KINDS}
    if missing := [kind for kind, deck in decks.items() if not deck]:
        raise ValueError(f"no step of kind {missing[0]!r}")
    left: dict[Kind, list[int]] = {kind: [] for kind in KINDS}
    order: list[int] = []
    for span in spans:
        owed = 0.0
        for start in range(0, span.updates, WINDOW):
            counts: list[tuple[int, int]] = []
            for _ in range(min(WINDOW, span.updates - start)):
                owed += span.tool_share * size
                tools = min(round(owed), size)
                owed -= tools
                counts.append((tools, size - tools))
            groups = [_groups(steps, _draw(decks[k], left[k], draw, n), n, draw) for k, n in _by_kind(counts)]
            for tools, planning in zip(*groups, strict=True):
                order += [*tools, *planning]
    return order


def _by_kind(counts: Sequence[tuple[int, int]]) -> list[tuple[Kind, list[int]]]:
    return [(kind, [count[index] for count in counts]) for index, kind in enumerate(KINDS)]


def _draw(deck: Sequence[int], left: list[int], draw: random.Random, counts: Sequence[int]) -> list[int]:
    drawn: list[int] = []
    for _ in range(sum(counts)):
        if not left:
            left.extend(draw.sample(deck, len(deck)))
        drawn.append(left.pop())
    return drawn


def _groups(steps: Sequence[Step], drawn: Sequence[int], counts: Sequence[int], draw: random.Random) -> list[list[int]]:
    """Cut `drawn` into groups of `counts`, each of similar lengths, in random order of length."""
    ranked = sorted(drawn, key=lambda index: len(steps[index].input_ids))
    turns = draw.sample(range(len(counts)), len(counts))
    groups: list[list[int]] = [[] for _ in counts]
    for turn in turns:
        groups[turn] = [ranked.pop() for _ in range(counts[turn])]
    return groups
