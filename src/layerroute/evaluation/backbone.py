"""The untouched backbone's scores, kept where many adapters are judged on the same steps."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from layerroute.data.steps import Step
from layerroute.errors import LayerRouteError
from layerroute.evaluation.scoring import Progress, Scores, score
from layerroute.files import replacing
from layerroute.machine import describe_machine
from layerroute.models.attaching import RoutedModel
from layerroute.models.loading import Backbone


def score_backbone(
    routed: RoutedModel,
    backbone: Backbone,
    steps: Sequence[Step],
    *,
    batch_tokens: int,
    folder: Path | None,
    progress: Progress | None = None,
) -> Scores:
    """Score every step with LoRA off and every gate open.

    Args:
        routed: the model.
        backbone: what it was attached to.
        steps: what to score.
        batch_tokens: tokens of a batch, pads counted.
        folder: where scores of the same backbone, steps, batches, precision and machine are kept, if they are to be.
        progress: called with a line of text about ten times.

    Raises:
        LayerRouteError: a file that was kept is damaged, or can't be written.
    """
    if folder is None:
        return score(routed, steps, mode="base", batch_tokens=batch_tokens, progress=progress)
    machine = describe_machine()
    told = [backbone.fingerprint, str(next(routed.base.parameters()).dtype), routed.device.type, batch_tokens]
    told += [*(machine[key] for key in ("processor", "gpu", "torch"))]
    told += [[(step.input_ids, step.context_length) for step in steps]]
    path = folder / f"backbone-{sha256(json.dumps(told).encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            kept = load_file(path)
        except SafetensorError as error:
            raise LayerRouteError(f"{path}: damaged ({error}). Remove it, and it is measured again.") from error
        opened = torch.ones(len(steps), len(routed.blocks), dtype=torch.bool)
        return Scores(kept["nll"], kept["tokens"], opened, torch.zeros(len(steps), 0))
    scores = score(routed, steps, mode="base", batch_tokens=batch_tokens, progress=progress)
    with replacing(path) as temporary:
        save_file({"nll": scores.nll, "tokens": scores.tokens}, temporary)
    return scores
