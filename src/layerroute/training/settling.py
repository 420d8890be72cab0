"""Settle the first routes: which blocks each kind can spare, and routers that say so from what they read.

Undecided gates make LoRA face many routes and cost several times what one settled route costs, so the
routes are decided at once, from measurements, and training then heals the blocks that are left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from layerroute.config import KINDS, BudgetConfig, Kind
from layerroute.data.batches import Batch
from layerroute.models.attaching import RoutedModel
from layerroute.models.prefix import SharedPrefix
from layerroute.routing.router import Pool, Router, read_and_skipped, threshold_logit
from layerroute.training.logistic import fit_logistic
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
        count = blocks_to_close(kind, budget, config, len(routed.blocks))
        closed, added = spare_blocks(routed, importance[kind], count, config, progress)
        found[kind] = Settled(closed, added)
        progress(f"{kind} closes blocks {list(closed)}: {added:+.3f} nats before healing")
    return found


def blocks_to_close(kind: Kind, budget: BudgetConfig, config: SettleConfig, count: int) -> int:
    """Return how many of `count` blocks `kind` closes.

    The budget of tool calls is to be reached by the share of them that will be recognised, as far as blocks are left
    that are not shallow; that of planning is not to be passed, and steps taken for tool calls use it too.
    """
    target = budget.target(kind) * count
    if kind == "planning":
        return int(target + 1e-9)
    deep = count - round(config.shallow * count)
    return max(round(target), min(round(target / config.recognised), deep))


def routes_of(settled: Mapping[Kind, Settled], count: int) -> Tensor:
    """Return the settled routes as a table (kinds, blocks) bool: True runs."""
    table = torch.ones(len(KINDS), count, dtype=torch.bool)
    for index, kind in enumerate(KINDS):
        table[index, list(settled[kind].closed)] = False
    return table


@torch.no_grad()
def spare_blocks(
    routed: RoutedModel,
    batches: Sequence[Batch],
    wanted: int,
    config: SettleConfig,
    progress: Progress = lambda _: None,
) -> tuple[tuple[int, ...], float]:
    """Return `wanted` blocks to close, or as many as may be, and the loss that closing them adds.

    Greedy: each round closes the blocks whose single absence adds least, neighbours of a block just closed
    left for the next round, because two neighbours together cost more than their sum says; the last round takes
    them where nothing else is left. Shallow blocks are left alone (`settle.shallow`) unless so many are wanted.
    """
    count = len(routed.blocks)
    if not wanted:
        return (), 0.0
    closed: set[int] = set()
    start = float("nan")
    allowed = [b for b in range(count) if b not in routed.config.router.always_run]
    deep = [b for b in allowed if b >= round(config.shallow * count)]
    allowed = deep if len(deep) >= wanted else allowed
    for left in range(min(config.rounds, wanted), 0, -1):
        candidates = [b for b in allowed if b not in closed]
        progress(f"measuring {len(candidates)} blocks, {len(closed)} of {wanted} closed")
        base, cost = absence(routed, batches, closed, candidates)
        start = base if not closed else start
        take = -(-(wanted - len(closed)) // left)
        chosen: list[int] = []
        order = sorted(cost, key=lambda b: (cost[b], b))
        for block in order:
            if len(chosen) < take and not {block - 1, block + 1} & set(chosen):
                chosen.append(block)
        if left == 1:
            chosen += [block for block in order if block not in chosen][: take - len(chosen)]
        closed |= set(chosen)
    return tuple(sorted(closed)), absence(routed, batches, closed, [])[0] - start


@torch.no_grad()
def absence(
    routed: RoutedModel, batches: Sequence[Batch], closed: set[int], candidates: Sequence[int]
) -> tuple[float, dict[int, float]]:
    """Return the mean response loss with `closed` blocks skipped, and with each candidate skipped besides.

    What precedes the candidate, in depth and among the tokens that no gate skips, is the same as before, so its pass
    starts right there.
    """
    gates = torch.ones(1, len(routed.blocks), dtype=torch.bool, device=routed.device)
    gates[:, sorted(closed)] = False
    nll, tokens = 0.0, 0
    without = dict.fromkeys(candidates, 0.0)
    for batch in batches:
        shared = SharedPrefix(routed, batch.input_ids, batch.context_mask, batch.response_mask)
        out, whole = shared.run(gates, keep_residuals=True)
        nll, tokens = nll + float(out.nll.sum()), tokens + int(out.tokens.sum())
        for block in tqdm(candidates, desc="measuring", unit="block", leave=False, disable=None):
            fewer = gates.clone()
            fewer[:, block] = False
            branch, _ = shared.run(fewer, entry=(block, whole.residuals[block]))
            without[block] += float(branch.nll.sum())
    return nll / tokens, {block: total / tokens for block, total in without.items()}


@torch.no_grad()
def fit_routers(
    routed: RoutedModel,
    batches: Sequence[Batch],
    routes: Tensor,
    budget: BudgetConfig,
    config: SettleConfig,
    progress: Progress = lambda _: None,
    counted: Tensor | None = None,
) -> float:
    """Fit every router, first to last, to the gates of its step's kind, by logistic regression.

    Each step goes through the blocks as the routers fitted so far send it, judged by leaving it out. Under the
    kinds' own routes a router would only recognise what an earlier one decided, and under open gates it
    would see residuals that inference never has (lab notes, 2026-11-24).

    Args:
        routed: the model whose routers are fitted.
        batches: training steps of both kinds.
        routes: the route of each kind, (kinds, blocks) bool.
        budget: how much each kind shall skip.
        config: how.
        progress: called with a line of text for each block in which the kinds differ.
        counted: the steps, in the order of `batches`, that `settle.tolerance` is a share of, (steps,) bool; else all.

    Returns:
        The share of gates that match their kind's over the blocks in which the kinds differ, left-out steps only.
    """
    reads = [read_and_skipped(b.context_mask, b.response_mask, routed.config.router.scope)[0] for b in batches]
    pools = [Pool.over(read, routed.config.router) for read in reads]
    begun = [_through_the_last(batch, read) for batch, read in zip(batches, reads, strict=True)]
    kinds = torch.cat([batch.kinds for batch in begun])
    sizes = [len(batch) for batch in begun]
    residuals = [through(routed, batch, None, None) for batch in begun]
    shares, matches = shares_to_close(routes, budget), list[float]()
    for block, router in enumerate(tqdm(routed.routers, desc="fitting", unit="router", leave=False, disable=None)):
        pooled = torch.cat([pool(residual) for pool, residual in zip(pools, residuals, strict=True)])
        runs = routes[kinds, block]
        share = float((shares * ~routes[:, block]).amax())
        level = threshold_logit(routed.config.router)
        if block in routed.config.router.always_run:
            gates = runs  # its router decides nothing, and a resumed run would not know what was fitted
        else:
            gates = fit_router(router, pooled, runs, config, share, counted, level=level)
        if not bool((runs == runs[0]).all()):
            matches.append(float((gates == runs).float().mean()))
            progress(f"router {block}: {100 * matches[-1]:.1f} % as their kind's, each step left out of its own fit")
        if block + 1 < len(routed.routers):
            residuals = [
                through(routed, batch, (block, residual), gate)
                for batch, residual, gate in zip(begun, residuals, torch.split(gates, sizes), strict=True)
            ]
    return sum(matches) / len(matches) if matches else 1.0


def _through_the_last(batch: Batch, read: Tensor) -> Batch:
    """Return `batch` without the columns after the last one that any row of `read` (batch, seq) bool has a token in."""
    width = int(read.any(dim=0).nonzero().max()) + 1
    ids, context, response = (t[:, :width] for t in (batch.input_ids, batch.context_mask, batch.response_mask))
    return Batch(ids, context, response, batch.kinds)


def through(routed: RoutedModel, batch: Batch, entry: tuple[int, Tensor] | None, gate: Tensor | None) -> Tensor:
    """Return what leaves the block of `entry` under `gate` (batch,); without an entry, what enters block 0."""
    block = -1 if entry is None else entry[0]
    forced = torch.ones(len(batch), len(routed.blocks), dtype=torch.bool, device=routed.device)
    if gate is not None:
        forced[:, block] = gate
    span = routed.begin(
        batch.context_mask, batch.response_mask, forced=forced, entry=entry, until=block + 1, keep_residuals=True
    )
    routed.residuals(batch.input_ids, span)
    return span.residuals[block + 1]


@torch.no_grad()
def keep_open(routed: RoutedModel, routes: Tensor, margin: float) -> None:
    """Let the routers of blocks that no kind closes be open whatever they see.

    Where all contexts of training end in the same tokens, router 0 sees the same every time: standardising makes a huge
    weight of the little that training moves it by, and a context that ends otherwise (plain text, half an answer)
    closed block 0, which costs all there is (lab notes, 2026-11-27).

    Args:
        routed: the model.
        routes: the route of each kind, (kinds, blocks) bool.
        margin: how far above the threshold their score is.
    """
    for block, router in enumerate(routed.routers):
        if bool(routes[:, block].all()):
            router.reset(bias=threshold_logit(routed.config.router) + margin)


def shares_to_close(routes: Tensor, budget: BudgetConfig) -> Tensor:
    """Return what share of each kind's steps has to skip the blocks that it closes to hold its budget, (kinds,)."""
    targets = torch.tensor([budget.target(kind) for kind in KINDS], device=routes.device)
    return (targets / (~routes).float().mean(dim=1).clamp(min=1e-9)).clamp(max=1.0)


def fit_router(
    router: Router,
    pooled: Tensor,
    runs: Tensor,
    config: SettleConfig,
    share: float = 1.0,
    counted: Tensor | None = None,
    *,
    level: float = 0.0,
) -> Tensor:
    """Standardise a router's input and fit it to `runs` (steps,) bool from `pooled` (steps, dim).

    `share` of the steps that shall not run are to be scored so, as far as `config.tolerance` allows; `level` is
    the logit above which a gate is open.

    Returns:
        The gate that each step would get from a router fitted without it, (steps,) bool.
    """
    mean, deviation = pooled.mean(dim=0), pooled.std(dim=0)
    # One scale for all dimensions' average length: |x| = sqrt(dim) would make a step of the weights move every
    # dimension of the score at once, so the standardised input is shortened to length ~1.
    router.shift.copy_(mean)
    router.scale.copy_(1.0 / ((deviation + 1e-3 * deviation.mean() + 1e-6) * pooled.shape[1] ** 0.5))
    if bool(runs.all()) or not bool(runs.any()):
        router.reset(bias=level + (config.margin if bool(runs.all()) else -config.margin))
        return runs
    x = (pooled - router.shift) * router.scale
    fit = fit_logistic(x, torch.where(runs, 1.0, -1.0))
    rise = lean(fit.left_out, runs, config.tolerance, share, counted)
    router.score.weight.copy_(config.margin * fit.weight[None])
    router.score.bias.fill_(level + config.margin * float(fit.bias + rise))
    return fit.left_out + rise >= 0  # 0 is where the lean puts the last step that it saves


def lean(left_out: Tensor, runs: Tensor, tolerance: float, share: float = 1.0, counted: Tensor | None = None) -> Tensor:
    """Return what to add to every score, so that as many steps as the budget asks for are scored below zero.

    Args:
        left_out: each step's score by a fit without it, (steps,).
        runs: the steps that shall run, (steps,) bool.
        tolerance: the share of them that may be scored below zero, whatever that leaves of the budget.
        share: the share of the other steps that shall be.
        counted: the steps that `tolerance` is a share of, where some of `runs` are among them, (steps,) bool.
    """
    kept = runs & counted if counted is not None and bool((runs & counted).any()) else runs
    others = left_out[~runs]
    last = others.max().clamp(min=0)[None]  # kinds that are apart are parted between them, not at the last step's edge
    enough = torch.quantile(torch.cat([others, last]), share)
    return -torch.minimum(torch.quantile(left_out[kept], tolerance), enough)
