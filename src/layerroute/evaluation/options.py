"""The options of an evaluation."""

import math
from dataclasses import dataclass
from typing import Literal

from layerroute.config import Dtype, option, require
from layerroute.errors import ConfigError

Control = Literal["open", "random", "one_mask", "two_masks", "two_masks_classifier"]
Task = Literal["tool_calls", "irrelevance", "gsm8k", "agent_loop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What is measured, on which steps, and how closely."""

    data: tuple[str, ...] = option(("builtin",), "Transcripts: files, folders, hf:owner/name, or `builtin[:[A-]N]`.")
    split: Literal["train", "validation", "test"] = option("test", "Split to measure on.")
    limit: int | None = option(None, "At most this many conversations of each source.")
    max_length: int = option(512, "Longest step in tokens; longer ones are left out.")
    skip_bad: bool = option(False, "Go on past rows that can't be read, and count them.")
    dtype: Dtype = option(
        "auto",
        "Precision of the backbone; auto: bfloat16 where the processor has it, and always where tasks are answered.",
    )
    batch_tokens: int = option(0, "Tokens of a batch, pads counted; 0: few on a processor, many on a GPU.")
    bootstrap: int = option(2000, "Bootstrap draws over conversations, for the 95 % intervals.")
    seed: int = option(0, "Seed of the bootstrap, of the curve's steps and of random routes.")
    curve_offsets: tuple[float, ...] = option(
        (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0), "Added to every run logit, one point of the quality-against-skip curve each."
    )
    curve_steps: int = option(64, "Steps that each point of the curve is measured on, half of each kind; 0: no curve.")
    controls: tuple[Control, ...] = option(
        (),
        "Controls at equal budget: open, random, one_mask, two_masks (the kind given), two_masks_classifier (guessed).",
    )
    calibration: int = option(128, "Training steps of each kind that `two_masks_classifier` is fitted on.")

    tasks: tuple[Task, ...] = option(
        (),
        "Tasks answered by generating under real skipping: tool_calls (the turn's calls, as trees), irrelevance (no "
        "call where none is due), gsm8k (the last number where the solution ends in `#### n`), agent_loop (all turns "
        "of a conversation that calls and talks, in one session).",
    )
    task_limit: int = option(100, "Steps of each task, drawn by the seed.")
    task_tokens: int = option(256, "Longest answer to a task, in tokens.")
    against: str | None = option(None, "Adapter folder on the same backbone that answers the same tasks.")
    fallback: float = option(
        0.0,
        "Tasks: run a token again by every block where no next one has this probability; not where "
        "another adapter answers.",
    )
    timed_steps: int = option(8, "Steps of each kind, and loops, timed beside tasks, routed against open.")

    def __post_init__(self) -> None:
        require(self.max_length >= 8, "max_length", self.max_length, "at least 8")
        require(self.batch_tokens >= 0, "batch_tokens", self.batch_tokens, "0 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 2**32 - 1")
        require(self.bootstrap >= 1, "bootstrap", self.bootstrap, "at least 1")
        require(self.curve_steps >= 0, "curve_steps", self.curve_steps, "0 or more")
        require(all(map(math.isfinite, self.curve_offsets)), "curve_offsets", self.curve_offsets, "finite numbers")
        require(self.calibration >= 2, "calibration", self.calibration, "at least 2")
        for name in ("task_limit", "task_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0.0 <= self.fallback <= 1.0, "fallback", self.fallback, "a probability, from 0 to 1")
        require(self.timed_steps >= 0, "timed_steps", self.timed_steps, "0 or more")
        if self.against is not None and not self.tasks:
            raise ConfigError("against: another adapter answers tasks, and none are asked. Give --tasks too.")
        require(bool(self.data), "data", self.data, "at least one source")
