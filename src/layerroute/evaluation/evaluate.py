"""An evaluation, top to bottom: score the steps three ways, then say what routing costs and what it saves."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerroute.config import KINDS, Kind, to_dict
from layerroute.data.steps import Step
from layerroute.errors import DataError
from layerroute.evaluation.backbone import score_backbone
from layerroute.evaluation.controls import run_controls
from layerroute.evaluation.flops import step_flops, tokens_skipped, weight_bytes_per_token
from layerroute.evaluation.metrics import (
    Bootstrap,
    Interval,
    differential,
    histogram,
    length_matched,
    mean,
    number,
    perplexity,
    relative_perplexity,
    run_rate,
)
from layerroute.evaluation.options import EvaluationConfig
from layerroute.evaluation.scoring import Mode, Progress, Scores, draw_by_kind, score, score_gates
from layerroute.machine import batch_tokens_for, describe_machine
from layerroute.models.attaching import RoutedModel
from layerroute.models.loading import Backbone

FORMAT = 1
GATE_BINS = 20


def evaluate(
    routed: RoutedModel,
    backbone: Backbone,
    steps: Sequence[Step],
    options: EvaluationConfig,
    progress: Progress | None = None,
    *,
    adapter: str | None = None,
    calibration: Sequence[Step] = (),
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure a routed model on `steps`; return one document, ready for JSON (None, never NaN).

    Args:
        routed: the model, its adapter loaded.
        backbone: what it was attached to.
        steps: held-out steps.
        options: how closely to measure.
        progress: called with a line of text now and then.
        adapter: the adapter's name, for the document.
        calibration: training steps, which the control `two_masks_classifier` is fitted on.
        folder: where the backbone's own scores are kept for the next adapter, if they are to be.

    Raises:
        DataError: there are no steps.
        ConfigError: a control needs training steps and there are none.
    """
    started = time.perf_counter()
    if not steps:
        raise DataError("nothing to evaluate: no step is left. Add data, or raise --max-length.")
    size = options.batch_tokens or batch_tokens_for(routed.device.type)
    options = replace(options, batch_tokens=size)
    base = score_backbone(routed, backbone, steps, batch_tokens=size, folder=folder, progress=progress)
    own = score(routed, steps, mode="routed", batch_tokens=size, progress=progress)
    opened = score_gates(routed, steps, torch.ones_like(own.gates), [own], batch_tokens=size, progress=progress)
    scores: dict[Mode, Scores] = {"base": base, "open": opened, "routed": own}

    kinds = torch.tensor([KINDS.index(step.kind) for step in steps])
    bootstrap = Bootstrap.over([step.conversation for step in steps], options.bootstrap, options.seed)
    offered = torch.tensor([step.tools_offered for step in steps])
    masks = {kind: _of_kind(steps, kind) for kind in KINDS}
    rows = {kind: _quality(masks[kind], scores, bootstrap) | _savings(kind, steps, own, routed) for kind in KINDS}
    controls = run_controls(routed, steps, own, opened, options, calibration=calibration, progress=progress)
    return {
        "format": FORMAT,
        "model": backbone.name,
        "adapter": adapter,
        "router": to_dict(routed.config.router),
        "data": _data(steps, options),
        "kinds": rows,
        "planning_with_tools": _quality(masks["planning"] & offered, scores, bootstrap),
        "differential": _points(differential(own.skipped, kinds, bootstrap)),
        "length_matched": _matched(steps, own, kinds, offered, bootstrap),
        "curve": curve(routed, steps, own, opened, options, progress),
        "gates": _gates(own, kinds),
        "controls": controls,
        "seconds": time.perf_counter() - started,
        "machine": _machine(),
        "options": to_dict(options),
    }


def curve(
    routed: RoutedModel,
    steps: Sequence[Step],
    own: Scores,
    opened: Scores,
    options: EvaluationConfig,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trade quality against skipping on a subset of `steps`: one point for each offset added to the run logits.

    `relative` is perplexity over that of the same steps with every gate open (`opened`), minus 1. At offset 0
    the steps are scored already (`own`).
    """
    chosen = draw_by_kind(steps, options.curve_steps // 2, options.seed)
    if not chosen:
        return []
    picked, size = [steps[index] for index in chosen], options.batch_tokens
    reference, points = opened.at(chosen), []
    for offset in options.curve_offsets:
        if offset == 0:
            moved = own.at(chosen)
        else:
            moved = score(routed, picked, mode="routed", batch_tokens=size, offset=offset)
        point: dict[str, Any] = {"offset": offset, "kinds": {}}
        for kind in KINDS:
            of_kind = _of_kind(picked, kind)
            quality = perplexity(moved.nll[of_kind], moved.tokens[of_kind])
            before = perplexity(reference.nll[of_kind], reference.tokens[of_kind])
            point["kinds"][kind] = {
                "skip_rate": mean(moved.skipped[of_kind]),
                "perplexity": quality,
                "relative": None if quality is None or before is None else quality / before - 1.0,
            }
        points.append(point)
        if progress:
            progress(f"curve: offset {offset:+g}, {len(points)} of {len(options.curve_offsets)}")
    return points


def _of_kind(steps: Sequence[Step], kind: Kind) -> Tensor:
    return torch.tensor([step.kind == kind for step in steps])


def _quality(mask: Tensor, scores: Mapping[Mode, Scores], bootstrap: Bootstrap) -> dict[str, Any]:
    """Return how many steps `mask` holds, how often they skip and how well each way of running predicts them."""
    own = scores["routed"]
    nll, reference = (torch.where(mask, each.nll, 0.0) for each in (own, scores["open"]))
    change = relative_perplexity(nll, reference, own.tokens * mask, bootstrap)
    return {
        "steps": int(mask.sum()),
        "tokens": int(own.tokens[mask].sum()),
        "skip_rate": mean(own.skipped[mask]),
        "perplexity": {mode: perplexity(each.nll[mask], each.tokens[mask]) for mode, each in scores.items()},
        "routed_vs_open": {"relative": change.value, "low": change.low, "high": change.high},
    }


def _savings(kind: Kind, steps: Sequence[Step], own: Scores, routed: RoutedModel) -> dict[str, Any]:
    """Return what routing leaves undone: shares of all FLOPs and of weight bytes per decoded token, and by block."""
    config, scope, rank = routed.base.config, routed.config.router.scope, routed.config.bypass.rank
    everything = [True] * own.gates.shape[1]
    spent = whole = read = readable = 0.0
    for index, step in enumerate(steps):
        if step.kind != kind:
            continue
        gates, size = own.gates[index].tolist(), (step.context_length, step.response_length)
        spent += step_flops(config, *size, gates, scope, rank)["total"]
        whole += step_flops(config, *size, everything, scope)["total"]
        less = tokens_skipped(0, step.response_length, scope)
        full = weight_bytes_per_token(config, everything)["total"]
        read += less * weight_bytes_per_token(config, gates, bypass=rank)["total"]
        read += (step.response_length - less) * full
        readable += step.response_length * full
    return {
        "flops_share_skipped": 1.0 - spent / whole if whole else None,
        "weight_bytes_share_skipped": 1.0 - read / readable if readable else None,
        "run_rate": run_rate(own.gates[_of_kind(steps, kind)]),
    }


def _gates(own: Scores, kinds: Tensor) -> dict[str, Any]:
    """Return, per kind, how many gates have a run probability in each of equal bins from 0 to 1."""
    chance = torch.sigmoid(own.logits.double())
    counts = {kind: histogram(chance[kinds == index], GATE_BINS) for index, kind in enumerate(KINDS)}
    return {"edges": [number(edge / GATE_BINS) for edge in range(GATE_BINS + 1)], "counts": counts}


def _points(gap: Interval) -> dict[str, float | None]:
    return {"points": gap.value, "low": gap.low, "high": gap.high}


def _machine() -> dict[str, Any]:
    machine = describe_machine()
    return {"cpu": machine["processor"]} | {key: machine[key] for key in ("gpu", "threads", "torch", "python")}


def _matched(
    steps: Sequence[Step], own: Scores, kinds: Tensor, offered: Tensor, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    lengths = torch.tensor([step.context_length for step in steps])
    found = length_matched(own.skipped, kinds, lengths, offered, bootstrap)
    if found is None:
        return None
    return _points(found.points) | {"steps": found.steps, "tools_offered": found.tools_offered}


def _data(steps: Sequence[Step], options: EvaluationConfig) -> dict[str, Any]:
    digests = sorted(json.dumps([step.input_ids, step.context_length, step.kind]) for step in steps)
    return {
        "sources": sorted({step.source for step in steps}),
        "split": options.split,
        "steps": {kind: sum(step.kind == kind for step in steps) for kind in KINDS},
        "conversations": len({step.conversation for step in steps}),
        "hash": sha256("\n".join(digests).encode()).hexdigest()[:16],
    }
