"""Controls at equal budget: what simpler ways of skipping as many blocks do to the same steps.

Each takes the skip rates that the routers reached on these very steps, so that only the choice of blocks differs.
The same LoRA trained with every gate open, and the `paper` preset, are training runs of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerroute.config import KINDS
from layerroute.data.batches import by_length, collate
from layerroute.data.steps import Step
from layerroute.errors import ConfigError
from layerroute.evaluation.metrics import mean, perplexity
from layerroute.evaluation.options import Control, EvaluationConfig
from layerroute.evaluation.scoring import Progress, Scores, draw_by_kind, score_gates
from layerroute.models.attaching import RoutedModel
from layerroute.routing.route import Route
from layerroute.training.logistic import fit_logistic

DRAWS = 3  # random routes of each step


def run_controls(
    routed: RoutedModel,
    steps: Sequence[Step],
    own: Scores,
    opened: Scores,
    options: EvaluationConfig,
    *,
    calibration: Sequence[Step] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return {control: {skip_rate: {kind}, perplexity: {kind}}} for the controls that `options` asks for.

    Args:
        routed: the model.
        steps: what is measured.
        own: their scores under the routers.
        opened: their scores with every gate open.
        options: which controls, and how large the batches.
        calibration: training steps, for `two_masks_classifier`.
        progress: called with a line of text now and then.

    Raises:
        ConfigError: `two_masks_classifier` without calibration steps of both kinds.
    """
    kinds = kind_index(steps)

    def forced(gates: Tensor) -> Scores:
        return score_gates(routed, steps, gates, [own, opened], batch_tokens=options.batch_tokens)

    def classified() -> list[Scores]:
        sample = [calibration[index] for index in draw_by_kind(calibration, options.calibration, options.seed)]
        masks = kind_masks(own.gates, kinds)
        scores = planning_scores(routed, steps, sample, first_closed(masks), options.batch_tokens)
        return [forced(masks[guessed_kinds(scores, taken_for_calls(own.gates, masks))])]

    ways: dict[Control, Callable[[], list[Scores]]] = {
        "open": lambda: [opened],
        "random": lambda: [forced(gates) for gates in random_routes(own.gates, routed, options.seed)],
        "one_mask": lambda: [forced(usual_mask(own.gates).expand_as(own.gates))],
        "two_masks": lambda: [forced(kind_masks(own.gates, kinds)[kinds])],
        "two_masks_classifier": classified,
    }
    found: dict[str, Any] = {}
    for name in options.controls:
        if progress:
            progress(f"control: {name}")
        found[name] = _summary(ways[name](), kinds)
    return found


def kind_index(steps: Sequence[Step]) -> Tensor:
    """Return the index into KINDS of each step, (steps,) int64."""
    return torch.tensor([KINDS.index(step.kind) for step in steps], dtype=torch.int64)


def usual_mask(gates: Tensor) -> Tensor:
    """Return one route (blocks,) bool at the mean rate of `gates` (steps, blocks): it closes those most often closed.

    Ties close the earlier block.
    """
    closed = (~gates).sum(dim=0)
    wanted = round(float(closed.sum()) / max(len(gates), 1))
    mask = torch.ones(gates.shape[1], dtype=torch.bool)
    mask[closed.argsort(descending=True, stable=True)[:wanted]] = False
    return mask


def kind_masks(gates: Tensor, kinds: Tensor) -> Tensor:
    """Return the usual mask of each kind, (kinds, blocks) bool."""
    return torch.stack([usual_mask(gates[kinds == index]) for index in range(len(KINDS))])


def random_routes(gates: Tensor, routed: RoutedModel, seed: int) -> list[Tensor]:
    """Return `DRAWS` random routes for each step, each closing as many blocks as the step's own route closes.

    Blocks that always run stay open.
    """
    random = torch.Generator().manual_seed(seed)
    wanted = (~gates).sum(dim=1, keepdim=True)
    drawn = []
    for _ in range(DRAWS):
        lot = torch.rand(gates.shape, generator=random)
        lot[:, list(routed.config.router.always_run)] = 2.0
        drawn.append(lot.argsort(dim=1).argsort(dim=1) >= wanted)
    return drawn


def first_closed(masks: Tensor) -> int:
    """Return the first block that any of `masks` (kinds, blocks) closes, or the last block.

    There a classifier knows most about a step while it can still follow either mask.
    """
    closed = (~masks).any(dim=0).nonzero()
    return int(closed[0]) if len(closed) else masks.shape[1] - 1


def taken_for_calls(gates: Tensor, masks: Tensor) -> int:
    """Return how many steps have gates (steps, blocks) nearer to the mask of tool calls than to that of planning."""
    away = (gates[:, None] != masks[None]).sum(dim=2)
    return int((away[:, KINDS.index("tool_call")] < away[:, KINDS.index("planning")]).sum())


def guessed_kinds(scores: Tensor, calls: int) -> Tensor:
    """Return the index into KINDS of each step, (steps,): the `calls` steps least like planning are the tool calls.

    With as many as the routers took for calls, the guess leans as they do, and only what it knows tells them apart.
    """
    kinds = torch.full((len(scores),), KINDS.index("planning"))
    kinds[scores.argsort(stable=True)[:calls]] = KINDS.index("tool_call")
    return kinds


def planning_scores(
    routed: RoutedModel,
    steps: Sequence[Step],
    calibration: Sequence[Step],
    block: int,
    batch_tokens: int,
) -> Tensor:
    """Return how much each step is like planning, (steps,), by logistic regression on what `block`'s router reads.

    Raises:
        ConfigError: `calibration` lacks one of the kinds.
    """
    truth = kind_index(calibration)
    if len(set(truth.tolist())) < len(KINDS):
        raise ConfigError("controls: 'two_masks_classifier' needs training steps of both kinds to be fitted on.")
    known = router_inputs(routed, calibration, block, batch_tokens)
    shift, scale = known.mean(dim=0), 1.0 / (known.std(dim=0) + 1e-6)
    is_planning = torch.where(truth == KINDS.index("planning"), 1.0, -1.0)
    fit = fit_logistic((known - shift) * scale, is_planning)
    asked = (router_inputs(routed, steps, block, batch_tokens) - shift) * scale
    return asked @ fit.weight + fit.bias


@torch.inference_mode()
def router_inputs(routed: RoutedModel, steps: Sequence[Step], block: int, batch_tokens: int) -> Tensor:
    """Return the pooled router input of `block` with all earlier blocks run, (steps, dim) float32 on the CPU."""
    everything = Route.open(len(routed.blocks))
    found: list[tuple[list[int], Tensor]] = []
    routed.eval()
    for rows in by_length(steps, batch_tokens):
        batch = collate([steps[i] for i in rows]).to(routed.device)
        route_pass = routed.begin(
            batch.context_mask, batch.response_mask, forced=everything, score=True, keep_pooled=True, until=block + 1
        )
        routed.residuals(batch.input_ids, route_pass)
        found.append((rows, route_pass.pooled[block].float().cpu()))
    order = torch.tensor([index for rows, _ in found for index in rows])
    return torch.cat([pooled for _, pooled in found])[order.argsort()]


def _summary(scores: Sequence[Scores], kinds: Tensor) -> dict[str, Any]:
    nll, tokens = torch.stack([each.nll for each in scores]), torch.stack([each.tokens for each in scores])
    skipped = torch.stack([each.skipped for each in scores])
    of_kind = {kind: kinds == index for index, kind in enumerate(KINDS)}
    return {
        "skip_rate": {kind: mean(skipped[:, mask]) for kind, mask in of_kind.items()},
        "perplexity": {kind: perplexity(nll[:, mask], tokens[:, mask]) for kind, mask in of_kind.items()},
    }
