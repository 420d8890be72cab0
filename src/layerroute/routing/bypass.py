"""What stands in for a closed block: a low-rank linear map."""

import torch
from torch import Tensor, nn


class Bypass(nn.Module):
    """`h + up(down(norm(h)))` in place of `Block(h)`; norm is the block's own first one, which stays with the block.

    2 * rank * hidden parameters. At birth `up` is zero, so that a closed block's residual passes untouched. That a
    block deep inside a transformer is nearly linear on its data is known from pruning, where one matrix takes the
    place of several blocks (ReplaceMe, arXiv 2505.02819); here it serves the steps that skip the block, and no others.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, hidden_size, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """Map the residual (batch, seq, dim), and the same normed, to the residual after the closed block."""
        change: Tensor = self.up(self.down(normed.to(self.down.weight.dtype)))
        return hidden + change.to(hidden.dtype)

    @property
    def is_idle(self) -> bool:
        """Whether the residual passes untouched."""
        return not bool(self.up.weight.any())
