"""What benchmark harnesses ask of a language model, answered under the routes that routers decide.

A context of a single token (an empty prompt's prefix) gives routers nothing to judge, so every gate is open then; under
scope `continuation`, where they read what follows, a text of one token leaves nothing to skip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerroute.config import RouterConfig
from layerroute.data.batches import by_length, collate
from layerroute.data.rendering import response_text, stop_ids
from layerroute.data.steps import Step
from layerroute.errors import LayerRouteError
from layerroute.inference.engine import Engine
from layerroute.inference.requests import Request, Row
from layerroute.inference.sampling import Sampling
from layerroute.models.attaching import RoutedModel, stacked
from layerroute.models.families import Head
from layerroute.models.nll import CHUNK, head_logits

Ids = Sequence[int]
ALONE = 1  # tokens that decide nothing


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is, in nats, whether greedy decoding would say it, and what the step skipped."""

    logprob: float
    greedy: bool
    skip_rate: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """How one text is to be generated: it ends before the first of `until`."""

    prompt_ids: Ids
    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Said:
    """A generated text and what its step skipped."""

    text: str
    tokens: int
    skip_rate: float


@torch.inference_mode()
def likelihoods(
    routed: RoutedModel,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    max_length: int,
    batch_tokens: int = 4096,
    opened: bool = False,
) -> list[Likelihood]:
    """Score (context, continuation) pairs, each under its own route. Effect: `routed` is in eval mode.

    Args:
        routed: the model.
        pairs: token ids; a pair longer than `max_length` loses the beginning of its context.
        max_length: most tokens of a pair.
        batch_tokens: tokens of a batch, pads counted.
        opened: run every block.

    Raises:
        LayerRouteError: an empty context, or a continuation that leaves no room for one.
    """
    routed.eval()
    steps = [_step(context, continuation, max_length) for context, continuation in pairs]
    found: dict[int, Likelihood] = {}
    for rows in by_length(steps, batch_tokens):
        for alone in (True, False):
            group = [i for i in rows if (opened or _decides_nothing(steps[i], routed.config.router)) == alone]
            if group:
                found |= zip(group, _score(routed, [steps[i] for i in group], opened=alone), strict=True)
    return [found[index] for index in range(len(pairs))]


def windows(ids: Ids, prefix_id: int, max_length: int) -> list[tuple[Ids, Ids]]:
    """Cut a long text into (context, continuation) pairs that score each token once.

    The first window follows the prefix alone; each later one follows half a window of what comes before it, which
    decides its route where routers read the context.
    """
    if max_length < 4:
        raise LayerRouteError(f"max_length: {max_length} is too short to roll over a text; give at least 4.")
    first = max_length - 1
    pairs: list[tuple[Ids, Ids]] = [([prefix_id], ids[:first])] if ids else []
    half = max_length // 2
    for start in range(first, len(ids), max_length - half):
        pairs.append((ids[start - half : start], ids[start : start + max_length - half]))
    return pairs


def generate_until(engine: Engine, wanted: Sequence[Wanted], tokenizer: Any, *, opened: bool = False) -> list[Said]:
    """Generate all texts, batched by the engine; a row ends as soon as it has said one of its stop strings."""
    ends, blocks = stop_ids(tokenizer), engine.weights.shape.blocks
    rows: list[Row] = []
    try:
        for want in wanted:
            free = opened or (engine.scheduler.gates.config.reads_context and len(want.prompt_ids) == ALONE)
            request = Request(
                prompt_ids=want.prompt_ids,
                max_new_tokens=want.max_new_tokens,
                stop_ids=ends,
                sampling=want.sampling,
                route=(True,) * blocks if free else None,
            )
            rows.append(engine.scheduler.submit(request))
        places = {id(row): want for row, want in zip(rows, wanted, strict=True)}
        while any(row.finish_reason is None for row in rows):
            for row in engine.scheduler.step():
                if row.finish_reason is None and _has_stopped(row, places[id(row)], tokenizer):
                    engine.scheduler.cancel(row)
    except BaseException:
        for row in rows:
            engine.scheduler.cancel(row)
        raise
    return [_said(row, want, tokenizer) for row, want in zip(rows, wanted, strict=True)]


def cut(text: str, until: Sequence[str]) -> str:
    """Return `text` up to the first of the stop strings in it."""
    places = [text.find(stop) for stop in until if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _step(context: Ids, continuation: Ids, max_length: int) -> Step:
    room = max_length - len(continuation)
    if not context or room < 1:
        raise LayerRouteError(
            f"a continuation of {len(continuation)} tokens after {len(context)} of context does not fit "
            f"max_length {max_length}; give a context, and a larger max_length."
        )
    seen = list(context)[-room:]
    return Step((*seen, *continuation), len(seen), "planning", "", "", False)


def _decides_nothing(step: Step, config: RouterConfig) -> bool:
    return (step.context_length if config.reads_context else step.response_length) <= ALONE


def _score(routed: RoutedModel, steps: Sequence[Step], *, opened: bool) -> list[Likelihood]:
    batch = collate(steps).to(routed.device)
    open_gates = torch.ones(1, len(routed.blocks), dtype=torch.bool, device=routed.device) if opened else None
    route_pass = routed.begin(batch.context_mask, batch.response_mask, forced=open_gates)
    with routed.precision():
        hidden = routed.residuals(batch.input_ids, route_pass)
    row, column = batch.response_mask[:, 1:].nonzero(as_tuple=True)  # the token before predicts the response token
    logprob, greedy = _token_scores(hidden[row, column], batch.input_ids[row, column + 1], Head.of(routed.base))
    total = torch.zeros(len(steps), dtype=torch.float64, device=row.device).index_add(0, row, logprob.double())
    missed = torch.zeros(len(steps), dtype=torch.int64, device=row.device).index_add(0, row, (~greedy).long())
    skipped = 1.0 - stacked(route_pass)[0].double().mean(dim=1)
    columns = total.tolist(), (missed == 0).tolist(), skipped.expand(len(steps)).tolist()
    return [Likelihood(*each) for each in zip(*columns, strict=True)]


def _token_scores(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return log p(target) (tokens,) float32 and whether it is the likeliest (tokens,) bool, chunk by chunk."""
    logprob, greedy = torch.zeros(len(targets), device=hidden.device), torch.zeros_like(targets, dtype=torch.bool)
    for start in range(0, len(targets), CHUNK):
        piece = slice(start, start + CHUNK)
        logits, target = head_logits(hidden[piece], head), targets[piece]
        logprob[piece] = logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        greedy[piece] = logits.argmax(dim=1) == target
    return logprob, greedy


def _has_stopped(row: Row, want: Wanted, tokenizer: Any) -> bool:
    if not want.until:
        return False
    tail = row.token_ids[-(max(len(stop.encode()) for stop in want.until) + 4) :]  # a token is at least a byte
    text = tokenizer.decode(tail, skip_special_tokens=False)
    return any(stop and stop in text for stop in want.until)


def _said(row: Row, want: Wanted, tokenizer: Any) -> Said:
    result = row.result()
    text = cut(response_text(result.token_ids, tokenizer), want.until)
    return Said(text, len(result.token_ids), result.skip_rate)
