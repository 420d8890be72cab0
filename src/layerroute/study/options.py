"""What a study is: a base, its variants, its seeds, and the runs that follow from them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerroute.config import build, leaves, option, read_yaml, require, to_dict
from layerroute.errors import ConfigError, near
from layerroute.evaluation.options import EvaluationConfig
from layerroute.files import expanded
from layerroute.training.options import PRESETS, TrainConfig

SECTIONS = ("train", "evaluate", "variants")
VARIANT_KEYS = ("preset", "seeds", "train", "evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """The options of a study, beside its sections `train`, `evaluate` and `variants`."""

    output: str = option("runs/study", "Folder of the study: one folder a run, results.json, results.md, figures.")
    preset: str = option("budget", "Recipe that the base starts from; a variant may name another.")
    seeds: tuple[int, ...] = option((0,), "Seeds of every variant that does not name its own.")
    reference: str | None = option(None, "Variant whose perplexity at the same seed the others are divided by.")

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds", self.seeds, "at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each seed once")


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One run of a study: a variant with a seed."""

    variant: str
    seed: int
    train: TrainConfig
    evaluate: EvaluationConfig

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        return f"{self.variant}/{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.train.folder

    @property
    def options(self) -> dict[str, Any]:
        """All that decides its outcome, as plain data: where it writes is not part of it."""
        return _plain(self.train, self.evaluate)


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run that an earlier version wrote down, those that it lacked at their defaults.

    A new option's default has to be what was done before there was one.

    Raises:
        ConfigError: it had an option that is no more.
    """
    return _plain(build(TrainConfig, options["train"]), build(EvaluationConfig, options["evaluate"]))


def _plain(train: TrainConfig, evaluate: EvaluationConfig) -> dict[str, Any]:
    kept = {key: value for key, value in to_dict(train).items() if key != "output"}
    return {"train": kept, "evaluate": to_dict(evaluate)}


@dataclass(frozen=True, slots=True)
class Study:
    """A study as its file declares it."""

    options: StudyConfig
    runs: tuple[StudyRun, ...]

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        return expanded(self.options.output)

    def only(self, names: Sequence[str]) -> tuple[StudyRun, ...]:
        """Return the runs that `names` choose, `variant` or `variant/seed` each; all where there are none.

        Raises:
            ConfigError: a name that chooses no run.
        """
        for name in names:
            if not any(name in (run.variant, run.name) for run in self.runs):
                known = {run.name for run in self.runs} | {run.variant for run in self.runs}
                raise ConfigError(f"--only: {name!r} is no run of this study.{near(name, known)}")
        return tuple(run for run in self.runs if not names or {run.variant, run.name} & set(names))


def read_study(path: Path, *, output: str | None = None, data: str | None = None) -> Study:
    """Read a study from its YAML file.

    Args:
        path: the file.
        output: a folder to use instead of the one it names.
        data: sources, comma-separated, to train and evaluate on instead of those it names.

    Raises:
        ConfigError: an unknown key, a value that is not allowed, or no variant; the message names the file.
    """
    document = read_yaml(path)
    try:
        return _study(document, {"output": output} if output else {}, {} if data is None else {"data": data})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _study(document: Mapping[str, Any], given: Mapping[str, Any], sources: Mapping[str, Any]) -> Study:
    known = [*SECTIONS, *leaves(StudyConfig)]
    for key in document:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}.{near(str(key), known)}")
    own = {key: value for key, value in document.items() if key not in SECTIONS}
    options = build(StudyConfig, own, given)
    variants = {str(name): each for name, each in _mapping(document.get("variants"), "variants").items()}
    if not variants:
        raise ConfigError("variants: none is declared. Give at least one, e.g. `variants: {budget: {}}`.")
    if options.reference is not None and options.reference not in variants:
        raise ConfigError(f"reference: {options.reference!r} is no variant.{near(options.reference, variants)}")
    base = {key: _mapping(document.get(key), key) for key in ("train", "evaluate")}
    runs = [run for name, variant in variants.items() for run in _runs(options, base, name, variant, sources)]
    return Study(options, tuple(runs))


def _runs(
    options: StudyConfig, base: Mapping[str, Any], name: str, declared: Any, sources: Mapping[str, Any]
) -> list[StudyRun]:
    where = f"variants.{name}"
    if not re.fullmatch(r"[\w.-]*\w", name):
        raise ConfigError(f"{where}: a variant's name is a folder; use letters, digits, '.', '-' and '_'.")
    variant = _mapping(declared, where)
    for key in variant:
        if key not in VARIANT_KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}.{near(str(key), VARIANT_KEYS)}")
    seeds = build(StudyConfig, {"seeds": variant["seeds"]}).seeds if "seeds" in variant else options.seeds
    train = _layers(options, base["train"], variant, where)
    runs = []
    for seed in seeds:
        placed = {"seed": seed, "output": str(Path(options.output) / name / f"seed-{seed}")}
        measured = (base["evaluate"], _mapping(variant.get("evaluate"), f"{where}.evaluate"), sources)
        try:
            resolved = build(TrainConfig, *train, sources, placed), build(EvaluationConfig, *measured)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        runs.append(StudyRun(name, seed, *resolved))
    return runs


def _layers(
    options: StudyConfig, base: Mapping[str, Any], variant: Mapping[str, Any], where: str
) -> list[Mapping[str, Any]]:
    """Return what the variant's training is built from, later layers winning.

    The study's preset lies under the base. A preset that the variant names itself takes its place and lies over the
    base, so that the variant is that recipe and shares with the others what the recipe leaves open.
    """
    for place in ("output", "seed"):
        if place in base or place in _mapping(variant.get("train"), f"{where}.train"):
            raise ConfigError(f"train.{place}: a study sets this for each run. Give the study's own key instead.")
    own = _mapping(variant.get("train"), f"{where}.train")
    preset = str(variant.get("preset", options.preset))
    if preset not in PRESETS:
        raise ConfigError(f"{where}: preset {preset!r} is unknown.{near(preset, PRESETS)}")
    return [base, PRESETS[preset], own] if "preset" in variant else [PRESETS[preset], base, own]


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping of options, found {type(value).__name__}.")
    return value
