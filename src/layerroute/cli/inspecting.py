"""`layerroute inspect` and `layerroute data`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerroute.cli.generating import context_of
from layerroute.config import AdapterConfig
from layerroute.data.preview import QUANTILES, preview_rows, summary
from layerroute.data.sources import load_sources
from layerroute.data.steps import cut_steps, prompt_ids
from layerroute.errors import AdapterError, ConfigError
from layerroute.evaluation.flops import parameter_counts, step_flops
from layerroute.models.adapter import bypassed_blocks, load_adapter, read_manifest
from layerroute.models.finding import is_adapter
from layerroute.models.loading import load_backbone, load_config
from layerroute.routing.route import Route


def describe(target: str, *, model: str | None, context: int, response: int, as_json: bool) -> None:
    """Print parameter counts and FLOPs of an adapter or of a backbone, by its configuration alone.

    Raises:
        ConfigError: `model` is given and `target` is no adapter.
        AdapterError: the backbone has another number of blocks or another width than the adapter's.
    """
    manifest = read_manifest(target) if is_adapter(target) else None
    if model is not None and manifest is None:
        raise ConfigError(f"--model names the backbone of an adapter, and {target} is none; leave it out.")
    base = model or (manifest.base if manifest else target)
    adapter = manifest.config if manifest else AdapterConfig()
    config = load_config(base)
    count, width = config.num_hidden_layers, config.hidden_size
    if manifest and (count, width) != (manifest.blocks, manifest.hidden):
        raise AdapterError(
            f"{target}: made for {manifest.blocks} blocks of width {manifest.hidden}, but {base!r} has {count} of "
            f"{width}. Give the backbone it was trained on with --model."
        )
    flops = step_flops(config, context, response, Route.open(count))
    document: dict[str, Any] = {
        "target": target,
        "base": base,
        "model_type": config.model_type,
        "blocks": count,
        "hidden": width,
        "parameters": parameter_counts(config, adapter, len(bypassed_blocks(target)) if manifest else None),
        "flops": {"context": context, "response": response, **flops},
        "measured": dict(manifest.measured) if manifest else {},
    }
    if as_json:
        print(json.dumps(document, indent=2))
        return
    table = _table("what", "count")
    table.title, table.title_justify = f"{target}: {config.model_type}, {count} blocks of {width}", "left"
    for name, value in document["parameters"].items():
        table.add_row(f"parameters, {name}", f"{value:,}")
    for name, value in flops.items():
        table.add_row(f"FLOPs, {name} ({context} + {response} tokens)", f"{value:,.0f}")
    _print(table)


def draw_route(adapter: str, prompt: str, tools: Path | None, *, model: str | None, as_json: bool) -> None:
    """Print the route that an adapter gives a prompt, with each block's run probability.

    Raises:
        ConfigError: a prompt longer than the model's positions.
    """
    import torch

    backbone = load_backbone(model) if model else None
    routed, backbone = load_adapter(adapter, backbone)
    ids = torch.tensor([prompt_ids(context_of(prompt, None, tools), backbone.tokenizer)])
    count, length = len(routed.blocks), ids.shape[1]
    if length > (most := routed.base.config.max_position_embeddings):
        raise ConfigError(f"a prompt of {length} tokens exceeds the model's {most} positions. Shorten it.")
    with torch.inference_mode():
        if not routed.config.router.reads_context:
            ids = torch.cat([ids, routed.likeliest_next(ids)], dim=1)
        context = torch.arange(ids.shape[1])[None] < length
        route_pass = routed.begin(context, ~context)
        routed.residuals(ids, route_pass)
    route = Route(tuple(bool(route_pass.gates[block]) for block in range(count)))
    chance = [float(torch.sigmoid(route_pass.logits[block])) for block in range(count)]
    first = backbone.tokenizer.decode(ids[0, length:])
    if as_json:
        gates = [int(gate) for gate in route.gates]
        document = {"gates": gates, "skip_rate": route.skip_rate, "run_probability": chance}
        print(json.dumps(document | ({"first_token": first} if first else {}), indent=2))
        return
    if first:
        print(f"after the response's first token, {first!r}:")
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
    conversations, bad = load_sources(
        sources, limit=limit, skip_bad=skip_bad, say=lambda line: print(line, file=sys.stderr)
    )
    document: dict[str, Any] = {"bad_rows": [f"{where}: {reason}" for where, reason in bad]}
    if tokenizer is None:
        document = summary(conversations) | document
    else:
        from layerroute.models.loading import load_tokenizer

        print("counting tokens", file=sys.stderr)
        steps, cut = cut_steps(conversations, load_tokenizer(tokenizer), max_length=max_length)
        document = summary(conversations, steps) | document | {"cut": asdict(cut)}
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for row in preview_rows(conversations, preview):
        print(f"{row['id']} [{row['split']}] {row['kinds']}\n    {row['text']}\n")
    _print_counts(document)
    if tokenizer is not None:
        _print_lengths(document)
        print(f"{cut.kept} of {cut.turns} turns of the assistant are steps; {cut.left_out(max_length)}")


def _print_counts(document: dict[str, Any]) -> None:
    counts = document["conversations"]
    table = _table("conversations", *counts["by_split"], "all")
    for source, splits in (*counts["by_source"].items(), ("all", counts["by_split"])):
        table.add_row(
            source, *(f"{splits.get(split, 0):,}" for split in counts["by_split"]), f"{sum(splits.values()):,}"
        )
    _print(table)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts["by_kind"].items())
    print(f"{counts['turns']:,} turns of the assistant: {kinds}")
    print(f"{counts['with_tools']:,} conversations offer tools, of {counts['distinct_tools']:,} different names")
    print(f"{counts['duplicates']:,} conversations repeat another, {counts['in_two_splits']:,} are in two splits")
    if shared := counts["steps_in_two_splits"]:
        print(f"{shared:,} steps (an answer and all before it) are in two splits: give such rows a split of their own")
    if bad := document["bad_rows"]:
        print(f"{len(bad):,} bad rows left out, the first: {bad[0]}")
    print(f"content hash {document['content_hash']}")


def _print_lengths(document: dict[str, Any]) -> None:
    table = _table("tokens of", "steps", "with tools", *QUANTILES)
    for kind, parts in document["tokens"].items():
        for part, at in parts.items():
            counts = ("by_kind", "tools_offered") if part == "step" else ()
            steps = [f"{document['steps'][name][kind]:,}" for name in counts] or ["", ""]
            table.add_row(
                kind if counts else f"  {part}", *steps, *(f"{at[name]:,}" if at else "" for name in QUANTILES)
            )
    _print(table)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _print(table: Any) -> None:
    from layerroute.evaluation.table import wide_console

    wide_console(markup=False, emoji=False).print(table)  # names of files are no markup
