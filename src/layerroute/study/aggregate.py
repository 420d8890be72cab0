"""Many runs as a few figures: per variant over its seeds, pure functions of rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from layerroute.config import KINDS
from layerroute.evaluation.metrics import Bootstrap, Interval, accuracy
from layerroute.study.rows import machine_of

DRAWS = 2000
STUDENT = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def aggregate(rows: Sequence[Mapping[str, Any]], reference: str | None) -> dict[str, Any]:
    """Return {variant: {"seeds": [...], "figures": {name: spread_of}}}, variants in the order of `rows`.

    Perplexities under the routers are compared seed by seed, as a share above (below 0: under) the other's:
    `control.{control}.routed_vs.{kind}` with each control of the same adapter, and with a `reference` also
    `ratio.{kind}` with that variant's, over the seeds that both have.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["variant"], []).append(row)
    known = {row["seed"]: row["figures"] for row in grouped.get(reference or "", [])}
    found = {}
    for variant, members in grouped.items():
        own = [_compared(row["figures"], known.get(row["seed"])) for row in members]
        names = list(dict.fromkeys(name for figures in own for name in figures))
        values = {name: [figures.get(name) for figures in own] for name in names}
        found[variant] = {
            "seeds": [row["seed"] for row in members],
            "figures": {name: spread_of(column) for name, column in values.items()},
        }
    return found


def spread_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Return how a figure is spread over seeds: its count, mean, min, max, standard deviation and 95 % interval.

    The interval is Student's of the mean over seeds; None below two seeds. (Resampling so few values never leaves
    their range, and misses the true mean far more often than 5 %: half the time with two.) Seeds without the
    figure do not count.
    """
    given = [value for value in values if value is not None and math.isfinite(value)]
    if not given:
        return {"count": 0, "mean": None, "min": None, "max": None, "spread": None, "low": None, "high": None}
    low, high = _interval(given) if len(given) > 1 else (None, None)
    spread = stdev(given) if len(given) > 1 else None
    return {
        "count": len(given),
        "mean": fmean(given),
        "min": min(given),
        "max": max(given),
        "spread": spread,
        "low": low,
        "high": high,
    }


@dataclass(frozen=True, slots=True)
class Gain:
    """How many more of a task's questions a variant answers right than the reference at the same seed."""

    variant: str
    task: str
    seeds: tuple[int, ...]  # one, or all that both have
    questions: int
    right: float  # share of the questions
    reference: float  # likewise
    gained: Interval  # the difference, paired by question, over conversations


def gains(rows: Sequence[Mapping[str, Any]], reference: str | None, draws: int = DRAWS) -> list[Gain]:
    """Return the gain of each run over the reference, and of each variant over all its seeds where it has several.

    Only answers to the same questions are compared, also where seeds are taken together. Over several seeds a
    question counts by its mean over seeds, so that an interval is over conversations either way; how seeds differ is
    seen in the runs themselves.
    """
    known = {row["seed"]: row.get("answers", {}) for row in rows if row["variant"] == reference}
    shared: dict[tuple[str, str, str], dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for row in rows:
        theirs = known.get(row["seed"], {}) if row["variant"] != reference else {}
        for task, own in row.get("answers", {}).items():
            if task in theirs and theirs[task]["questions"] == own["questions"]:
                shared.setdefault((row["variant"], task, own["questions"]), {})[row["seed"]] = (own, theirs[task])
    found = []
    for (variant, task, _), pairs in shared.items():
        chosen = [(seed,) for seed in pairs] + ([tuple(pairs)] if len(pairs) > 1 else [])
        found += [_gain(variant, task, seeds, [pairs[seed] for seed in seeds], draws) for seeds in chosen]
    return found


def _gain(
    variant: str,
    task: str,
    seeds: tuple[int, ...],
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    draws: int,
) -> Gain:
    own, theirs = (torch.tensor([[bit == "1" for bit in pair[n]["right"]["routed"]] for pair in pairs]) for n in (0, 1))
    right, reference = own.double().mean(dim=0), theirs.double().mean(dim=0)
    bootstrap = Bootstrap.over([str(name) for name in pairs[0][0]["groups"]], draws, seed=0)
    gained = accuracy(right, bootstrap, reference)
    return Gain(variant, task, seeds, len(right), float(right.mean()), float(reference.mean()), gained)


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what makes rows hard to compare: other steps, versions or machines."""
    looks = {
        "measured on different steps": {row["data"]["evaluate"]["hash"] for row in rows},
        "trained on different conversations": {row["data"]["train"]["hash"] for row in rows},
        "made by different commits": {
            f"{row['version'] or 'from source'} {row['commit'] or 'unknown'}" for row in rows
        },
        "made on different machines": {machine_of(row) for row in rows},
    }
    return [f"Runs were {what}: {', '.join(sorted(seen))}." for what, seen in looks.items() if len(seen) > 1]


def _compared(own: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Return a row's figures with its routed perplexities against its controls' and the reference's."""
    found = dict(own)
    for kind in KINDS:
        routed, middle = own[f"perplexity.routed.{kind}"], f".perplexity.{kind}"
        for name in own:
            if name.startswith("control.") and name.endswith(middle):
                found[name.replace(middle, f".routed_vs.{kind}")] = _change(routed, own[name])
        if reference is not None:
            found[f"ratio.{kind}"] = _change(routed, reference[f"perplexity.routed.{kind}"])
    return found


def _change(value: float | None, base: float | None) -> float | None:
    return value / base - 1.0 if value is not None and base else None


def _interval(values: Sequence[float]) -> tuple[float, float]:
    mean, freedom = fmean(values), len(values) - 1
    half = _student(freedom) * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t: tabled, then by its expansion (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
