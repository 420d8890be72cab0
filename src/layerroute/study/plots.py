"""The study's figures: SVG files drawn with the report's own strokes."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any

from layerroute.config import KINDS
from layerroute.evaluation.cells import NAMES
from layerroute.evaluation.drawing import (
    COARSE,
    COLOURS,
    FAINT,
    GRID,
    INK,
    WIDTH,
    line,
    ratios,
    svg,
    text,
    ticks,
)

Aggregates = Mapping[str, Mapping[str, Any]]
FAR = 0.5  # relative perplexity beyond which a mark is named under the picture, so that the others stay apart


def frontier(aggregates: Aggregates, quality: str, against: str) -> str:
    """Draw quality against skipping: a mark for each variant and kind, its arms from least to most over seeds.

    Where some marks lie far off, they are named below instead. A name that would cover another is left to the tooltip.

    Args:
        aggregates: from `aggregate`.
        quality: figure on the vertical axis without its kind, a relative perplexity: `ratio` or `routed_vs_open`.
        against: what that perplexity is relative to, in words.
    """
    left, top, wide, tall = 76, 30, WIDTH - 76 - 20, 320
    marks = [_key(left + 70 * index, kind) for index, kind in enumerate(KINDS)]
    points = [
        (kind, variant, own["figures"][f"skip.{kind}"], own["figures"][f"{quality}.{kind}"])
        for variant, own in aggregates.items()
        for kind in KINDS
        if own["figures"].get(f"{quality}.{kind}", {}).get("mean") is not None
    ]
    near = [point for point in points if point[3]["mean"] <= FAR]
    far = [point for point in points if point[3]["mean"] > FAR] if near else []
    points = near or points
    right = max([skip["max"] for _, _, skip, _ in points] + [0.1]) * 1.12
    low = math.log(min([1 + worse["min"] for *_, worse in points] + [1.0])) - 0.02
    high = math.log(max([1 + worse["max"] for *_, worse in points] + [1.1])) + 0.02

    def place(rate: float, worse: float) -> tuple[float, float]:
        return left + wide * rate / right, top + tall * (high - math.log1p(worse)) / (high - low)

    for tick in ticks(0.0, right, 8):
        x = place(tick, 0.0)[0]
        marks += [line(x, top, x, top + tall), text(x, top + tall + 18, f"{100 * tick:.0f} %", fill=FAINT)]
    for ratio in ratios(low, high):
        y = place(0.0, ratio - 1)[1]
        name = f"{ratio:g}x" if high - low > COARSE else f"{100 * (ratio - 1):+.3g} %"
        marks.append(line(left, y, left + wide, y, INK if ratio == 1.0 else GRID))
        marks.append(text(left - 8, y + 4, name, anchor="end", fill=FAINT))
    named: list[tuple[float, float, float]] = []  # where each name begins and ends, and its height
    for kind, variant, skip, worse in points:
        marks += _mark(kind, variant, (skip, worse), place)
        x, y = place(skip["mean"], worse["mean"])
        end = x + 7.5 * len(variant)
        if not any(x < there and here < end and abs(y - height) < 14 for here, there, height in named):
            named.append((x, end, y))
            marks.append(text(x + 8, y - 7, variant, anchor="start", fill=COLOURS[kind]))
    marks.append(text(left + wide / 2, top + tall + 40, "skip rate", fill=FAINT))
    beyond = [f"{v}, {NAMES[k]}: {1 + w['mean']:.1f}x at {100 * s['mean']:.1f} %" for k, v, s, w in far]
    lines = wrap("beyond: " + "; ".join(beyond), 115) if beyond else []
    for number, words in enumerate(lines):
        marks.append(text(left, top + tall + 62 + 15 * number, words, anchor="start", fill=FAINT))
    return svg(
        top + tall + (55 + 15 * len(lines) if lines else 48), marks, f"Perplexity against {against}, by skip rate"
    )


def per_seed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the differential of every run: a line for each variant, a dot for each seed, a bar at their mean."""
    grouped: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        grouped.setdefault(row["variant"], [])
        if (points := row["figures"]["differential"]) is not None:
            grouped[row["variant"]].append((row["seed"], points))
    left, top, each = 150, 8, 34
    wide, tall = WIDTH - left - 24, each * max(len(grouped), 1)
    every = [points for dots in grouped.values() for _, points in dots]
    low, high = min([*every, 0.0]) - 1, max([*every, 5.0]) + 1

    def across(points: float) -> float:
        return left + wide * (points - low) / (high - low)

    marks = []
    for tick in ticks(low, high, 10):
        x = across(tick)
        marks += [line(x, top, x, top + tall, GRID if tick else INK), text(x, top + tall + 18, f"{tick:g}", fill=FAINT)]
    for number, (variant, dots) in enumerate(grouped.items()):
        y = top + each * (number + 0.5)
        marks.append(text(left - 12, y + 4, variant, anchor="end"))
        for seed, points in dots:
            marks.append(
                f'<circle cx="{across(points):.1f}" cy="{y:.1f}" r="5" fill="{COLOURS["tool_call"]}" '
                f'fill-opacity="0.55"><title>{escape(variant)}, seed {seed}: {points:.1f} points</title></circle>'
            )
        if dots:
            x = across(sum(points for _, points in dots) / len(dots))
            marks.append(line(x, y - 11, x, y + 11, INK))
    marks.append(text(left + wide / 2, top + tall + 40, "differential, points; the bar is the mean", fill=FAINT))
    return svg(top + tall + 48, marks, "Differential of every run")


def _mark(kind: str, variant: str, at: tuple[Mapping[str, Any], Mapping[str, Any]], place: Any) -> list[str]:
    skip, worse = at
    (x, y), colour = place(skip["mean"], worse["mean"]), COLOURS[kind]
    (x1, _), (x2, _) = place(skip["min"], worse["mean"]), place(skip["max"], worse["mean"])
    (_, y1), (_, y2) = place(skip["mean"], worse["min"]), place(skip["mean"], worse["max"])
    words = (
        f"{variant}, {NAMES[kind]}: skips {100 * skip['mean']:.1f} %, perplexity {100 * worse['mean']:+z.1f} % "
        f"({skip['count']} seeds)"
    )
    return [
        line(x1, y, x2, y, colour),
        line(x, y1, x, y2, colour),
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{escape(words)}</title></circle>',
    ]


def _key(x: float, kind: str) -> str:
    return f'<circle cx="{x + 6:.1f}" cy="12" r="5" fill="{COLOURS[kind]}"/>' + text(
        x + 16, 16, NAMES[kind], anchor="start", fill=COLOURS[kind]
    )
