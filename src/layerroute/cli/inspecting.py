"""`layerroute inspect` and `layerroute data`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerroute.cli.generating import context_of
from layerroute.config import AdapterConfig
from layerroute.data.preview import preview_rows, summary
from layerroute.data.sources import load_sources
from layerroute.data.steps import Step, cut_steps, prompt_ids
from layerroute.errors import ConfigError
from layerroute.evaluation.flops import parameter_counts, step_flops
from layerroute.models.adapter import load_adapter, read_manifest
from layerroute.models.finding import is_adapter
from layerroute.models.loading import load_backbone, load_config
from layerroute.routing.route import Route


def describe(target: str, *, model: str | None, context: int, response: int, as_json: bool) -> None:
    """Print parameter counts and FLOPs of an adapter or of a backbone's configuration; no weights are read.

    Raises:
        ConfigError: `model` is given and `target` is no adapter.
    """
    manifest = read_manifest(target) if is_adapter(target) else None
    if model is not None and manifest is None:
        raise ConfigError(f"--model names the backbone of an adapter, and {target} is none; leave it out.")
    base = model or (manifest.base if manifest else target)
    adapter = manifest.config if manifest else AdapterConfig()
    config = load_config(base)
    count = config.num_hidden_layers
    flops = step_flops(config, context, response, Route.open(count))
    document: dict[str, Any] = {
        "target": target,
        "base": base,
        "model_type": config.model_type,
        "blocks": count,
        "hidden": config.hidden_size,
        "parameters": parameter_counts(config, adapter),
        "flops": {"context": context, "response": response, **flops},
        "measured": dict(manifest.measured) if manifest else {},
    }
    if as_json:
        print(json.dumps(document, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{target}: {document['model_type']}, {count} blocks of {config.hidden_size}", title_justify="left"
    )
    table.add_column("what")
    table.add_column("count", justify="right")
    for name, value in document["parameters"].items():
        table.add_row(f"parameters, {name}", f"{value:,}")
    for name, value in flops.items():
        table.add_row(f"FLOPs, {name} ({context} + {response} tokens)", f"{value:,.0f}")
    Console().print(table)


def draw_route(adapter: str, prompt: str, tools: Path | None, *, model: str | None, as_json: bool) -> None:
    """Print the route that an adapter gives a prompt, with each block's run probability."""
    import torch

    backbone = load_backbone(model) if model else None
    routed, backbone = load_adapter(adapter, backbone)
    ids = torch.tensor([prompt_ids(context_of(prompt, None, tools), backbone.tokenizer)])
    with torch.inference_mode():
        route_pass = routed.begin(torch.ones_like(ids, dtype=torch.bool), None)
        routed.residuals(ids, route_pass)
    count = len(routed.blocks)
    route = Route(tuple(bool(route_pass.gates[block]) for block in range(count)))
    chance = [float(torch.sigmoid(route_pass.logits[block])) for block in range(count)]
    if as_json:
        gates = [int(gate) for gate in route.gates]
        print(json.dumps({"gates": gates, "skip_rate": route.skip_rate, "run_probability": chance}, indent=2))
        return
    print(f"route {route}  skips {len(route.skipped)} of {count} blocks ({100 * route.skip_rate:.1f} %)")
    for block in range(count):
        bar = "█" * round(40 * chance[block])
        print(f"{block:>3} {'run ' if route.gates[block] else 'skip'} {chance[block]:.2f} {bar}")


def describe_data(
    sources: list[str],
    *,
    tokenizer: str | None,
    max_length: int,
    limit: int | None,
    preview: int,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Validate, count and preview transcripts; bad rows end it with every file and line, unless skipped."""
    conversations, bad = load_sources(sources, limit=limit, skip_bad=skip_bad)
    steps: list[Step] = []
    cut = None
    if tokenizer is not None:
        from layerroute.models.loading import load_tokenizer

        print("counting tokens", file=sys.stderr)
        steps, cut = cut_steps(conversations, load_tokenizer(tokenizer), max_length=max_length)
    document = summary(conversations, steps) | {"bad_rows": [f"{where}: {reason}" for where, reason in bad]}
    if cut is not None:
        document["cut"] = asdict(cut)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for row in preview_rows(conversations, preview):
        print(f"{row['id']} [{row['split']}] {row['kinds']}\n    {row['text']}\n")
    print(json.dumps(document, indent=2))
