"""Score a step at a block: pool what is read of it, apply one linear map, compare with a threshold."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerroute.config import RouterConfig, Scope

RMS_EPSILON = 1e-6


def read_and_skipped(context: Tensor, response: Tensor | None, scope: Scope) -> tuple[Tensor, Tensor | None]:
    """Return which tokens routers read and which a closed gate skips, (batch, seq) bool each; None skips all.

    Args:
        context: (batch, seq) bool, the context's tokens.
        response: (batch, seq) bool, the response's tokens; scope `step` needs none.
        scope: what a closed gate skips.

    Raises:
        ValueError: the scope asks for a response and there is none.
    """
    if scope == "step":
        return context, None
    if response is None:
        raise ValueError(f"scope {scope!r} needs to know which tokens are the response's")
    if scope == "response":
        return context, response
    opening = response & (response.cumsum(dim=1) == 1)
    return opening, response & ~opening


@dataclass(frozen=True, slots=True)
class Pool:
    """The tokens that the routers average; the same tokens at every block.

    Only these tokens are read, so pooling costs nothing next to a block.
    """

    index: Tensor  # (batch, pooled) int64: positions in the sequence
    weight: Tensor  # (batch, pooled) float32: 1 / count, 0 on filler; rows sum to 1
    normalise: bool

    @classmethod
    def over(cls, read: Tensor, config: RouterConfig) -> "Pool":
        """Choose those tokens of each row of `read` (batch, seq) bool that `config` asks for.

        Raises:
            ValueError: a row has no token to read, so nothing could decide its route.
        """
        chosen = read.bool()
        count = chosen.sum(dim=1, keepdim=True)
        if not bool((count > 0).all()):
            raise ValueError("every step needs at least one token that its route is decided from")
        if config.skip_first:  # kept where it is the only one
            first = chosen & (chosen.cumsum(dim=1) == 1)
            chosen = chosen & ~(first & (count > 1))
        if config.pooling == "last":
            from_the_end = chosen.flip(1).cumsum(dim=1).flip(1)
            chosen = chosen & (from_the_end <= config.window)
        count = chosen.sum(dim=1, keepdim=True)
        width = int(count.max())
        index = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        weight = chosen.gather(1, index) / count
        return cls(index, weight.float(), config.normalise)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Average the chosen tokens of `hidden` (batch, seq, dim), giving (batch, dim) float32."""
        index = self.index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        tokens = hidden.gather(1, index).float()
        if self.normalise:
            tokens = tokens * torch.rsqrt(tokens.square().mean(dim=-1, keepdim=True) + RMS_EPSILON)
        return (tokens * self.weight.unsqueeze(-1)).sum(dim=1)


class Router(nn.Module):
    """`Linear(hidden, 1)` in float32: hidden + 1 parameters a block (paper, section 3).

    Training may standardise its input by `shift` and `scale`, which are constants and not parameters;
    `folded` gives the plain linear map that computes the same score.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.register_buffer("shift", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
        self.reset(bias=1.0)

    @torch.no_grad()
    def reset(self, *, bias: float) -> None:
        """Set the weight to zero, so that every step gets the score `bias`."""
        self.score.weight.zero_()
        self.score.bias.fill_(bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map the pooled tokens (batch, dim) float32 to run logits (batch,)."""
        standardised = (pooled - self.shift) * self.scale
        # Autocast would score in bfloat16, and gates would differ between training and inference.
        with torch.autocast(pooled.device.type, enabled=False):
            score: Tensor = self.score(standardised)
        return score.squeeze(-1)

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight (dim,) and bias () of the equivalent map on the raw pooled tokens."""
        weight = self.score.weight[0] * self.scale
        return weight, self.score.bias[0] - weight @ self.shift


def threshold_logit(config: RouterConfig) -> float:
    """Return the logit above which a gate is open."""
    return math.log(config.threshold / (1.0 - config.threshold))


def initial_bias(block: int, config: RouterConfig) -> float:
    """Return the bias of a router at birth: all gates open at any threshold (paper: +1, and -1 for blocks 8..16)."""
    if config.init == "paper":
        return -1.0 if 8 <= block <= 16 else 1.0
    return 1.0 + threshold_logit(config)
