"""`layerroute bench`."""

import json
from collections.abc import Callable
from typing import Any

from layerroute.data.generator import generate
from layerroute.data.steps import cut_steps
from layerroute.inference.bench import bench
from layerroute.machine import describe_machine
from layerroute.models.loading import load_backbone


def time_engine(model: str, *, skip: float, quick: bool, as_json: bool) -> None:
    """Time the engine on a built-in context and print a table or one JSON document."""
    backbone = load_backbone(model)
    steps, _ = cut_steps(generate(8), backbone.tokenizer, max_length=1024)
    context = steps[0].input_ids[: steps[0].context_length]
    repeats, new_tokens = (5, 32) if quick else (11, 64)
    measured = bench(backbone.model, context, skip=skip, repeats=repeats, new_tokens=new_tokens)
    document = {"model": model, **measured, "machine": describe_machine()}
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print_table(document)


def _print_table(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    skipped, blocks = len(document["skipped"]), document["blocks"]
    title = f"{document['model']}, {document['dtype']}, {document['threads']} threads, {skipped} of {blocks} skipped"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("prefill", "decode"):
        table.add_column(f"{name} of one row", justify="right")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "all open, tokens/s": lambda part: f"{part['open']['tokens_per_second']:.1f}",
        "routed, tokens/s": lambda part: f"{part['routed']['tokens_per_second']:.1f}",
        "speed-up": lambda part: f"{part['speedup']:.3f}x",
        "ideal speed-up": lambda part: f"{part['ideal_speedup']:.3f}x",
        "share of ideal": lambda part: f"{100 * part['share_of_ideal']:.1f} %",
        "open against transformers": lambda part: f"{part['vs_transformers']:.2f}x",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(document[part]) for part in ("prefill", "decode")))
    Console().print(table)
    share = document["decode"]["share_of_stream"]
    print(f"decode reads {100 * share:.0f} % of {document['stream_bytes_per_second'] / 1e9:.1f} GB/s measured")
    print(f"decoder: {document['decoder']}" + (f" ({document['decoder_note']})" if document["decoder_note"] else ""))
