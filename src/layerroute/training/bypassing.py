"""Fit the bypasses: the best linear stand-in for each block, before any is chosen, and for those chosen, together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerroute.data.batches import Batch
from layerroute.models.attaching import RoutedModel
from layerroute.routing.bypass import Bypass
from layerroute.routing.routed import RoutedBlock, RoutePass

RIDGE = 1e-3  # of the mean square of an input
EPSILON = 1e-6


@torch.no_grad()
def fit_bypasses(routed: RoutedModel, batches: Sequence[Batch], progress: Callable[[str], None]) -> None:
    """Fit every bypass to what its block adds to the residual while all blocks run, by reduced-rank regression.

    The last block is left alone: what leaves it is never seen before the final norm, and hardly any step can spare it.

    Args:
        routed: the model, in the state in which blocks will be chosen. It is left in eval mode.
        batches: training steps of the kinds that close blocks; without any, bypasses stay as they are.
        progress: called with a line of text.
    """
    routed.eval()
    if batches:
        progress(f"fitting bypasses on {sum(len(batch) for batch in batches)} training steps")
        for block, (square, product) in zip(routed.blocks, moments(routed, batches), strict=False):
            if block.bypass is not None:
                _set(block.bypass, square, product)


@torch.no_grad()
def moments(routed: RoutedModel, batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each block but the last, the sums of x' x and of x' y, both (hidden, hidden) float64.

    x is the normed residual of each token that a closed gate would skip, y what the block adds to it. Tokens count in
    inverse proportion to their residual's mean square, since the next norm divides by it. Sums are taken in float32
    whatever the context: in bfloat16 their error would be larger than the ridge.
    """
    blocks, device = routed.blocks[:-1], routed.device
    width = routed.routers[0].score.in_features
    squares, products = ([torch.zeros(width, width, dtype=torch.float64, device=device) for _ in blocks] for _ in "xy")
    gates = torch.ones(1, len(routed.blocks), dtype=torch.bool, device=device)
    for batch in batches:
        run = routed.begin(batch.context_mask, batch.response_mask, forced=gates, keep_residuals=True)
        routed.residuals(batch.input_ids, run)
        skippable = batch.context_mask | batch.response_mask if run.skippable is None else run.skippable
        for index, block in enumerate(blocks):
            before, after = (run.residuals[at][skippable] for at in (index, index + 1))
            square, product = _moments(block, before, after)
            squares[index] += square
            products[index] += product
    return list(zip(squares, products, strict=True))


def _moments(block: RoutedBlock, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of x' x and of x' y over tokens whose residual `block` takes from `before` to `after`."""
    with torch.autocast(before.device.type, enabled=False):
        x, hidden = block.normed(before).float(), before.float()
        weighted = (x / (hidden.square().mean(dim=1, keepdim=True) + EPSILON)).T
        return (weighted @ x).double(), (weighted @ (after.float() - hidden)).double()


@torch.no_grad()
def fit_along(routed: RoutedModel, batches: Sequence[Batch], routes: Tensor, progress: Callable[[str], None]) -> None:
    """Fit the bypasses of closed blocks again, first to last, on what reaches them along the routes.

    Each is fitted towards the residual that leaves its block while all run, and so makes good what those before it
    and the blocks between them, fed with what these gave, got wrong.

    Args:
        routed: the model. It is left in eval mode.
        batches: training steps of the kinds that close blocks.
        routes: the route of each kind, (kinds, blocks) bool.
        progress: called with a line of text.
    """
    routed.eval()
    closed = [index for index in range(len(routed.blocks) - 1) if not routes[:, index].all()]
    if batches and closed:
        progress(f"fitting {len(closed)} bypasses along the route")
    walks = [_Walk(routed, batch, routes) for batch in batches]
    for index in closed if walks else ():
        block = routed.blocks[index]
        sums = [_moments(block, *walk.to(index)) for walk in walks]
        if block.bypass is not None:
            _set(block.bypass, *(torch.stack(each).sum(dim=0) for each in zip(*sums, strict=True)))


class _Walk:
    """A batch on its way along the routes, and on the way of open gates beside it."""

    def __init__(self, routed: RoutedModel, batch: Batch, routes: Tensor) -> None:
        self._routed, self._batch, self._gates = routed, batch, routes[batch.kinds]
        self._open = torch.ones_like(self._gates)
        run = self._run(self._open, until=0)
        self._tokens = batch.context_mask | batch.response_mask if run.skippable is None else run.skippable
        self._along = self._beside = 0, run.residuals[0]

    def to(self, index: int) -> tuple[Tensor, Tensor]:
        """Go on to block `index`; of the tokens that skip it return what enters it, and what should leave it."""
        self._along = index, self._run(self._gates, entry=self._along, until=index).residuals[index]
        self._beside = index + 1, self._run(self._open, entry=self._beside, until=index + 1).residuals[index + 1]
        skip = self._tokens & ~self._gates[:, index, None]
        return self._along[1][skip], self._beside[1][skip]

    def _run(self, gates: Tensor, **span: Any) -> RoutePass:
        batch = self._batch
        run = self._routed.begin(batch.context_mask, batch.response_mask, forced=gates, keep_residuals=True, **span)
        self._routed.residuals(batch.input_ids, run)
        return run


def _set(bypass: Bypass, square: Tensor, product: Tensor) -> None:
    """Set `bypass` to the map of its rank with the least squared error, given sums of x' x and of x' y.

    With W the full least-squares map and V the leading eigenvectors of W' x' x W, that map is W V V'. Each of its
    directions is split so that its two halves are equally long and learn equally fast.
    """
    ridge = RIDGE * square.diagonal().mean()
    full = torch.linalg.solve(
        square + ridge * torch.eye(len(square), dtype=square.dtype, device=square.device), product
    )
    directions = torch.linalg.eigh(full.T @ square @ full).eigenvectors[:, -len(bypass.down.weight) :]
    down = full @ directions
    share = down.norm(dim=0).clamp_min(EPSILON).sqrt()
    bypass.down.weight.copy_((down / share).T)
    bypass.up.weight.copy_(directions * share)


@torch.no_grad()
def drop_bypasses(routed: RoutedModel, kept: Sequence[int]) -> None:
    """Let the residual pass untouched at every block but those `kept`, as at birth."""
    for index, block in enumerate(routed.blocks):
        if block.bypass is not None and index not in kept:
            block.bypass.up.weight.zero_()
