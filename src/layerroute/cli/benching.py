"""`layerroute bench`: choose the steps, time every part, print or draw."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerroute.cli.benchtable import plot, print_quick, print_tables
from layerroute.config import KINDS, BenchConfig, dtype_of, to_dict
from layerroute.data.generator import generate
from layerroute.data.rendering import stop_ids
from layerroute.data.sources import load_conversations
from layerroute.data.steps import cut_steps
from layerroute.errors import DataError
from layerroute.files import check_writable, write_text
from layerroute.inference.bench import bench, setting
from layerroute.inference.engine import Engine
from layerroute.inference.fullbench import (
    Bench,
    Example,
    time_classes,
    time_drafts,
    time_peers,
    time_rows,
    time_skip_rates,
)
from layerroute.inference.loading import load_engine
from layerroute.inference.measuring import stream_bandwidth
from layerroute.inference.peers import available
from layerroute.inference.weights import Weights
from layerroute.machine import commit, default_device, describe_machine
from layerroute.models.loading import Backbone, load_backbone

Say = Callable[[str], None]
QUICK = "smollm2"


def time_one_row(options: BenchConfig, *, as_json: bool) -> None:
    """Time one row on a built-in context and print a table or one JSON document."""
    name = options.model or QUICK
    backbone = load_backbone(name, dtype="bfloat16", device=default_device())
    steps, _ = cut_steps(generate(8), backbone.tokenizer, max_length=1024)
    context = steps[0].input_ids[: steps[0].context_length]
    measured = bench(backbone.model, context, skip=options.skip, repeats=5, new_tokens=32)
    document = {"model": name, **measured, "commit": commit(), "machine": describe_machine()}
    print(json.dumps(document, indent=2)) if as_json else print_quick(document)


def time_engine(options: BenchConfig, *, as_json: bool, drawing: Path | None, say: Say) -> None:
    """Time the parts asked for and print tables or one JSON document; `drawing` gets the skip rates as SVG."""
    if drawing is not None:
        check_writable(drawing)
    together = max(16, *options.batches)
    if options.adapter:
        engine, backbone = load_engine(
            options.adapter,
            model=options.model,
            precision=options.precision,
            device=default_device(),
            max_rows=together,
        )
        name = backbone.name
    else:
        name = options.model or QUICK
        backbone = load_backbone(name, dtype=dtype_of(options.precision), device=default_device())
        weights = Weights.from_model(backbone.model, precision=options.precision)
        engine = Engine(weights, max_rows=together)
    subject = Bench(
        engine=engine,
        examples=_examples(options, backbone.tokenizer),
        skip=None if options.adapter else options.skip,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        say=say,
    )
    warm_up(subject)
    document: dict[str, Any] = {
        "model": name,
        "adapter": options.adapter,
        "options": to_dict(options),
        **setting(engine),
        "steps": {kind: len(examples) for kind, examples in subject.examples.items()},
        "stream_bytes_per_second": stream_bandwidth(engine.weights.device),
        **_parts(options, subject, backbone),
        "commit": commit(),
        "machine": describe_machine(),
    }
    print(json.dumps(document, indent=2)) if as_json else print_tables(document)
    if drawing is not None and "rates" in document:
        write_text(drawing, plot(document["rates"]))
        say(f"wrote {drawing}")


def warm_up(subject: Bench) -> None:
    """Run once what is timed later: the first run touches all memory."""
    contexts = subject.contexts(next(iter(subject.examples)), 1)
    subject.engine.generate(subject.ask(contexts, [subject.open]))


def _parts(options: BenchConfig, subject: Bench, backbone: Backbone) -> dict[str, Any]:
    stops = stop_ids(backbone.tokenizer)

    def peers() -> list[dict[str, Any]]:
        files = (Path(file) if file else None for file in (options.gguf, options.onnx, options.folder))
        model = backbone.model
        if options.adapter:  # LoRA is merged into the one that is there
            model = load_backbone(backbone.name, dtype=dtype_of(options.precision), device=default_device()).model
        return time_peers(subject, available(model, *files), options.batches)

    timers: dict[str, Callable[[], Any]] = {
        "rows": lambda: time_rows(subject, options.batches),
        "rates": lambda: time_skip_rates(subject),
        "classes": lambda: time_classes(subject, max(options.batches)),
        "drafts": lambda: time_drafts(subject, options.draft, stops),
        "peers": peers,
    }
    return {part: timer() for part, timer in timers.items() if part in options.parts}


def _examples(options: BenchConfig, tokenizer: Any) -> dict[str, list[Example]]:
    """Return the longest steps of each kind that fit, from held-out conversations where the source has any."""
    conversations, _ = load_conversations(options.data, limit=4000)
    held_out = [conversation for conversation in conversations if conversation.split != "train"]
    steps, _ = cut_steps((held_out or conversations)[:400], tokenizer, max_length=2 * options.context)
    chosen: dict[str, list[Example]] = {}
    for kind in KINDS:
        fitting = [step for step in steps if step.kind == kind and step.context_length <= options.context]
        fitting.sort(key=lambda step: -step.context_length)
        if not fitting:
            raise DataError(f"{options.data}: no {kind} step has a context of at most {options.context} tokens.")
        chosen[kind] = [
            Example(step.input_ids[: step.context_length], step.input_ids[step.context_length :])
            for step in fitting[: options.steps]
        ]
    return chosen
