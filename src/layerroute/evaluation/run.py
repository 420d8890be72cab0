"""From an adapter on disk to its evaluation on disk."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerroute.data.conversation import Conversation
from layerroute.data.sources import Bad, content_hash, load_sources
from layerroute.data.steps import CutReport, Step, cut_steps
from layerroute.errors import ConfigError
from layerroute.evaluation.evaluate import evaluate
from layerroute.evaluation.options import EvaluationConfig
from layerroute.evaluation.report import write_report
from layerroute.evaluation.tasks import run_tasks
from layerroute.files import check_writable, expanded, write_json
from layerroute.machine import default_device, dtype_for
from layerroute.models.adapter import load_adapter, read_manifest, save_measured
from layerroute.models.finding import is_adapter
from layerroute.models.loading import load_backbone


def evaluate_adapter(
    adapter: str | Path,
    options: EvaluationConfig,
    *,
    model: str | None = None,
    report: Path | None = None,
    save: bool = False,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate an adapter and return the document.

    Args:
        adapter: a folder, the name of an adapter that comes with the package, or `hf:owner/name`.
        options: what to measure it on, and how closely.
        model: a backbone to use instead of the one the adapter names.
        report: write the HTML report here and the same document as JSON beside it.
        save: write the document into the adapter's manifest and card.
        folder: where the backbone's own scores are kept for the next adapter, if they are to be.
        say: called with lines of progress.

    Raises:
        LayerRouteError: a damaged adapter, a wrong backbone, bad data, or a report named .json.
    """
    if report is not None and report.suffix == ".json":
        raise ConfigError(f"--report: {report} is where the same figures as JSON go. Give a name that ends in .html.")
    if report is not None and report.is_dir():
        raise ConfigError(f"--report: {report} is a folder. Give the name of a file, as {report / 'report.html'}.")
    if save and is_adapter(adapter) and not os.access(expanded(adapter), os.W_OK):
        raise ConfigError(
            f"--save: {adapter} is not yours to write to. Evaluate a copy of its folder, or leave it out."
        )
    read_manifest(adapter)  # an adapter that is none is said first
    started, device = time.perf_counter(), default_device()
    # First, so that the engine's copy of the weights is gone before the routed model comes.
    answered: dict[str, Any] = {"tasks": {}, "seconds_per_token": {}, "seconds_per_loop": {}}
    conversations, bad = conversations_of(options, options.split, say)
    training = conversations_of(options, "train", say)[0] if "two_masks_classifier" in options.controls else []
    if report is not None:
        check_writable(report)  # not after hours of work
    if options.tasks:
        answered = run_tasks(adapter, conversations, options, model=model, device=device, say=say)
    dtype = dtype_for(device) if options.dtype == "auto" else options.dtype
    backbone = load_backbone(model, dtype=dtype, device=device) if model else None
    routed, backbone = load_adapter(adapter, backbone, dtype=dtype, device=device)
    steps, cut = steps_of(conversations, options, backbone.tokenizer, options.split, say)
    calibration = steps_of(training, options, backbone.tokenizer, "train", say)[0] if training else []
    document = evaluate(
        routed, backbone, steps, options, say, adapter=str(adapter), calibration=calibration, folder=folder
    )
    document["data"] |= {"files": [Path(f).name for f in options.data], "content_hash": content_hash(conversations)}
    document["data"] |= {"bad_rows": len(bad), "too_long": cut.too_long, "unrendered": cut.unrendered}
    document |= {"dtype": dtype, "seconds": time.perf_counter() - started, **answered}
    if report is not None:
        write_json(report.with_suffix(".json"), document)
        write_report(report, document)
        say(f"report written to {report}")
    if save:
        save_measured(expanded(adapter), document)
    return document


def steps_of(
    conversations: Sequence[Conversation],
    options: EvaluationConfig,
    tokenizer: Any,
    split: str,
    say: Callable[[str], None],
) -> tuple[list[Step], CutReport]:
    """Return the steps of `conversations`, and what was left out."""
    steps, cut = cut_steps(conversations, tokenizer, max_length=options.max_length)
    say(f"{split}: {len(steps)} steps, {cut.left_out(options.max_length)}")
    return steps, cut


def conversations_of(
    options: EvaluationConfig, split: str, say: Callable[[str], None]
) -> tuple[list[Conversation], list[Bad]]:
    """Return the conversations of `split` from every source, and the bad rows that were left out."""
    return load_sources(options.data, split=split, limit=options.limit, skip_bad=options.skip_bad, say=say)
