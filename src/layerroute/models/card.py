"""The card of an adapter: the README.md that its folder shows people."""

from collections.abc import Mapping
from typing import Any


def model_card(document: Mapping[str, Any]) -> str:
    """Return the adapter's README: what it is, how to use it, what was measured."""
    rank, bypass = document["config"]["lora"]["rank"], document["config"]["bypass"]["rank"]
    lines = [
        "---",
        "library_name: layerroute",
        f"base_model: {document['base']}",
        "tags: [layerroute, peft, lora, adaptive-depth, tool-calling]",
        "---",
        "",
        f"# LayerRoute adapter for {document['base']}",
        "",
        f"{document['blocks']} routers of {document['hidden'] + 1} parameters; LoRA rank {rank}"
        + (f"; bypasses of closed blocks of rank {bypass}." if bypass else "."),
        "Its routers decide which transformer blocks a step of an agent skips. It fits weights of that backbone with "
        f"fingerprint `{document['fingerprint']}`; others are refused. `--model` names a copy of them elsewhere.",
        "",
        "```",
        "layerroute generate THIS_FOLDER --prompt '...'",
        "```",
        "",
        "The LoRA part alone loads with `PeftModel.from_pretrained(base, THIS_FOLDER)`: all blocks then run.",
    ]
    return "\n".join([*lines, *_measured(document["measured"]), ""])


def _measured(measured: Mapping[str, Any]) -> list[str]:
    """Return the card's tables: perplexity of each kind, and what share of each task is answered right."""
    lines: list[str] = []
    if kinds := measured.get("kinds"):
        lines += [
            "",
            "| kind | skipped, % | perplexity, routed | LoRA, gates open | backbone |",
            "|---|---|---|---|---|",
        ]
        for kind, row in kinds.items():
            modes = (row["perplexity"][mode] for mode in ("routed", "open", "base"))
            lines.append(_line(kind, _percent(row["skip_rate"]), *modes))
        if data := measured.get("data"):
            steps = " and ".join(f"{count:,} of {kind}" for kind, count in data["steps"].items())
            lines += ["", f"Steps: {steps}, split {data['split']} of {', '.join(data['sources'])}."]
    if tasks := measured.get("tasks"):
        lines += ["", "| answered by generating | steps | skipped, % | right, routed, % | right, gates open, % |"]
        lines.append("|---|---|---|---|---|")
        for task, row in tasks.items():
            right = (_percent(row["accuracy"][way]["value"]) for way in ("routed", "open"))
            lines.append(_line(task, str(row["steps"]), _percent(row["skip_rate"]["routed"]), *right))
    return lines


def _line(*cells: str | float | None) -> str:
    words = [cell if isinstance(cell, str) else "-" if cell is None else f"{cell:.3f}" for cell in cells]
    return f"| {' | '.join(words)} |"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
