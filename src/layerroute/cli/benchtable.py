"""The figures of `layerroute bench` as tables and as one drawing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from layerroute.evaluation.cells import NAMES
from layerroute.evaluation.drawing import speedups, standalone
from layerroute.evaluation.table import wide_console

COLOURS = {"decode": "#0072B2", "prefill": "#D55E00"}


def print_quick(document: Mapping[str, Any]) -> None:
    """Print the table of one row."""
    skipped, blocks = len(document["skipped"]), document["blocks"]
    title = f"{document['model']}, {document['dtype']}, {document['threads']} threads, {skipped} of {blocks} skipped"
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "all open, tokens/s": lambda part: f"{part['open']['tokens_per_second']:.1f}",
        "routed, tokens/s": lambda part: f"{part['routed']['tokens_per_second']:.1f}",
        "speed-up": lambda part: f"{part['speedup']:.3f}x",
        "ideal speed-up": lambda part: f"{part['ideal_speedup']:.3f}x",
        "share of ideal": lambda part: f"{100 * part['share_of_ideal']:.1f} %",
        "open against transformers": lambda part: f"{part['vs_transformers']:.2f}x",
    }
    parts = [document[part] for part in ("prefill", "decode")]
    cells = [[name, *(cell(part) for part in parts)] for name, cell in rows.items()]
    _print(title, ("", "prefill of one row", "decode of one row"), cells)
    share = document["decode"]["share_of_stream"]
    print(f"decode reads {100 * share:.0f} % of {document['stream_bytes_per_second'] / 1e9:.1f} GB/s measured")
    _print_decoder(document)


def print_tables(document: Mapping[str, Any]) -> None:
    """Print one table a part."""
    by = "the adapter's own routes" if document["adapter"] else "evenly spread routes"
    print(f"{document['model']}, {document['dtype']}, {document['threads']} threads, {by}")
    print(f"memory streams at {document['stream_bytes_per_second'] / 1e9:.1f} GB/s")
    _print_decoder(document)
    printers: dict[str, Callable[[Any], None]] = {
        "rows": _print_rows,
        "rates": _print_rates,
        "classes": _print_classes,
        "drafts": _print_drafts,
        "peers": _print_peers,
    }
    for part, printer in printers.items():
        if part in document:
            printer(document[part])


def plot(points: Sequence[Mapping[str, Any]]) -> str:
    """Draw the skip rates as a whole SVG file."""
    lines = {
        name: [(point["skip_rate"], point[name]["speedup"], point[name]["ideal_speedup"]) for point in points]
        for name in COLOURS
    }
    return standalone(speedups(lines, COLOURS))


def _print_rows(cells: Sequence[Mapping[str, Any]]) -> None:
    for name in ("prefill", "decode"):
        rows = []
        for cell in cells:
            part = cell[name]
            limit = part["share_of_stream"]["open"] if name == "decode" else None
            rows.append(
                [
                    NAMES[cell["kind"]],
                    str(cell["rows"]),
                    f"{100 * cell['skip_rate']:.1f} %",
                    _speed(part["open"]),
                    _speed(part["routed"]),
                    f"{part['speedup']:.3f}x",
                    f"{part['ideal_speedup']:.3f}x",
                    f"{100 * part['share_of_ideal']:.1f} %",
                    "" if limit is None else f"{part['bytes_per_token']['open'] / 1e6:.1f}",
                    "" if limit is None else f"{100 * limit:.0f} %",
                ]
            )
        heads = ("kind", "rows", "skipped", "open tok/s", "routed tok/s", "speed-up", "ideal", "share of ideal")
        _print(name, (*heads, "MB/token", "of memory limit") if name == "decode" else heads, rows)


def _print_rates(points: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for point in points:
        cells = [f"{100 * point['skip_rate']:.1f} %"]
        for name in ("prefill", "decode"):
            part = point[name]
            cells += [
                f"{part['speedup']:.3f}x",
                f"{part['ideal_speedup']:.3f}x",
                f"{100 * part['share_of_ideal']:.1f} %",
            ]
        rows.append(cells)
    heads = ("skipped", "prefill", "ideal", "share", "decode", "ideal", "share")
    _print("skip rates, one row", heads, rows)


def _print_classes(part: Mapping[str, Any]) -> None:
    title = f"decode of {part['steps']} steps, {part['rows']} together, half of each kind"
    names = {
        "open": "all open",
        "exact": f"exact, {part['exact_routes']} routes",
        "classes": f"{part['route_classes']} classes",
    }
    rows = [
        [
            text,
            f"{100 * part[name]['skip_rate']:.1f} %",
            _speed(part[name]),
            f"{part[name]['speedup']:.3f}x",
            f"{part[name]['ideal_speedup_by_flops']:.3f}x",
        ]
        for name, text in names.items()
    ]
    _print(title, ("routes", "skipped", "tok/s", "against open", "FLOPs allow"), rows)


def _print_drafts(part: Mapping[str, Any]) -> None:
    rows = []
    for kind, cell in part["kinds"].items():
        if cell["speedup"] is None:
            continue
        rows.append(
            [
                NAMES[kind],
                f"{cell['equal']} of {cell['steps']}",
                f"{cell['plain_tokens_per_second']:.1f}",
                f"{cell['draft_tokens_per_second']:.1f}",
                f"{cell['speedup']:.2f}x",
                f"{cell['kept_tokens']} of {cell['drafted_tokens']}",
                f"{cell['tokens_per_pass']:.2f}",
                f"{cell['replayed_tokens_per_pass']:.2f}",
            ]
        )
    heads = ("kind", "equal", "plain tok/s", "draft tok/s", "speed-up", "kept", "tokens/pass", "of real response")
    _print(f"drafts of up to {part['draft']} tokens, one row", heads, rows)


def _print_peers(cells: Sequence[Mapping[str, Any]]) -> None:
    for cell in cells:
        ours = cell["layerroute"]
        rows = []
        for name, part in cell.items():
            if isinstance(part, Mapping) and "decode" in part:
                ratios = (ours[p]["seconds"] / part[p]["seconds"] for p in ("prefill", "decode"))
                speeds = (_speed(part[p]) for p in ("prefill", "decode"))
                rows.append([name, *speeds, *(f"{ratio:.2f}x" for ratio in ratios)])
        rows += [[name, reason, "", "", ""] for name, reason in cell["absent"].items()]
        title = f"all gates open, {cell['rows']} together, {cell['context_tokens']} context tokens"
        _print(title, ("engine", "prefill tok/s", "decode tok/s", "prefill vs ours", "decode vs ours"), rows)


def _speed(part: Mapping[str, float]) -> str:
    return f"{part['tokens_per_second']:.1f}"


def _print_decoder(document: Mapping[str, Any]) -> None:
    print(f"decoder: {document['decoder']}" + (f" ({document['decoder_note']})" if document["decoder_note"] else ""))


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row[: len(heads)])
    wide_console().print(table)
