"""A study, top to bottom: each run is trained, measured and kept; what is finished is not done again."""

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from layerroute.config import changes
from layerroute.errors import ConfigError, LayerRouteError
from layerroute.evaluation.run import evaluate_adapter
from layerroute.files import read_json, write_json
from layerroute.study.options import Study, StudyRun, completed
from layerroute.study.results import write_results
from layerroute.study.rows import MARK, ROW, read_row, row_of
from layerroute.training.resuming import LOG, is_finished, newest_checkpoint
from layerroute.training.run import train

State = Literal["new", "begun", "trained", "finished"]
Say = Callable[[str], None]


def run_study(study: Study, only: Sequence[str] = (), *, say: Say = lambda _: None) -> bool:
    """Do what is left of a study and write its results; return False if it was stopped (the same call goes on).

    Args:
        study: the study.
        only: runs to do, `variant` or `variant/seed` each; all where empty.
        say: called with lines of progress.

    Raises:
        ConfigError: a run's folder was begun with other options; nothing is run then.
        LayerRouteError: a run can't be trained or measured. Runs finished before stay.
    """
    chosen = study.only(only)
    for run in study.runs:
        check_unchanged(run)
    todo = [run for run in chosen if state_of(run) != "finished"]
    say(f"study {study.folder}: {len(chosen)} runs, {len(chosen) - len(todo)} finished before")
    write_results(study)
    began = time.perf_counter()
    for number, run in enumerate(todo):
        left = "" if not number else f", about {_span(time.perf_counter() - began, number, len(todo))} to go"
        say(f"run {number + 1} of {len(todo)}: {run.name} ({state_of(run)}){left}")
        with _held(run.folder) as ours:
            if not ours:
                say(f"{run.name}: another process works on it; passed over")
                continue
            if not do_run(run, study.folder, say):
                say("study stopped; the same command goes on")
                return False
        write_results(study)
    return True


def do_run(run: StudyRun, folder: Path, say: Say = lambda _: None) -> bool:
    """Train and measure one run from wherever it stands; return False if it was stopped.

    Args:
        run: the run.
        folder: where the backbone's own scores are kept for the study's other runs.
        say: called with lines of progress.
    """
    if state_of(run) in ("new", "begun"):
        resume = newest_checkpoint(run.folder / "checkpoints") is not None
        before = _mark(run).get("seconds", 0.0)
        write_json(run.folder / MARK, {"options": run.options, "seconds": before})
        done = train(run.train, resume=resume, say=say)
        _spend(run, before + done.seconds)
        if not done.finished:
            return False
    if state_of(run) == "trained":
        page = run.folder / "report.html"
        report = evaluate_adapter(run.folder / "adapter", run.evaluate, report=page, save=True, folder=folder, say=say)
        log = read_json(run.folder / LOG, "Remove the folder, and the run starts again.")
        write_json(run.folder / ROW, row_of(run, log, report, _mark(run).get("seconds", 0.0)))
    return True


def state_of(run: StudyRun) -> State:
    """Return how far a run is, told from what lies in its folder."""
    if read_row(run) is not None:
        return "finished"
    if is_finished(run.folder):
        return "trained"
    return "begun" if newest_checkpoint(run.folder / "checkpoints") else "new"


def check_unchanged(run: StudyRun) -> None:
    """Refuse to go on with a run under other options than it was begun with.

    Raises:
        ConfigError: which options differ, and how to go on.
    """
    row = read_row(run)
    kept = _mark(run).get("options") or (row and row["options"])  # a row taken over has no mark
    if kept is None:
        if newest_checkpoint(run.folder / "checkpoints"):
            raise ConfigError(f"{run.folder}: holds a run that no study began. Give another output, or remove it.")
        return
    try:
        kept = completed(kept)
        measured = completed(row["options"]) if row is not None else None
    except ConfigError as error:
        raise ConfigError(
            f"{run.name}: {run.folder} was begun by another version ({error}) "
            "Give another output, or remove that folder."
        ) from error
    if changed := changes(kept["train"], run.options["train"]):
        raise ConfigError(
            f"{run.name}: {run.folder} was begun with other options ({'; '.join(changed)}). "
            "Set them back, give another output, or remove that folder."
        )
    if measured is None:
        return
    if changes(measured["train"], run.options["train"]):
        raise ConfigError(f"{run.name}: {run.folder / ROW} is of a run with other options. Remove it.")
    if changed := changes(measured["evaluate"], run.options["evaluate"]):
        raise ConfigError(
            f"{run.name}: {run.folder} was measured with other options ({'; '.join(changed)}). "
            f"Set them back, or remove its {ROW} to measure again."
        )


def _mark(run: StudyRun) -> dict[str, Any]:
    return read_json(run.folder / MARK, "Remove the folder, and the run starts again.")


def _spend(run: StudyRun, seconds: float) -> None:
    write_json(run.folder / MARK, _mark(run) | {"seconds": seconds})


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a run's folder while working in it; False if another process does. The system lets go if we die."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise LayerRouteError(f"{folder}: can't be written ({error.strerror}). Give another --output.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise LayerRouteError(
                f"{folder}: its file system knows no locks ({error.strerror}), by which processes share a study out. "
                "Give an --output on another one."
            ) from error
        yield True


def _span(seconds: float, done: int, wanted: int) -> str:
    left = seconds / done * (wanted - done)
    return f"{left / 3600:.1f} h" if left >= 5400 else f"{left / 60:.0f} min"
