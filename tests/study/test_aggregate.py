"""Figures over seeds."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerroute.config import KINDS
from layerroute.study.aggregate import aggregate, gains, notes, spread_of
from layerroute.study.plots import frontier
from layerroute.study.rows import figures_of

numbers = st.floats(-100, 100, allow_nan=False)


def row(variant, seed, routed=(1.0, 2.0), gap=10.0, **other):
    figures = {"differential": gap, "perplexity.routed.tool_call": routed[0], "perplexity.routed.planning": routed[1]}
    data = {"train": {"hash": "t"}, "evaluate": {"hash": "e"}}
    whole = {"variant": variant, "seed": seed, "figures": figures, "data": data, "version": "1", "commit": "c"}
    return whole | {"machine": {"processor": "p"}} | other


def test_a_spread_is_that_of_its_values():
    found = spread_of([1.0, None, 4.0, 7.0])
    assert found["count"] == 3
    assert (found["mean"], found["min"], found["max"]) == (4.0, 1.0, 7.0)
    assert found["spread"] == pytest.approx(3.0)


@given(st.lists(numbers, min_size=2, max_size=12))
def test_the_interval_lies_evenly_around_the_mean(values):
    found = spread_of(values)
    assert found["low"] <= found["mean"] <= found["high"]
    assert found["high"] - found["mean"] == pytest.approx(found["mean"] - found["low"])


@pytest.mark.parametrize(
    ("seeds", "errors"), [(2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (21, 2.086), (41, 2.021), (1001, 1.962)]
)
def test_the_interval_is_students(seeds, errors):
    found = spread_of([float(seed) for seed in range(seeds)])
    half = (found["high"] - found["low"]) / 2
    assert half * seeds**0.5 / found["spread"] == pytest.approx(errors, abs=6e-4)


def test_one_seed_gives_no_interval_and_none_gives_nothing():
    assert spread_of([3.0]) == {
        "count": 1,
        "mean": 3.0,
        "min": 3.0,
        "max": 3.0,
        "spread": None,
        "low": None,
        "high": None,
    }
    assert spread_of([None])["mean"] is None


def test_the_ratio_is_paired_by_seed():
    rows = [row("open", 0, (2.0, 1.0)), row("open", 1, (4.0, 1.0))]
    rows += [row("budget", 1, (5.0, 1.0)), row("budget", 0, (3.0, 1.0)), row("budget", 2, (9.0, 1.0))]
    figures = aggregate(rows, "open")["budget"]["figures"]
    assert figures["ratio.tool_call"]["count"] == 2  # seed 2 has no reference
    assert figures["ratio.tool_call"]["mean"] == pytest.approx((3 / 2 + 5 / 4) / 2 - 1)
    assert figures["ratio.planning"]["mean"] == 0.0
    assert "ratio.tool_call" not in aggregate(rows, None)["budget"]["figures"]


def test_routers_are_compared_with_their_own_controls_seed_by_seed():
    rows = [row("budget", 0, (3.0, 1.0)), row("budget", 1, (5.0, 2.0)), row("budget", 2, (5.0, 2.0))]
    for at, (calls, planning) in zip(rows, [(2.0, 2.0), (4.0, None)], strict=False):
        mask = {"control.one_mask.perplexity.tool_call": calls, "control.one_mask.perplexity.planning": planning}
        at["figures"] |= mask
    figures = aggregate(rows, None)["budget"]["figures"]
    assert figures["control.one_mask.routed_vs.tool_call"]["mean"] == pytest.approx((3 / 2 + 5 / 4) / 2 - 1)
    assert figures["control.one_mask.routed_vs.planning"]["mean"] == -0.5
    assert figures["control.one_mask.routed_vs.planning"]["count"] == 1


def answered(variant, seed, right, questions="these"):
    right = {"routed": right, "open": "1111"}
    answers = {"tool_calls": {"questions": questions, "groups": [0, 0, 1, 2], "right": right}}
    return row(variant, seed, answers=answers)


def test_gains_are_paired_by_question_and_seed():
    rows = [answered("open", 0, "1100"), answered("open", 1, "1111"), row("old", 0)]
    rows += [answered("budget", 1, "1110"), answered("budget", 0, "1111"), answered("budget", 2, "0000")]
    rows += [answered("other", 0, "1111", questions="others")]
    found = {gain.seeds: gain for gain in gains(rows, "open")}
    assert {gain.variant for gain in found.values()} == {"budget"}
    assert found.keys() == {(1,), (0,), (1, 0)}
    assert (found[0,].right, found[0,].reference, found[0,].gained.value) == (1.0, 0.5, 0.5)
    assert found[1,].gained.value == -0.25
    assert found[1, 0].gained.value == pytest.approx((0.5 - 0.25) / 2)
    assert found[1, 0].questions == 4
    assert found[0,].gained.low < 0.5 < found[0,].gained.high
    assert gains(rows, None) == []
    rows += [answered("open", 3, "1111", "grown"), answered("budget", 3, "1110", "grown")]  # a file grew between seeds
    assert {gain.seeds: gain for gain in gains(rows, "open") if gain.seeds != (3,)} == found


def test_rows_that_are_hard_to_compare_are_noted():
    assert notes([row("a", 0), row("a", 1)]) == []
    said = notes([row("a", 0), row("a", 1, commit="d", data={"train": {"hash": "t"}, "evaluate": {"hash": "f"}})])
    assert len(said) == 2
    assert any("different steps: e, f" in line for line in said)
    said = notes([row("a", 0), row("a", 1, machine={"processor": "p", "gpu": "g"})])
    assert said == ["Runs were made on different machines: g, p."]


def test_far_marks_leave_the_frontier_and_are_named_below_it():
    def at(skip, worse):
        spreads = {name: {"mean": v, "min": v, "max": v, "count": 1} for name, v in (("skip", skip), ("ratio", worse))}
        return {"figures": {f"{name}.{kind}": spread for name, spread in spreads.items() for kind in KINDS}}

    near, far = {"mild": at(0.2, 0.05)}, {"wild": at(0.1, 4.0)}
    assert "beyond" not in frontier(near, "ratio", "open")
    both = frontier(near | far, "ratio", "open")
    assert "beyond: wild, tool calls: 5.0x at 10.0 %; wild, planning: 5.0x at 10.0 %" in both
    assert "+5 %" in both  # the axis is that of the near marks
    assert "beyond" not in frontier(far, "ratio", "open")
    many = frontier(near | {f"variant-{number}": at(0.1, 4.0) for number in range(6)}, "ratio", "open")
    assert all(len(words) <= 120 for words in re.findall(r">([^<]+)<", many))
    tall, low = (int(re.findall(r'viewBox="0 0 \d+ (\d+)"', picture)[0]) for picture in (many, both))
    assert tall > low  # there is room for every line


def test_what_is_not_finite_is_no_figure():
    assert spread_of([1.0, math.inf, math.nan, 3.0])["count"] == 2


def test_gains_are_drawn_over_conversations():
    rows = [answered("open", 0, "1100"), answered("budget", 0, "1111")]
    for row in rows:
        row["answers"]["tool_calls"]["groups"] = [0, 0, 0, 0]
    (gain,) = gains(rows, "open")
    assert (gain.gained.value, gain.gained.low) == (0.5, None)  # of one conversation


def test_figures_are_those_of_the_report():
    quality = {
        "skip_rate": 0.1, "perplexity": {"routed": 2.0}, "routed_vs_open": {"relative": 0.2},
        "flops_share_skipped": 0.3, "weight_bytes_share_skipped": 0.4,
    }  # fmt: skip
    report = {
        "length_matched": None, "differential": {"points": 5.0}, "planning_with_tools": quality,
        "kinds": {"tool_call": quality}, "controls": {},
    }  # fmt: skip
    found = figures_of(report)
    assert (found["flops_saved.tool_call"], found["bytes_saved.tool_call"]) == (0.3, 0.4)
    assert (found["differential"], found["length_matched"], found["routed_vs_open.tool_call"]) == (5.0, None, 0.2)
