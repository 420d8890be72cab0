"""The report's figures, as SVG that stands inside a page: no scripts, no fonts, nothing from outside."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from layerroute.evaluation.cells import NAMES

COLOURS = {"tool_call": "#0072B2", "planning": "#D55E00"}  # Okabe and Ito: told apart by colour-blind readers
DASHES = {"tool_call": "", "planning": "6 3"}
INK, FAINT, GRID = "#1f2933", "#5f6b7a", "#e3e8ee"
LIGHT, DARK = (247, 251, 255), (8, 69, 148)  # the heatmap's ends, for 0 and 1
WIDTH = 860
COARSE = math.log(2.5)  # a vertical axis that spans more counts in multiples, else in percent


def heatmap(rates: Mapping[str, Sequence[float | None]]) -> str:
    """Draw how often each block (columns) runs for each kind (rows): dark always, light never."""
    count = max(map(len, rates.values()))
    left, top, tall = 92, 8, 40
    wide = (WIDTH - left - 4) / count
    marks = []
    for row, (kind, values) in enumerate(rates.items()):
        y = top + row * (tall + 4)
        marks.append(text(left - 10, y + tall / 2 + 4, NAMES[kind], anchor="end"))
        for block, rate in enumerate(values):
            x, known = left + block * wide, 0.0 if rate is None else rate
            label = "no step" if rate is None else f"runs for {100 * rate:.1f} % of {NAMES[kind]}"
            marks.append(
                f'<g><title>block {block}: {label}</title><rect x="{x:.1f}" y="{y}" width="{wide - 2:.1f}" '
                f'height="{tall}" rx="3" fill="{_shade(known)}" stroke="{GRID}"/>'
            )
            if wide >= 24 and rate is not None:
                ink = "#ffffff" if known > 0.55 else INK
                marks.append(text(x + wide / 2 - 1, y + tall / 2 + 4, f"{100 * rate:.0f}", fill=ink))
            marks.append("</g>")
    bottom = top + len(rates) * (tall + 4)
    every = max(1, round(26 / wide))
    marks += [text(left + (b + 0.5) * wide - 1, bottom + 14, str(b), fill=FAINT) for b in range(0, count, every)]
    marks.append(text(left + (WIDTH - left) / 2, bottom + 34, "block (0 is nearest the embedding)", fill=FAINT))
    return svg(bottom + 42, marks, "How often each block runs, in percent of the steps of each kind")


def histograms(edges: Sequence[float], counts: Mapping[str, Sequence[int]], threshold: float) -> str:
    """Draw how the run probabilities of all gates are spread, one panel a kind, with the threshold."""
    gap, top, tall = 56, 26, 150
    wide = WIDTH / len(counts)
    highest = max((max(c) / sum(c) for c in counts.values() if sum(c)), default=1.0)
    marks = []
    for panel, (kind, values) in enumerate(counts.items()):
        left, span, total = panel * wide + gap, wide - gap - 16, max(sum(values), 1)
        marks.append(text(left, 14, NAMES[kind], anchor="start", weight=600, fill=COLOURS[kind]))
        for tick in ticks(0.0, highest, 4):
            y = top + tall * (1 - tick / highest)
            marks.append(line(left, y, left + span, y))
            marks.append(text(left - 8, y + 4, f"{100 * tick:.0f} %", anchor="end", fill=FAINT))
        for low, high, value in zip(edges[:-1], edges[1:], values, strict=True):
            bar = tall * value / total / highest
            x = left + span * low
            marks.append(
                f'<rect x="{x + 0.5:.1f}" y="{top + tall - bar:.1f}" width="{span * (high - low) - 1:.1f}" '
                f'height="{bar:.1f}" fill="{COLOURS[kind]}"><title>{low:.2f} to {high:.2f}: {value} gates, '
                f"{100 * value / total:.1f} %</title></rect>"
            )
        marks.append(line(left + span * threshold, top - 4, left + span * threshold, top + tall, INK, "3 3"))
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            marks.append(text(left + span * tick, top + tall + 16, f"{tick:g}", fill=FAINT))
        marks.append(text(left + span / 2, top + tall + 36, "run probability", fill=FAINT))
    return svg(top + tall + 44, marks, "Share of gates by run probability; the dashed line is the threshold")


def curves(points: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Draw perplexity against skip rate for each kind, from points (offset, skip rate, perplexity over open).

    The vertical axis is logarithmic; offset 0, where the adapter stands, is drawn full.
    """
    left, top, wide, tall = 76, 14, WIDTH - 76 - 20, 280
    every = [point for own in points.values() for point in own]
    right = max([rate for _, rate, _ in every] + [0.1]) * 1.05
    low = math.log(min([ratio for _, _, ratio in every] + [1.0])) - 0.02
    high = math.log(max([ratio for _, _, ratio in every] + [1.1])) + 0.02

    coarse = high - low > COARSE

    def place(rate: float, ratio: float) -> tuple[float, float]:
        return left + wide * rate / right, top + tall * (high - math.log(ratio)) / (high - low)

    marks = []
    for tick in ticks(0.0, right, 8):
        x = place(tick, 1.0)[0]
        marks += [line(x, top, x, top + tall), text(x, top + tall + 18, f"{100 * tick:.0f} %", fill=FAINT)]
    for ratio in ratios(low, high):
        y = place(0.0, ratio)[1]
        marks.append(line(left, y, left + wide, y, INK if ratio == 1.0 else GRID))
        name = "open" if ratio == 1.0 else f"{ratio:g}x" if coarse else f"{100 * (ratio - 1):+.3g} %"
        marks.append(text(left - 8, y + 4, name, anchor="end", fill=FAINT))
    for kind, own in points.items():
        path = sorted(own, key=lambda point: -point[0])
        spots = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(rate, ratio) for _, rate, ratio in path))
        colour = COLOURS[kind]
        marks.append(
            f'<polyline points="{spots}" fill="none" stroke="{colour}" stroke-width="2.5" '
            f'stroke-dasharray="{DASHES[kind]}"/>'
        )
        for offset, rate, ratio in path:
            (x, y), here = place(rate, ratio), offset == 0
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if here else 4}" fill="{colour if here else "#ffffff"}" '
                f'stroke="{colour}" stroke-width="2"><title>{NAMES[kind]}, offset {offset:+g}: skips '
                f"{100 * rate:.1f} %, perplexity {100 * (ratio - 1):+z.1f} %</title></circle>"
            )
    marks.append(text(left + wide / 2, top + tall + 40, "skip rate", fill=FAINT))
    return svg(top + tall + 48, marks, "Perplexity against every gate open, by skip rate")


def speedups(lines: Mapping[str, Sequence[tuple[float, float, float]]], colours: Mapping[str, str]) -> str:
    """Draw speed-up against skip rate, each line with its dashed ideal, from points (skip rate, measured, ideal)."""
    left, top, wide, tall = 76, 14, WIDTH - 76 - 20, 280
    every = [point for line in lines.values() for point in line]
    right = max(rate for rate, _, _ in every) * 1.05 or 1.0
    low = min([1.0, *(measured for _, measured, _ in every)]) - 0.05
    high = max(max(measured, ideal) for _, measured, ideal in every) + 0.05

    def place(rate: float, ratio: float) -> tuple[float, float]:
        return left + wide * rate / right, top + tall * (high - ratio) / (high - low)

    marks = []
    for tick in ticks(0.0, right, 8):
        x = place(tick, 1.0)[0]
        marks += [line(x, top, x, top + tall), text(x, top + tall + 18, f"{100 * tick:.0f} %", fill=FAINT)]
    for tick in ticks(low, high, 6):
        y = place(0.0, tick)[1]
        marks += [line(left, y, left + wide, y), text(left - 8, y + 4, f"{tick:.2g}x", anchor="end", fill=FAINT)]
    for number, (name, own) in enumerate(lines.items()):
        for which, dashes in ((1, ""), (2, "5 4")):
            spots = " ".join("{:.1f},{:.1f}".format(*place(point[0], point[which])) for point in own)
            marks.append(
                f'<polyline points="{spots}" fill="none" stroke="{colours[name]}" stroke-width="2.5" '
                f'stroke-dasharray="{dashes}"/>'
            )
        marks.append(text(left + 14, top + 18 * (number + 1), name, anchor="start", weight=600, fill=colours[name]))
    marks.append(text(left + wide / 2, top + tall + 40, "share of blocks skipped (dashed: ideal)", fill=FAINT))
    return svg(top + tall + 48, marks, "Speed-up against all gates open, by skip rate")


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most about `most` round numbers from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * size for size in (1, 2, 5, 10) if power * size >= rough)
    return [step * index for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def ratios(low: float, high: float) -> list[float]:
    """Return up to about eight round ratios whose logarithm lies between `low` and `high`; 1 is among them."""
    if high - low > COARSE:
        every = [1 / 2, 1.0, 1.5, *(size * 10.0**power for power in range(7) for size in (2, 5, 10))]
        inside = [ratio for ratio in every if low <= math.log(ratio) <= high]
        return [ratio for ratio in inside if ratio == 1.0 or len(inside) <= 8 or math.log10(ratio) % 1 == 0]
    return [1 + tick for tick in ticks(math.exp(low) - 1, math.exp(high) - 1, 6)]


def _shade(rate: float) -> str:
    mixed = (round(a + (b - a) * rate) for a, b in zip(LIGHT, DARK, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def line(x1: float, y1: float, x2: float, y2: float, stroke: str = GRID, dashes: str = "") -> str:
    """Return a straight line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-dasharray="{dashes}"/>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "middle", fill: str = INK, weight: int = 400) -> str:
    """Return words at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def svg(height: float, marks: Sequence[str], title: str) -> str:
    """Return `marks` as one figure of the usual width."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'font-size="12" font-family="inherit">{"".join(marks)}</svg>'
    )


def standalone(figure: str) -> str:
    """Return a figure as a file of its own: named as SVG, on white, in a common font."""
    opened = figure.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: white" ', 1)
    return opened.replace('font-family="inherit"', 'font-family="Helvetica, Arial, sans-serif"', 1) + "\n"
