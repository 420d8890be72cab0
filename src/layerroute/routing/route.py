"""A route: the gates of one step over all blocks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """Which blocks one step runs; index 0 is the block nearest the embedding. True runs, False skips."""

    gates: tuple[bool, ...]

    @classmethod
    def skipping(cls, blocks: Iterable[int], count: int) -> "Route":
        """Return the route over `count` blocks that skips `blocks` and runs the rest."""
        closed = set(blocks)
        if outside := sorted(b for b in closed if not 0 <= b < count):
            raise ValueError(f"block {outside[0]} does not exist; blocks are 0..{count - 1}")
        return cls(tuple(index not in closed for index in range(count)))

    @classmethod
    def open(cls, count: int) -> "Route":
        """Return the route over `count` blocks that runs them all."""
        return cls((True,) * count)

    @property
    def skipped(self) -> tuple[int, ...]:
        """The blocks not run, ascending."""
        return tuple(index for index, runs in enumerate(self.gates) if not runs)

    @property
    def skip_rate(self) -> float:
        """Share of blocks not run: of block FLOPs too, over the tokens that the scope covers."""
        return len(self.skipped) / len(self.gates)

    def tensor(self) -> Tensor:
        """Return the gates as a bool tensor of shape (blocks,)."""
        return torch.tensor(self.gates)

    def __str__(self) -> str:
        return "".join("█" if runs else "·" for runs in self.gates)
