"""Score steps: run the routed model over them and keep what each step cost and which blocks it ran."""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerroute.config import BATCH_TOKENS, KINDS
from layerroute.data.batches import by_length, collate
from layerroute.data.steps import Step
from layerroute.models.attaching import RoutedModel
from layerroute.routing.route import Route

Mode = Literal["base", "open", "routed", "forced"]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scores:
    """What was measured on each step, in the order of the steps; on the CPU."""

    nll: Tensor  # (steps,) float64: summed negative log-likelihood of the response, nats; nothing else is in it
    tokens: Tensor  # (steps,) int64: response tokens
    gates: Tensor  # (steps, blocks) bool: True ran, False was skipped
    logits: Tensor  # (steps, blocks) float32: run logits, offset included; no columns where gates were given

    @property
    def skipped(self) -> Tensor:
        """Share of blocks that each step skipped, (steps,) float64."""
        return 1.0 - self.gates.double().mean(dim=1)

    def at(self, chosen: Sequence[int]) -> "Scores":
        """Return the scores of the steps at the indices `chosen`."""
        rows = list(chosen)
        return Scores(self.nll[rows], self.tokens[rows], self.gates[rows], self.logits[rows])


@torch.inference_mode()
def score(
    routed: RoutedModel,
    steps: Sequence[Step],
    *,
    mode: Mode,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    offset: float = 0.0,
    gates: Tensor | None = None,
) -> Scores:
    """Score the response of every step, each under its own route. The model is left in eval mode.

    Args:
        routed: the model.
        steps: what to score.
        mode: `base`: LoRA off, every gate open; `open`: every gate open; `routed`: the routers decide;
            `forced`: `gates` decide.
        batch_tokens: tokens of a batch, pads counted.
        progress: called with a line of text about ten times.
        offset: added to every run logit (`routed`).
        gates: (steps, blocks) bool (`forced`).
    """
    if (gates is not None) != (mode == "forced"):
        raise ValueError("give gates with mode 'forced', and only then")
    routed.eval()
    count = len(routed.blocks)
    nll = torch.zeros(len(steps), dtype=torch.float64)
    tokens = torch.zeros(len(steps), dtype=torch.int64)
    ran = torch.zeros(len(steps), count, dtype=torch.bool)
    logits = torch.zeros(len(steps), count if mode == "routed" else 0)
    done = 0
    with routed.without_lora() if mode == "base" else nullcontext():
        for rows in by_length(steps, batch_tokens):
            batch = collate([steps[i] for i in rows]).to(routed.device)
            how = _decision(mode, count, offset, None if gates is None else gates[rows].to(routed.device))
            with routed.precision():
                out = routed(batch.input_ids, batch.context_mask, batch.response_mask, **how)
            nll[rows], tokens[rows] = out.nll.double().cpu(), out.tokens.cpu()
            ran[rows], logits[rows] = out.gates.cpu(), out.logits.float().cpu()
            if progress and (done + len(rows)) * 10 // len(steps) > done * 10 // len(steps):
                progress(f"{mode}: {done + len(rows)} of {len(steps)} steps")
            done += len(rows)
    return Scores(nll, tokens, ran, logits)


def score_gates(
    routed: RoutedModel,
    steps: Sequence[Step],
    gates: Tensor,
    known: Sequence[Scores],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Scores:
    """Score every step under its row of `gates` (steps, blocks) bool.

    A step that one of `known` ran under the same gates is not run again.

    Args:
        routed: the model.
        steps: what to score.
        gates: the route of each step.
        known: scores of the same steps with LoRA on.
        batch_tokens: tokens of a batch, pads counted.
        progress: called with a line of text about ten times.
    """
    nll, tokens = known[0].nll.clone(), known[0].tokens
    unknown = torch.ones(len(steps), dtype=torch.bool)
    for scores in known:
        same = (scores.gates == gates).all(dim=1)
        nll[same], unknown[same] = scores.nll[same], False
    rest = unknown.nonzero().flatten().tolist()
    given: dict[str, Any] = {"mode": "open"} if bool(gates.all()) else {"mode": "forced", "gates": gates[rest]}
    again = score(routed, [steps[i] for i in rest], batch_tokens=batch_tokens, progress=progress, **given)
    nll[rest] = again.nll
    return Scores(nll, tokens, gates, known[0].logits[:, :0])


def draw_by_kind(steps: Sequence[Step], count: int, seed: int) -> list[int]:
    """Return indices of up to `count` steps of each kind, drawn by `seed`, ascending."""
    chosen: list[int] = []
    for kind in KINDS:
        pool = [index for index, step in enumerate(steps) if step.kind == kind]
        chosen += random.Random(f"{seed}/{kind}").sample(pool, min(len(pool), count))
    return sorted(chosen)


def _decision(mode: Mode, count: int, offset: float, gates: Tensor | None) -> dict[str, Any]:
    if mode == "routed":
        return {"offset": offset}
    return {"forced": Route.open(count) if gates is None else gates}
