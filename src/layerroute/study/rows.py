"""One run as one row: what came out, and all that is needed to repeat it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerroute.config import KINDS
from layerroute.errors import ConfigError, LayerRouteError
from layerroute.files import read_json, write_json
from layerroute.machine import commit, describe_machine
from layerroute.study.options import StudyRun, completed
from layerroute.training.resuming import newest_checkpoint

FORMAT = 1
ROW = "row.json"
MARK = "study.json"  # the options a run's folder was begun with, and the time spent on it
WITH_TOOLS = "planning_with_tools"  # the name in figures of planning with tools on offer


def row_of(run: StudyRun, log: Mapping[str, Any], report: Mapping[str, Any], trained_seconds: float) -> dict[str, Any]:
    """Return the row of a finished run, ready for JSON.

    Args:
        run: the run.
        log: its train.json.
        report: the evaluation's document.
        trained_seconds: training time over all the processes that worked on it.
    """
    machine = describe_machine()
    return {
        "format": FORMAT,
        "variant": run.variant,
        "seed": run.seed,
        "figures": figures_of(report),
        "intervals": intervals_of(report),
        "answers": {name: task["answers"] for name, task in report.get("tasks", {}).items()},
        "settled": log.get("settled"),
        "options": run.options,
        "data": {"train": log["data"], "evaluate": report["data"]},
        "version": machine["layerroute"],
        "commit": commit(),
        "machine": machine,
        "seconds": {"train": trained_seconds, "evaluate": report["seconds"]},
    }


def figures_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return an evaluation's figures flat, by dotted name."""
    matched = report["length_matched"]
    found: dict[str, float | None] = {
        "differential": report["differential"]["points"],
        "length_matched": matched["points"] if matched else None,
    }
    for name, row in _qualities(report).items():
        found[f"skip.{name}"] = row["skip_rate"]
        found |= {f"perplexity.{mode}.{name}": value for mode, value in row["perplexity"].items()}
        found[f"routed_vs_open.{name}"] = row["routed_vs_open"]["relative"]
    for kind, row in report["kinds"].items():
        found[f"flops_saved.{kind}"] = row["flops_share_skipped"]
        found[f"bytes_saved.{kind}"] = row["weight_bytes_share_skipped"]
    for name, control in report["controls"].items():
        for kind in KINDS:
            found[f"control.{name}.skip.{kind}"] = control["skip_rate"][kind]
            found[f"control.{name}.perplexity.{kind}"] = control["perplexity"][kind]
    for name, task in report.get("tasks", {}).items():
        found |= {f"task.{name}.{way}": share["value"] for way, share in task["accuracy"].items()}
        found |= {f"task.{name}.routed_minus.{way}": gain["value"] for way, gain in task["routed_minus"].items()}
        found[f"task.{name}.skip"] = task["skip_rate"]["routed"]
    return found


def intervals_of(report: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return the 95 % intervals within an evaluation, over its conversations, by the names of their figures."""
    found = {"differential": report["differential"]}
    if report["length_matched"]:
        found["length_matched"] = report["length_matched"]
    found |= {f"routed_vs_open.{name}": row["routed_vs_open"] for name, row in _qualities(report).items()}
    return {name: [interval["low"], interval["high"]] for name, interval in found.items()}


def _qualities(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quality of each kind, and of planning with tools on offer."""
    return {**report["kinds"], WITH_TOOLS: report[WITH_TOOLS]}


def machine_of(row: Mapping[str, Any]) -> str:
    """Return what computed a row: the GPU if there was one, else the processor."""
    machine = row["machine"]
    return str(machine.get("gpu") or machine["processor"])


def read_row(run: StudyRun) -> dict[str, Any] | None:
    """Return the row of `run` if it is finished.

    Raises:
        LayerRouteError: the row is there and damaged.
    """
    return read_json(run.folder / ROW, "Remove it, and the run is measured again.") or None


def begun(run: StudyRun) -> bool:
    """Tell whether `run` was measured, or anything of it trained."""
    trained = (run.folder / MARK).exists() and newest_checkpoint(run.folder / "checkpoints") is not None
    return trained or read_row(run) is not None


def known_rows(path: Path, runs: Sequence[StudyRun]) -> dict[str, dict[str, Any]]:
    """Return, by name, the rows of a study's results.json that belong to those of `runs` that are not begun.

    A row is a run's if variant, seed and all options are the same; one that the row's version lacked must be at its
    default.

    Raises:
        LayerRouteError: no such file, or not a study's results.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        known = {(row["variant"], row["seed"]): row for row in rows}
        there = [run for run in runs if (run.variant, run.seed) in known]
        same = [run for run in there if _is_of(run, known[run.variant, run.seed]["options"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerRouteError(f"{path}: no results of a study ({error!r}). Give a results.json.") from error
    return {run.name: known[run.variant, run.seed] for run in same if not begun(run)}


def _is_of(run: StudyRun, options: Mapping[str, Any]) -> bool:
    try:
        return completed(options) == run.options
    except ConfigError:  # an option that is no more
        return False


def take_over(path: Path, runs: Sequence[StudyRun]) -> int:
    """Write `known_rows` into their runs' folders, so that they count as finished; return how many there were."""
    known = known_rows(path, runs)
    for run in runs:
        if run.name in known:
            write_json(run.folder / ROW, known[run.name])
    return len(known)
