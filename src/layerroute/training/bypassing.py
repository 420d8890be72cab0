"""Fit the bypasses: the best linear stand-in for each block, before any is chosen, and for those chosen, together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerroute.data.batches import Batch
from layerroute.models.attaching import RoutedModel
from layerroute.routing.bypass import Bypass
from layerroute.routing.routed import RoutedBlock
from layerroute.routing.router import read_and_skipped
from layerroute.training.settling import through

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
        skippable = _skippable(routed, batch)
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
    if not closed:
        return
    progress(f"fitting {len(closed)} bypasses along the route")
    along = beside = [through(routed, batch, None, None) for batch in batches]
    for index, block in enumerate(routed.blocks[: closed[-1] + 1]):
        gates = [routes[batch.kinds, index] for batch in batches]
        beside = [through(routed, b, (index, h), None) for b, h in zip(batches, beside, strict=True)]
        if index in closed and block.bypass is not None:
            sums = []
            for batch, gate, before, after in zip(batches, gates, along, beside, strict=True):
                skipped = _skippable(routed, batch) & ~gate[:, None]
                sums.append(_moments(block, before[skipped], after[skipped]))
            _set(block.bypass, *(torch.stack(each).sum(dim=0) for each in zip(*sums, strict=True)))
        along = [through(routed, b, (index, h), gate) for b, h, gate in zip(batches, along, gates, strict=True)]


def _skippable(routed: RoutedModel, batch: Batch) -> Tensor:
    """Return which tokens of `batch` a closed gate skips, (batch, seq) bool."""
    _, skipped = read_and_skipped(batch.context_mask, batch.response_mask, routed.config.router.scope)
    return batch.context_mask | batch.response_mask if skipped is None else skipped


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
