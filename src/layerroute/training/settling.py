"""Settle the first routes: which blocks each kind can spare, and routers that say so from the context.

Undecided gates make LoRA face many routes and cost several times what one settled route costs, so the
routes are decided at once, from measurements, and training then heals the blocks that are left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerroute.config import KINDS, BudgetConfig, Kind
from layerroute.data.batches import Batch
from layerroute.models.attaching import RoutedModel
from layerroute.training.options import SettleConfig

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settled:
    """The blocks that one kind closes."""

    closed: tuple[int, ...]
    added: float  # response loss that closing them added, nats per token, before healing


def settle(
    routed: RoutedModel,
    importance: Mapping[Kind, Sequence[Batch]],
    budget: BudgetConfig,
    config: SettleConfig,
    progress: Progress = lambda _: None,
) -> dict[Kind, Settled]:
    """Choose the blocks that each kind closes. The model is left in eval mode.

    Args:
        routed: the model, LoRA warmed up with every gate open.
        importance: per kind, batches whose response loss is measured.
        budget: how much each kind shall skip.
        config: how.
        progress: called with a line of text now and then.
    """
    routed.eval()
    found: dict[Kind, Settled] = {}
    for kind in KINDS:
        closed, added = spare_blocks(routed, importance[kind], budget.target(kind), config.rounds, progress)
        found[kind] = Settled(closed, added)
        progress(f"{kind} closes blocks {list(closed)}: +{added:.3f} nats before healing")
    return found


def routes_of(settled: Mapping[Kind, Settled], count: int) -> Tensor:
    """Return the settled routes as a table (kinds, blocks) bool: True runs."""
    table = torch.ones(len(KINDS), count, dtype=torch.bool)
    for index, kind in enumerate(KINDS):
        table[index, list(settled[kind].closed)] = False
    return table


@torch.no_grad()
def spare_blocks(
    routed: RoutedModel, batches: Sequence[Batch], target: float, rounds: int, progress: Progress = lambda _: None
) -> tuple[tuple[int, ...], float]:
    """Return the blocks to close so that `target` of them are, and the loss that closing them adds.

    Greedy: each round closes the blocks whose single absence adds least, neighbours of a block just closed
    left for the next round, because two neighbours together cost more than their sum says.
    """
    count = len(routed.blocks)
    wanted = round(target * count)
    if not wanted:
        return (), 0.0
    closed: set[int] = set()
    start = float("nan")
    for left in range(min(rounds, wanted), 0, -1):
        candidates = [b for b in range(count) if b not in closed and b not in routed.config.router.always_run]
        progress(f"measuring {len(candidates)} blocks, {len(closed)} of {wanted} closed")
        base, cost = absence(routed, batches, closed, candidates)
        start = base if not closed else start
        take = -(-(wanted - len(closed)) // left)
        chosen: list[int] = []
        for block in sorted(cost, key=lambda b: (cost[b], b)):
            if len(chosen) < take and (left == 1 or not {block - 1, block + 1} & set(chosen)):
                chosen.append(block)
        closed |= set(chosen)
    return tuple(sorted(closed)), absence(routed, batches, closed, [])[0] - start


@torch.no_grad()
def absence(
    routed: RoutedModel, batches: Sequence[Batch], closed: set[int], candidates: Sequence[int]
) -> tuple[float, dict[int, float]]:
    """Return the mean response loss with `closed` blocks skipped, and with each candidate skipped besides.

    What precedes the candidate is the same as before, so its pass starts right there.
    """
    gates = torch.ones(1, len(routed.blocks), dtype=torch.bool, device=routed.device)
    gates[:, sorted(closed)] = False
    nll, tokens = 0.0, 0
    without = dict.fromkeys(candidates, 0.0)
    for batch in batches:
        ids, mask = batch.input_ids, batch.response_mask
        whole = routed.begin(batch.context_mask, mask, forced=gates, keep_residuals=True)
        out = routed.run(ids, mask, whole)
        nll, tokens = nll + float(out.nll.sum()), tokens + int(out.tokens.sum())
        for block in candidates:
            fewer = gates.clone()
            fewer[:, block] = False
            entry = (block, whole.residuals[block])
            branch = routed.begin(batch.context_mask, mask, forced=fewer, entry=entry)
            without[block] += float(routed.run(ids, mask, branch).nll.sum())
    return nll / tokens, {block: total / tokens for block, total in without.items()}


@torch.no_grad()
def fit_routers(routed: RoutedModel, pooled: Tensor, kinds: Tensor, routes: Tensor, config: SettleConfig) -> float:
    """Standardise every router's input and fit it to its block's gates by ridge regression.

    Args:
        routed: the model whose routers are fitted.
        pooled: pooled contexts under these very routes, (steps, blocks, dim) float32.
        kinds: index into KINDS of each step, (steps,).
        routes: the route of each kind, (kinds, blocks) bool.
        config: how.

    Returns:
        The share of fitted gates that match their kind's, over the blocks in which the kinds differ.
    """
    runs = routes[kinds]
    with torch.autocast(pooled.device.type, enabled=False):
        matches = [
            fit_router(routed, block, pooled[:, block], runs[:, block], config) for block in range(runs.shape[1])
        ]
    differing = [match for match, of_block in zip(matches, routes.T, strict=True) if len(of_block.unique()) > 1]
    return sum(differing) / len(differing) if differing else 1.0


def fit_router(routed: RoutedModel, block: int, pooled: Tensor, runs: Tensor, config: SettleConfig) -> float:
    """Fit one router to `runs` (steps,) bool from `pooled` (steps, dim); return the share it gets right."""
    router = routed.routers[block]
    mean, deviation = pooled.mean(dim=0), pooled.std(dim=0)
    # One scale for all dimensions' average length: |x| = sqrt(dim) would make a step of the weights move every
    # dimension of the score at once, so the standardised input is shortened to length ~1.
    router.shift.copy_(mean)
    router.scale.copy_(1.0 / ((deviation + 1e-3 * deviation.mean() + 1e-6) * pooled.shape[1] ** 0.5))
    if bool(runs.all()) or not bool(runs.any()):
        router.reset(bias=config.margin if bool(runs.all()) else -config.margin)
        return 1.0
    x = (pooled - router.shift) * router.scale
    weight, bias = ridge(x, torch.where(runs, 1.0, -1.0), config.ridge)
    router.score.weight.copy_(config.margin * weight[None])
    router.score.bias.fill_(config.margin * float(bias))
    return float(((router(pooled) > 0) == runs).float().mean())


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weight (dim,) and bias () of the class-balanced ridge regression of `y` (steps,) = +1 / -1 on `x`."""
    share = torch.where(y > 0, (y > 0).float().mean(), (y < 0).float().mean())
    weight = 0.5 / share / len(y)  # each class weighs one half
    centre = weight @ x
    level = weight @ y
    root = weight.sqrt()[:, None]
    a, b = (x - centre) * root, (y - level) * root[:, 0]
    strength = penalty * a.square().sum() / len(y)
    # The dual form: steps are fewer than dimensions.
    dual = torch.linalg.solve(a @ a.T + strength * torch.eye(len(y), device=x.device), b)
    solution = a.T @ dual
    return solution, level - solution @ centre
