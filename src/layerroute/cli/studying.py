"""`layerroute study`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from layerroute.study.options import Study, read_study


def plan(
    config: Path, *, output: str | None, data: str | None, only: Sequence[str], known: Path | None, as_json: bool
) -> None:
    """Print the runs of a study and how far each is; nothing is written."""
    from layerroute.study.rows import known_rows
    from layerroute.study.running import check_unchanged, state_of

    study = read_study(config, output=output, data=data)
    runs = study.only(only)
    for run in runs:
        check_unchanged(run)
    done = known_rows(known, runs) if known is not None else {}
    rows = [
        {
            "run": run.name,
            "state": "known" if run.name in done else state_of(run),
            "updates": run.train.steps,
            "folder": str(run.folder),
        }
        for run in runs
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(run.name) for run in runs)
    for row in rows:
        print(f"{row['run']:<{width}}  {row['state']:<8}  {row['updates']} updates  {row['folder']}")


def carry_out(
    config: Path,
    *,
    output: str | None,
    data: str | None,
    only: Sequence[str],
    known: Path | None,
    as_json: bool,
    say: Callable[[str], None],
) -> bool:
    """Do what is left of a study and print its table or its document; return False if it was stopped."""
    from layerroute.study.results import PAGE, write_results
    from layerroute.study.rows import take_over
    from layerroute.study.running import run_study

    study: Study = read_study(config, output=output, data=data)
    if known is not None:
        say(f"{known}: {take_over(known, study.runs)} runs of this study taken over")
    whole = run_study(study, only, say=say)
    document = write_results(study)
    if as_json:
        print(json.dumps(document, indent=2))
    elif document["rows"]:
        print(study.folder / PAGE)
    return whole
