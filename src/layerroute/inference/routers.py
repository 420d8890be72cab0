"""Routers as the engine runs them: from the residual entering a block to its gate, once a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerroute.config import RouterConfig
from layerroute.errors import AdapterError, LayerRouteError
from layerroute.routing.router import RMS_EPSILON, threshold_logit

Route = tuple[bool, ...]
"""The gates of one step, one per block: True runs, False skips."""


@dataclass(frozen=True, slots=True)
class Routers:
    """All routers of an adapter: `weight` (blocks, hidden) and `bias` (blocks,), float32."""

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise AdapterError(
                f"routers of shape {tuple(self.weight.shape)} and {tuple(self.bias.shape)}: expected (blocks, hidden) "
                "and (blocks,)."
            )

    @classmethod
    def open(cls, blocks: int, hidden: int) -> "Routers":
        """Return routers that open every gate."""
        return cls(torch.zeros(blocks, hidden), torch.ones(blocks))


def pool_range(start: int, end: int, config: RouterConfig) -> range:
    """Return the positions a router averages for a step whose new context tokens are `start` .. `end - 1`.

    Without a cache `start` is 0 and the whole context counts. In a session the pool never looks behind `start`:
    tokens that an earlier step ran keep that step's residuals out of this step's gates; as many as `window` are
    always new, so that a prompt asked again takes the same route. Token 0 is left out if
    `config.skip_first`, unless it is the only one. Training must choose the same positions.
    """
    first = max(start, 1) if config.skip_first and end > 1 else start
    if config.pooling == "last":
        first = max(first, end - config.window)
    return range(first, end)


@dataclass(frozen=True, slots=True)
class PackedPool:
    """What the routers of several rows average, picked out of the packed tokens once for all blocks.

    All rows are averaged in one product: on a GPU a launch takes longer than the sums do.
    """

    index: Tensor  # (chosen,) int64: places among the packed tokens, row after row
    weight: Tensor  # (rows, chosen) float32: 1 / count on a row's own tokens, else 0
    normalise: bool

    @classmethod
    def over(cls, places: Sequence[range], config: RouterConfig, device: torch.device) -> "PackedPool":
        """Average the packed tokens at `places`, one range a row."""
        index = torch.tensor([place for row in places for place in row])
        counts = torch.tensor([len(row) for row in places])
        owner = torch.repeat_interleave(torch.arange(len(places)), counts)
        weight = (owner == torch.arange(len(places))[:, None]).float() / counts[:, None]
        return cls(index.to(device), weight.to(device), config.normalise)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the routers' inputs (rows, hidden) float32 from packed residuals (tokens, hidden)."""
        chosen = x[self.index].float()
        return self.weight @ (_normalised(chosen) if self.normalise else chosen)


class Gates:
    """Decides the gates of one adapter, block by block."""

    def __init__(self, routers: Routers, config: RouterConfig, blocks: int, width: int, device: torch.device) -> None:
        count, read = routers.weight.shape
        if (count, read) != (blocks, width):
            raise AdapterError(
                f"{count} routers of width {read} for a model of {blocks} blocks of width {width}. They belong to "
                "another backbone: give the one that their adapter names."
            )
        if beyond := [b for b in config.always_run if b >= blocks]:
            raise LayerRouteError(f"router.always_run: there is no block {beyond[0]}; the model has {blocks}.")
        self.config = config
        self._weight = routers.weight.to(device, torch.float32)
        self._bias = routers.bias.to(device, torch.float32)
        self._cut = threshold_logit(config)
        self._always = frozenset(config.always_run)

    def __call__(self, block: int, pool: PackedPool, x: Tensor) -> list[bool]:
        """Return whether each row of `pool` runs `block`, which the packed residuals `x` enter."""
        if block in self._always:
            return [True] * len(pool.weight)
        scores = torch.addmv(self._bias[block], pool(x), self._weight[block])
        # A residual that overflowed makes NaN of all that share the pool: then a block runs.
        return [not score <= self._cut for score in scores.tolist()]

    def of_tokens(self, entered: Tensor) -> list[Route]:
        """Return the route of each row that is decided from one token, given what entered each block of it.

        Args:
            entered: residuals (blocks, rows, hidden) float32.
        """
        read = _normalised(entered) if self.config.normalise else entered
        scores = (read * self._weight[:, None]).sum(dim=-1) + self._bias[:, None]
        runs = ~(scores <= self._cut)
        runs[sorted(self._always)] = True
        return [tuple(gates) for gates in runs.T.tolist()]


def _normalised(tokens: Tensor) -> Tensor:
    return tokens * torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + RMS_EPSILON)
