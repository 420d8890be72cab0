"""The options of a training run, and the presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerroute.config import AdapterConfig, BudgetConfig, Dtype, option, part, require
from layerroute.errors import ConfigError
from layerroute.files import expanded


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleConfig:
    """When and how routes are chosen (objective `budget`)."""

    at: float = option(0.3, "Share of training after which each kind's route is settled; before it every block runs.")
    free: float = option(0.8, "Share of training after which routers decide; before it each kind's route is held.")
    steps: int = option(16, "Training steps of each kind whose loss tells which blocks matter least.")
    bypass: int = option(64, "Training steps of each kind that closes blocks, on which bypasses are fitted first.")
    rounds: int = option(4, "Blocks are closed in this many rounds, measuring the rest again after each.")
    shallow: float = option(0.1, "Share of the depth whose blocks stay open: routers there have read too little.")
    fit: int = option(
        512,
        "Training steps of each kind that routers are fitted on, 3 of 4 with tools on offer if they read the context.",
    )
    margin: float = option(
        2.0, "Mean size of the left-out run logits that the fit gives, before its bias is moved to the budget."
    )
    tolerance: float = option(
        0.03,
        "Share of left-out steps (with tools on offer, where routers read the context) that a router may at most skip "
        "wrongly to meet the budget.",
    )
    recognised: float = option(
        0.9,
        "Share of tool calls expected to be recognised: so many more blocks are settled, as the rest run all.",
    )
    crossed: float = option(0.2, "Share of held gates taken from the other kind's route: a wrong one costs less.")
    heal: Literal["all", "bypasses"] = option(
        "all",
        "What learns once routes are settled: LoRA and bypasses; or bypasses alone, so that with every gate open the "
        "model stays as its LoRA was. Then, without settle.crossed, updates hold the kinds that close blocks until "
        "routers decide.",
    )

    def __post_init__(self) -> None:
        require(0.0 <= self.at < 1.0, "settle.at", self.at, "a share from 0 to below 1")
        require(self.at < self.free < 1.0, "settle.free", self.free, "a share above settle.at and below 1")
        require(self.steps >= 1, "settle.steps", self.steps, "at least 1")
        require(self.fit >= 2, "settle.fit", self.fit, "at least 2")
        require(self.bypass >= 1, "settle.bypass", self.bypass, "at least 1")
        for name in ("shallow", "tolerance", "crossed"):
            require(
                0.0 <= getattr(self, name) < 1.0, f"settle.{name}", getattr(self, name), "a share from 0 to below 1"
            )
        require(self.rounds >= 1, "settle.rounds", self.rounds, "at least 1")
        require(0.0 < self.recognised <= 1.0, "settle.recognised", self.recognised, "a share above 0")
        require(self.margin > 0, "settle.margin", self.margin, "a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run."""

    model: str = option("smollm2", "Backbone: hub id, folder, .gguf file, or `smollm2`.")
    data: tuple[str, ...] = option(("builtin",), "Transcripts: files, folders, hf:owner/name, or `builtin[:[A-]N]`.")
    limit: int | None = option(None, "At most this many conversations of each source.")
    output: str = option("runs/train", "Folder for the adapter, checkpoints, logs and the resolved options.")
    start: str | None = option(None, "Adapter, or folder that PEFT saved, whose LoRA training begins with.")
    objective: Literal["budget", "paper", "open"] = option(
        "budget",
        "Hold a skip rate per kind; the paper's gate penalty; or all gates open (LoRA-only control).",
    )
    steps: int = option(300, "Optimiser updates.")
    batch_size: int = option(4, "Steps of a batch, on each process.")
    accumulation: int = option(2, "Batches of an update; with 2 and a tool share of a half, one holds each kind.")
    max_length: int = option(512, "Longest step in tokens, context and response.")
    tool_share: float = option(0.5, "Share of tool calls in an update; the rest is planning (settle.heal may differ).")
    lora_rate: float = option(3e-3, "Learning rate of LoRA.")
    bypass_rate: float = option(1e-3, "Learning rate of bypasses.")
    router_rate: float = option(1e-4, "Learning rate of router weights.")
    bias_rate: float = option(1e-3, "Learning rate of router biases.")
    weight_decay: float = option(0.01, "Weight decay.")
    clip: float = option(1.0, "Largest gradient norm.")
    warmup: float = option(0.05, "Share of training over which learning rates rise; then cosine.")
    gate_weight: float = option(1.0, "Weight of the mean soft gate in the loss (objective `paper`).")
    loss_tokens: Literal["response", "all"] = option("response", "Tokens the language-model loss is taken on.")
    seed: int = option(0, "Seed of data order, initialisation and dropout.")
    dtype: Dtype = option("auto", "Precision of the frozen backbone; auto: bfloat16 where the processor has it.")
    save_every: int = option(50, "Updates between checkpoints.")
    checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    skip_bad: bool = option(False, "Go on past rows that can't be read, and count them.")
    adapter: AdapterConfig = part(AdapterConfig, "What is attached.")
    budget: BudgetConfig = part(BudgetConfig, "Skip rates to hold.")
    settle: SettleConfig = part(SettleConfig, "How the first routes are chosen.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lora_rate", "bypass_rate", "router_rate", "bias_rate", "weight_decay", "gate_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 2**32 - 1")
        require(self.clip > 0, "clip", self.clip, "a number above 0")
        require(0.0 <= self.warmup < 1.0, "warmup", self.warmup, "a share from 0 to below 1")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.max_length >= 8, "max_length", self.max_length, "at least 8")
        require(0.0 < self.tool_share < 1.0, "tool_share", self.tool_share, "a share between 0 and 1")
        require(bool(self.data), "data", self.data, "at least one source")

        settle_at, fit_at = self.turning_points
        if self.settle.heal == "bypasses" and not self.adapter.bypass.rank:
            raise ConfigError("settle.heal: 'bypasses' needs some. Give bypass.rank, e.g. 64, or heal all.")
        if self.bypasses_heal_alone and self.adapter.lora.rank and not settle_at and self.start is None:
            raise ConfigError("settle.heal: LoRA would rest before it learned. Give start, or a later settle.at.")
        if self.objective == "budget" and fit_at >= self.steps:
            raise ConfigError(
                f"steps: {self.steps} leave no update after update {settle_at} to hold and fit routes in."
            )

    @property
    def bypasses_heal_alone(self) -> bool:
        """Whether LoRA rests once routes are settled."""
        return self.objective == "budget" and self.settle.heal == "bypasses"

    @property
    def turning_points(self) -> tuple[int, int]:
        """The updates before which routes are settled, and routers fitted."""
        settle_at = round(self.settle.at * self.steps)
        return settle_at, max(round(self.settle.free * self.steps), settle_at + 1)

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return expanded(self.output)


PRESETS: dict[str, Mapping[str, Any]] = {
    # Ours: open first; settle a route for each kind and heal under it, bypasses in place of closed blocks; then routers
    # decide, the budget held.
    "budget": {"adapter.lora.dropout": 0.0, "adapter.bypass.rank": 64},
    # The paper's recipe (arXiv 2606.01838, section 4), its known faults mended: the loss has no gate term in its
    # perplexity, and routers see the context alone, because at generation there is no answer to pool.
    "paper": {
        "objective": "paper",
        "steps": 750,
        "batch_size": 4,
        "accumulation": 4,
        "lora_rate": 2e-4,
        "router_rate": 2e-4,
        "bias_rate": 2e-4,
        "warmup": 0.0,
        "loss_tokens": "all",
        "adapter.router.pooling": "mean",
        "adapter.router.skip_first": False,
        "adapter.router.normalise": False,
        "adapter.router.init": "paper",
    },
}
