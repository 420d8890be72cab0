"""A study's results on disk: the rows, their aggregates, a Markdown page and its figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerroute.evaluation.cells import CONTROLS, MISSING, NAMES, TASKS
from layerroute.evaluation.drawing import standalone
from layerroute.files import write_json, write_text
from layerroute.study.aggregate import aggregate, gains, notes
from layerroute.study.options import Study
from layerroute.study.plots import frontier, per_seed
from layerroute.study.rows import FORMAT, WITH_TOOLS, machine_of, read_row

PAGE, ROWS = "results.md", "results.json"


def write_results(study: Study) -> dict[str, Any]:
    """Write what the finished runs of a study give, and return it. Nothing is written while none is finished."""
    rows = [row for run in study.runs if (row := read_row(run)) is not None]
    document: dict[str, Any] = {
        "format": FORMAT,
        "reference": study.options.reference,
        "runs": {"planned": len(study.runs), "finished": len(rows)},
        "notes": notes(rows),
        "aggregates": aggregate(rows, study.options.reference),
        "gains": [asdict(gain) for gain in gains(rows, study.options.reference)],
        "rows": rows,
    }
    if rows:
        write_json(study.folder / ROWS, document)
        quality = ("ratio", study.options.reference) if study.options.reference else ("routed_vs_open", "gates open")
        write_text(study.folder / "frontier.svg", standalone(frontier(document["aggregates"], *quality)))
        write_text(study.folder / "differential.svg", standalone(per_seed(rows)))
        write_text(study.folder / PAGE, page(document, study.folder))
    return document


def page(document: Mapping[str, Any], folder: Path) -> str:
    """Return the results as Markdown."""
    runs, rows, aggregates = document["runs"], document["rows"], document["aggregates"]
    data = rows[0]["data"]["evaluate"]
    lines = [
        f"# Results of {folder.name}",
        "",
        f"{runs['finished']} of {runs['planned']} runs. Test steps: {_counts(data['steps'])} of "
        f"{data['conversations']:,} conversations ({', '.join(data['sources'])}, split {data['split']}, "
        f"hash {data['hash']}). Machine: {machine_of(rows[0])}, {rows[0]['machine']['threads']} threads. "
        f"layerroute {rows[0]['version'] or 'from source'}, commit {rows[0]['commit'] or 'unknown'}.",
        "",
        "Each figure is the mean over seeds; in brackets the 95 % interval of that mean (Student's t over seeds). "
        "*Against gates open* compares with the same adapter with every gate open"
        + (
            f", *against `{document['reference']}`* with that variant at the same seed."
            if document["reference"]
            else "."
        ),
        "",
        *(f"- {note}" for note in document["notes"]),
        *([""] if document["notes"] else []),
        *_table(_COLUMNS + _reference_columns(document), [_row(v, a, document) for v, a in aggregates.items()]),
        "",
        *_with_tools(aggregates),
        *_controls(aggregates),
        *_tasks(aggregates),
        *_gains(document),
        "Each run that skips anything, with its 95 % bootstrap intervals over test conversations:",
        "",
        *_table(_RUN_COLUMNS, [_run(row) for row in rows if any(row["figures"][f"skip.{kind}"] for kind in NAMES)]),
        "",
        "![Quality against skipping](frontier.svg)",
        "",
        "![Differential of every run](differential.svg)",
        "",
        "Every run with its options, seed and data hash: `results.json`; one run alone: "
        "`layerroute train --config VARIANT/seed-N/config.yaml --output ELSEWHERE`.",
    ]
    return "\n".join([*lines, ""])


_COLUMNS = [
    "variant",
    "seeds",
    "tool calls skip",
    "planning skips",
    "differential",
    "least to most",
    "length-matched",
    "tool calls against gates open",
    "planning against gates open",
]


_RUN_COLUMNS = ["variant", "seed", *_COLUMNS[2:5], *_COLUMNS[6:]]


def _run(row: Mapping[str, Any]) -> list[str]:
    def own(name: str) -> dict[str, Any]:
        low, high = row.get("intervals", {}).get(name, (None, None))  # rows of before have none
        return {"mean": row["figures"][name], "low": low, "high": high}

    return [
        f"`{row['variant']}`",
        str(row["seed"]),
        *(_share(own(f"skip.{kind}")) for kind in NAMES),
        *(_points(own(name)) for name in ("differential", "length_matched")),
        *(_share(own(f"routed_vs_open.{kind}"), signed=True) for kind in NAMES),
    ]


def _reference_columns(document: Mapping[str, Any]) -> list[str]:
    reference = document["reference"]
    return [f"{name} against `{reference}`" for name in NAMES.values()] if reference else []


def _row(variant: str, own: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    figures = own["figures"]
    gap = figures["differential"]
    cells = [
        f"`{variant}`",
        str(len(own["seeds"])),
        *(_share(figures[f"skip.{kind}"]) for kind in NAMES),
        _points(gap),
        MISSING if gap["min"] is None else f"{gap['min']:.1f} to {gap['max']:.1f}",
        _points(figures["length_matched"]),
        *(_share(figures[f"routed_vs_open.{kind}"], signed=True) for kind in NAMES),
    ]
    if document["reference"]:
        cells += [_share(figures.get(f"ratio.{kind}"), signed=True) for kind in NAMES]
    return cells


def _with_tools(aggregates: Mapping[str, Any]) -> list[str]:
    """Return what becomes of planning with tools on offer; rows made before that was measured have no such figures."""
    rows = []
    for variant, own in aggregates.items():
        skip, change = (own["figures"].get(f"{figure}.{WITH_TOOLS}") for figure in ("skip", "routed_vs_open"))
        if skip and skip["count"]:
            rows.append([f"`{variant}`", _share(skip), _share(change, signed=True)])
    if not rows:
        return []
    columns = ["variant", "skips", "perplexity against gates open"]
    return ["Planning with tools on offer, the planning most like a tool call:", "", *_table(columns, rows), ""]


def _controls(aggregates: Mapping[str, Any]) -> list[str]:
    """Return the controls at equal budget of the variants that have some."""
    rows = []
    for variant, own in aggregates.items():
        figures = own["figures"]
        names = list(dict.fromkeys(name.split(".")[1] for name in figures if name.startswith("control.")))
        for name in ["routed", *names] if names else []:
            cells = []
            for kind in NAMES:
                if name == "routed":
                    found = figures[f"skip.{kind}"], figures[f"perplexity.routed.{kind}"], None
                else:
                    prefix = f"control.{name}"
                    found = tuple(
                        figures[f"{prefix}.{figure}.{kind}"] for figure in ("skip", "perplexity", "routed_vs")
                    )
                cells += [_share(found[0]), _number(found[1]), _share(found[2], signed=True)]
            rows.append([f"`{variant}`", CONTROLS.get(name, name), *cells])
    if not rows:
        return []
    measured = ["perplexity", "routers against it"]
    columns = ["variant", "routes by", "tool calls skip", *measured, "planning skips", *measured]
    return [
        "Controls at equal budget, same adapter; a mask closes whole blocks, as many as are nearest to the rate. "
        "*Routers against it*: their perplexity against the control's at the same seed, below 0 where routers are "
        "better:",
        "",
        *_table(columns, rows),
        "",
    ]


def _tasks(aggregates: Mapping[str, Any]) -> list[str]:
    """Return the tasks of the variants that answered some."""
    rows = []
    for variant, own in aggregates.items():
        figures = own["figures"]
        names = [name.split(".")[1] for name in figures if name.startswith("task.") and name.endswith(".skip")]
        for name in names:
            prefix = f"task.{name}."
            right = [_share(figures[f"{prefix}{way}"]) for way in ("routed", "open")]
            gained = _share(figures[f"{prefix}routed_minus.open"], signed=True)
            rows.append([f"`{variant}`", TASKS.get(name, name), _share(figures[f"{prefix}skip"]), *right, gained])
    if not rows:
        return []
    columns = ["variant", "task", "skipped", "right, routed", "right, gates open", "routed less open"]
    return ["Tasks answered by generating under real skipping:", "", *_table(columns, rows), ""]


def _gains(document: Mapping[str, Any]) -> list[str]:
    """Return how many more questions are answered right than by the reference, run by run."""
    if not document["gains"]:
        return []
    rows = []
    for gain in document["gains"]:
        spread = {"mean": gain["gained"]["value"], "low": gain["gained"]["low"], "high": gain["gained"]["high"]}
        cells = [TASKS.get(gain["task"], gain["task"]), str(gain["questions"])]
        shares = [f"{100 * gain[way]:.1f} %" for way in ("right", "reference")]
        seeds = ", ".join(str(seed) for seed in gain["seeds"])
        rows.append([f"`{gain['variant']}`", *cells, seeds, *shares, _spread(spread, 100.0, 1, "", "+")])
    reference = document["reference"]
    columns = [
        "variant",
        "task",
        "questions",
        "seeds",
        "right, routed",
        f"right, `{reference}`",
        "difference in points",
    ]
    note = (
        f"The same questions answered by `{reference}` at the same seed; the difference is paired by question, with "
        "its 95 % bootstrap interval over conversations:"
    )
    return [note, "", *_table(columns, rows), ""]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _share(figure: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    return _spread(figure, 100.0, 1, " %", "+" if signed else "")


def _points(figure: Mapping[str, Any]) -> str:
    return _spread(figure, 1.0, 1, "", "")


def _number(figure: Mapping[str, Any]) -> str:
    return _spread(figure, 1.0, 3, "", "")


def _spread(figure: Mapping[str, Any] | None, scale: float, digits: int, unit: str, sign: str) -> str:
    if figure is None or figure["mean"] is None:
        return MISSING
    mean = f"{scale * figure['mean']:{sign}z.{digits}f}{unit}"
    if figure["low"] is None:
        return mean
    return f"{mean} ({scale * figure['low']:{sign}z.{digits}f} to {scale * figure['high']:{sign}z.{digits}f})"


def _counts(steps: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {NAMES[kind]}" for kind, count in steps.items())
