"""What a training run was begun with, and whether it may go on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from layerroute.config import build, changes, read_yaml, to_dict
from layerroute.errors import ConfigError, DataError
from layerroute.files import read_json, write_json, write_text
from layerroute.models.finding import is_adapter
from layerroute.training.options import TrainConfig
from layerroute.training.trainer import STATE

OPTIONS, DATA, LOG = "config.yaml", "data.json", "train.json"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, or None.

    A run killed while it saved leaves a checkpoint without its last file, or a part of it, which is passed over.
    """
    whole = [path for path in folder.glob("checkpoint-*") if is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: cut off
        return False
    return (checkpoint / STATE).is_file()


def is_finished(folder: Path) -> bool:
    """Tell whether the run in `folder` ended and left its adapter."""
    return (folder / LOG).is_file() and is_adapter(folder / "adapter")


def note(config: TrainConfig, data: Mapping[str, Any]) -> None:
    """Write down what a run is begun with: its options, and what is known of its data and its backbone."""
    write_text(config.folder / OPTIONS, yaml.safe_dump(to_dict(config), sort_keys=False))
    write_json(config.folder / DATA, data)


def check_folder(config: TrainConfig, *, resume: bool, dry_run: bool, checkpoint: Path | None) -> None:
    """Refuse to begin where a run lies, and to go on where none does."""
    if resume and checkpoint is None and not is_finished(config.folder):
        raise ConfigError(f"--resume: no checkpoint in {config.folder / 'checkpoints'}. Start without --resume.")
    if not resume and not dry_run and (is_finished(config.folder) or newest_checkpoint(config.folder / "checkpoints")):
        raise ConfigError(
            f"{config.folder} holds an unfinished or finished run. Go on with --resume, or give another --output."
        )


def check_same_options(config: TrainConfig) -> None:
    """Refuse to go on under other options than the run was begun with."""
    path = config.folder / OPTIONS
    ours = {key: value for key, value in to_dict(config).items() if key != "output"}  # a folder may have been moved
    # What a version before lacked is at its default, which has to be what was done before there was the option.
    begun = {key: value for key, value in to_dict(build(TrainConfig, read_yaml(path))).items() if key != "output"}
    if changed := changes(begun, ours):
        raise ConfigError(
            f"--resume: {config.folder} was begun with other options ({'; '.join(changed)}). "
            f"Go on with --config {path} --resume, or start anew with another --output."
        )


def check_same_data(config: TrainConfig, data: Mapping[str, Any]) -> None:
    """Refuse to go on with other conversations, another order of them, another backbone or other processes."""
    noted = read_json(config.folder / DATA, "Start anew with another --output.")
    begun = {**data, **noted}  # what a version before did not note is taken as it is
    if begun["processes"] != data["processes"]:
        raise ConfigError(
            f"--resume: {config.folder} was begun by {begun['processes']} processes, not {data['processes']}. "
            "Go on with as many, or start anew with another --output."
        )
    names = ", ".join(config.data)
    changed = {
        "hash": f"the conversations of {names} have",
        "order": f"the order of the conversations of {names} has",
        "backbone": f"the weights of {config.model} have",
    }
    for key, what in changed.items():
        if begun[key] != data[key]:
            raise DataError(
                f"--resume: {what} changed since {config.folder} was begun. "
                "Put them back, or start anew with another --output."
            )
