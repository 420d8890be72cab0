"""The document as one HTML page that needs nothing else: no scripts, no fonts, no network."""

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from layerroute.evaluation.cells import (
    AGAINST_COLUMNS,
    COLUMNS,
    CONTROL_COLUMNS,
    MISSING,
    NAMES,
    SPEED_COLUMNS,
    TASK_COLUMNS,
    TASKS,
    control_rows,
    gap_line,
    headline,
    kind_rows,
    loop_line,
    matched_line,
    percent,
    plain,
    speed_rows,
    task_rows,
    with_tools_line,
)
from layerroute.evaluation.drawing import COLOURS, curves, heatmap, histograms
from layerroute.files import write_text

STYLE = """
:root { --ink: #1f2933; --faint: #5f6b7a; --line: #e3e8ee; --paper: #ffffff; --ground: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 74ch; }
.faint { color: var(--faint); font-size: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin: 24px 0; }
.card, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 16px 18px; border-top: 4px solid var(--mark, var(--ink)); }
.card b { display: block; font-size: 30px; line-height: 1.2; font-variant-numeric: tabular-nums; }
section { padding: 22px 24px; margin: 18px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--faint); vertical-align: bottom; }
th, td { text-align: right; padding: 8px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.wide + p { margin: 14px 0 0; }
svg { display: block; width: 100%; height: auto; margin-top: 12px; }
pre { background: var(--ground); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font-size: 13px; line-height: 1.45; }
summary { cursor: pointer; color: var(--faint); }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px 0 14px;
  vertical-align: -1px; }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""


def write_report(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page to `path`, whole or not at all."""
    write_text(path, render(document))


def render(document: Mapping[str, Any]) -> str:
    """Return the document as one HTML page."""
    data, name = document["data"], document["adapter"] or document["model"]
    where = (
        f"{name} on {document['model']}: {sum(data['steps'].values()):,} steps of "
        f"{data['conversations']:,} conversations ({', '.join(data['sources'])}; split {data['split']})."
    )
    sections = [
        f"<header><h1>{escape(headline(document))}</h1><p class=faint>{escape(where)}</p></header>",
        _cards(document),
        _measured(document),
        _gates(document),
        _curve(document),
        _controls(document),
        _tasks(document),
        _reproduce(document),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>LayerRoute: {escape(name)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _cards(document: Mapping[str, Any]) -> str:
    gap, matched = document["differential"], document["length_matched"]
    cards = [("differential", plain(gap["points"], 1), _span(gap), "#1f2933")]
    alike = (plain(matched["points"], 1), _span(matched)) if matched else (MISSING, "no context length in common")
    cards.append(("differential, like lengths", *alike, "#1f2933"))
    for kind, row in document["kinds"].items():
        change = f"perplexity {percent(row['routed_vs_open']['relative'], signed=True)} against every gate open"
        cards.append((f"{NAMES[kind]} skip", percent(row["skip_rate"]), change, COLOURS[kind]))
    return "<div class=cards>{}</div>".format(
        "".join(
            f'<div class=card style="--mark: {colour}"><span class=faint>{escape(title)}</span><b>{escape(figure)}</b>'
            f"<span class=faint>{escape(note)}</span></div>"
            for title, figure, note, colour in cards
        )
    )


def _span(gap: Mapping[str, Any]) -> str:
    if gap["low"] is None:
        return "points"
    return f"points; 95 % interval {gap['low']:.1f} to {gap['high']:.1f}"


def _measured(document: Mapping[str, Any]) -> str:
    note = (
        "Skipped: share of block FLOPs not done, over the tokens that the routers' scope covers. Perplexity: exp of "
        "the mean negative log-likelihood of a response token, nothing else in it. Routed against open compares the "
        "same adapter with and without routing, with a 95 % bootstrap interval over conversations. All FLOPs count "
        "the LM head, the routers and the keys and values that skipped blocks owe to later steps; weight bytes are "
        "those read to decode one token."
    )
    lines = (
        f"<p>Differential: {escape(gap_line(document['differential']))}. Between steps whose contexts are of like "
        f"length: {escape(matched_line(document))}. With tools on offer, where planning is "
        f"most like a tool call: {escape(with_tools_line(document))}.</p>"
    )
    return _section("What was measured", note, _table(COLUMNS, kind_rows(document)) + lines)


def _gates(document: Mapping[str, Any]) -> str:
    rates = {kind: row["run_rate"] for kind, row in document["kinds"].items()}
    blocks = _section(
        "Which blocks run",
        "Percent of the steps of each kind that run a block. Dark: always; light: never.",
        heatmap(rates),
    )
    gates = document["gates"]
    chances = histograms(gates["edges"], gates["counts"], document["router"]["threshold"])
    spread = _section(
        "How decided the gates are",
        "Run probability of every gate of every step. A gate left of the dashed line is closed. Mass near the line "
        "means that routes waver.",
        chances,
    )
    return blocks + spread


def _curve(document: Mapping[str, Any]) -> str:
    points: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in NAMES}
    for point in document["curve"]:
        for kind, row in point["kinds"].items():
            if row["skip_rate"] is not None and row["relative"] is not None:
                points[kind].append((point["offset"], row["skip_rate"], 1.0 + row["relative"]))
    if not any(points.values()):
        return ""
    keys = "".join(f'<span class=key style="background: {COLOURS[kind]}"></span>{NAMES[kind]}' for kind in points)
    note = (
        "Perplexity against the same steps with every gate open, as one number added to all run logits moves the "
        "skip rate. The full marks are the adapter as it is."
    )
    return _section("Quality against skipping", note, f"<div class=faint>{keys}</div>{curves(points)}")


def _controls(document: Mapping[str, Any]) -> str:
    rows = control_rows(document)
    if not rows:
        return ""
    note = (
        "Other ways to skip as many blocks of the same steps with the same adapter; a mask closes whole blocks, as "
        "many as are nearest to that. The two masks by true kind know what the routers must find out."
    )
    return _section("Controls at equal budget", note, _table(CONTROL_COLUMNS, rows))


def _tasks(document: Mapping[str, Any]) -> str:
    rows, timed = task_rows(document), speed_rows(document)
    if not rows:
        return ""
    note = (
        "Answers generated greedily by the engine, skipped blocks not run. Right: the calls of the turn as trees "
        "(name, arguments, types, values, in any order); no call where the transcript has none; the last number of a "
        "worked solution; every turn of an agent loop. Differences are paired by step; 95 % bootstrap intervals over "
        "conversations."
    )
    body = _table([*TASK_COLUMNS, *AGAINST_COLUMNS][: len(rows[0])], rows)
    if timed:
        body += "<p>Tokens a second, one row at a time, the two in turns on the same contexts (medians):</p>"
        body += _table(SPEED_COLUMNS, timed)
    if line := loop_line(document):
        body += f"<p>Agent loops: {escape(line)} (medians).</p>"
    wrong = [(name, each) for name, row in document["tasks"].items() for each in row["examples"]]
    shown = "".join(
        f"<p class=faint>{escape(TASKS.get(name, name))}: {escape(each['wrong'])}</p>"
        f"<pre>{escape(each['expected'])}\n--- said ---\n{escape(each['said'])}</pre>"
        for name, each in wrong
    )
    if shown:
        body += f"<details><summary>Some wrong answers</summary>{shown}</details>"
    return _section("Tasks under real skipping", note, body)


def _reproduce(document: Mapping[str, Any]) -> str:
    machine, target = document["machine"], document["adapter"] or "ADAPTER"
    processor = machine.get("gpu") or machine["cpu"]
    note = (
        f"Save these options as options.yaml (JSON is YAML) and run the command below. Measured in "
        f"{document['seconds']:.0f} s on {processor}, {machine['threads']} threads, torch {machine['torch']}, "
        f"Python {machine['python']}. Steps: hash {document['data']['hash']}."
    )
    command = shlex.join(["layerroute", "evaluate", target, "--model", document["model"]])
    command += " --config options.yaml --report report.html"
    whole = json.dumps(document, indent=2, allow_nan=False)
    body = (
        f"<pre>{escape(command)}</pre><pre>{escape(json.dumps(document['options'], indent=2))}</pre>"
        f"<details><summary>The whole document as JSON</summary><pre>{escape(whole)}</pre></details>"
    )
    return _section("How to reproduce this", note, body)


def _section(title: str, note: str, body: str) -> str:
    return f"\n<section><h2>{escape(title)}</h2><p class=faint>{escape(note)}</p>{body}</section>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
