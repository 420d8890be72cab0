"""The document's figures as words: what the terminal table and the HTML report share."""

from collections.abc import Mapping
from typing import Any

MISSING = "n/a"
NAMES = {"tool_call": "tool calls", "planning": "planning"}
COLUMNS = (
    "kind",
    "steps",
    "skipped",
    "perplexity, routed",
    "perplexity, gates open",
    "perplexity, backbone",
    "routed against open",
    "all FLOPs saved",
    "weight bytes saved",
)
CONTROL_COLUMNS = ("routes by", "tool skip", "perplexity", "planning skip", "perplexity")
CONTROLS = {
    "routed": "routers",
    "open": "all open",
    "random": "random blocks",
    "one_mask": "one static mask",
    "two_masks": "two masks, kind known",
    "two_masks_classifier": "two masks, kind guessed",
}
TASK_COLUMNS = ("task", "steps", "skipped", "right, routed", "right, gates open", "routed less open")
AGAINST_COLUMNS = ("right, against", "routed less against")
TASKS = {
    "tool_calls": "tool calls",
    "irrelevance": "no call where none is due",
    "gsm8k": "worked arithmetic",
    "agent_loop": "whole agent loops",
}
SPEED_COLUMNS = (
    "one row",
    "prefill, routed",
    "prefill, open",
    "speed-up",
    "decode, routed",
    "decode, open",
    "speed-up",
)


def percent(share: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """Write a share as a percentage."""
    if share is None:
        return MISSING
    return f"{100 * share:{'+' if signed else ''}z.{digits}f} %"


def plain(value: float | None, digits: int = 3) -> str:
    """Write a number."""
    return MISSING if value is None else f"{value:.{digits}f}"


def kind_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of cells for each kind, under `COLUMNS`."""
    rows = []
    for kind, row in document["kinds"].items():
        quality = row["perplexity"]
        rows.append(
            [
                NAMES[kind],
                f"{row['steps']:,}",
                percent(row["skip_rate"]),
                *(plain(quality[mode]) for mode in ("routed", "open", "base")),
                _change(row["routed_vs_open"]),
                percent(row["flops_share_skipped"]),
                percent(row["weight_bytes_share_skipped"]),
            ]
        )
    return rows


def control_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of cells for each control, the routers first, under `CONTROL_COLUMNS`; none without controls."""
    if not document["controls"]:
        return []
    kinds = document["kinds"]
    routed = {
        "skip_rate": {kind: row["skip_rate"] for kind, row in kinds.items()},
        "perplexity": {kind: row["perplexity"]["routed"] for kind, row in kinds.items()},
    }
    rows = []
    for name, row in {"routed": routed, **document["controls"]}.items():
        pairs = [(percent(row["skip_rate"][kind]), plain(row["perplexity"][kind])) for kind in NAMES]
        rows.append([CONTROLS.get(name, name), *(cell for pair in pairs for cell in pair)])
    return rows


def task_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of cells for each task, under `TASK_COLUMNS` (and `AGAINST_COLUMNS`); none without tasks."""
    rows = []
    for name, row in document.get("tasks", {}).items():
        again = row.get("fallback_tokens", {}).get("routed")  # reports of before have none
        less = f", less {again:.1f} tokens run again" if again else ""
        cells = [TASKS.get(name, name), f"{row['steps']:,}", percent(row["skip_rate"]["routed"]) + less]
        cells += [_share(row["accuracy"][way]) for way in ("routed", "open")]
        cells.append(_share(row["routed_minus"]["open"], signed=True))
        if "against" in row["accuracy"]:
            cells += [_share(row["accuracy"]["against"]), _share(row["routed_minus"]["against"], signed=True)]
        rows.append(cells)
    return rows


def speed_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of cells for each kind that was timed, under `SPEED_COLUMNS`."""
    rows = []
    for kind, row in document.get("seconds_per_token", {}).items():
        cells = [NAMES[kind]]
        for part in ("prefill", "decode"):
            timed = row[part]
            cells += [f"{1 / timed['routed']:.1f}/s", f"{1 / timed['open']:.1f}/s", f"{timed['speedup']:.3f}x"]
        rows.append(cells)
    return rows


def loop_line(document: Mapping[str, Any]) -> str:
    """Say how much faster whole loops are routed than open; empty where none was timed."""
    timed = document.get("seconds_per_loop")
    if not timed:
        return ""
    return (
        f"{timed['speedup']:.3f}x as fast routed as open ({timed['routed']:.2f} s, {timed['open']:.2f} s), "
        f"{timed['loops']} loops of {timed['turns']} turns in all, one at a time, keys and values kept"
    )


def _share(figure: Mapping[str, Any], *, signed: bool = False) -> str:
    span = "" if figure["low"] is None else f" ({100 * figure['low']:z.1f} to {100 * figure['high']:z.1f})"
    return percent(figure["value"], signed=signed) + span


def _change(change: Mapping[str, Any]) -> str:
    span = "" if change["low"] is None else f" ({100 * change['low']:+z.1f} to {100 * change['high']:+z.1f})"
    return percent(change["relative"], signed=True) + span


def gap_line(gap: Mapping[str, Any] | None) -> str:
    """Write a differential with its interval."""
    if gap is None or gap["points"] is None:
        return MISSING
    span = "" if gap["low"] is None else f" (95 % interval {gap['low']:z.1f} to {gap['high']:z.1f})"
    return f"{gap['points']:z.1f} points{span}"


def headline(document: Mapping[str, Any]) -> str:
    """Say the result in one sentence."""
    tool, planning = (percent(document["kinds"][kind]["skip_rate"]) for kind in NAMES)
    whose = {
        "step": "of block FLOPs",
        "response": "of the response's block FLOPs",
        "continuation": "of the response's block FLOPs after its first token",
    }[document["router"]["scope"]]
    return f"Tool calls skip {tool} {whose}, planning {planning}."


def matched_line(document: Mapping[str, Any]) -> str:
    """Write the length-matched differential and what steps it rests on."""
    matched = document["length_matched"]
    if matched is None:
        return "no context length is shared by both kinds"
    which = "with tools on offer" if matched["tools_offered"] else "with and without tools on offer"
    return f"{gap_line(matched)} on {matched['steps']:,} steps {which}"


def with_tools_line(document: Mapping[str, Any]) -> str:
    """Write what routing does to planning with tools on offer, the planning most like a tool call."""
    row = document["planning_with_tools"]
    if not row["steps"]:
        return "there is none"
    change = _change(row["routed_vs_open"])
    return f"{row['steps']:,} planning steps skip {percent(row['skip_rate'])}, perplexity {change}"
