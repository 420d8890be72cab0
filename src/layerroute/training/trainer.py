"""The Hugging Face Trainer, taught our objective. Distribution, precision and checkpoints stay with it."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerroute.config import KINDS, Kind
from layerroute.data.batches import Span, collate
from layerroute.data.steps import Step
from layerroute.errors import LayerRouteError
from layerroute.files import replacing
from layerroute.models.attaching import RoutedModel, RoutedOutput
from layerroute.models.prefix import SharedPrefix
from layerroute.routing.budget import BudgetController, kind_totals, rate_totals
from layerroute.routing.routed import straight_through
from layerroute.training.options import TrainConfig

STATE = "layerroute_state.safetensors"
Figures = dict[str, float]


class Scheduled(Dataset[Step]):
    """The steps of a run in the order in which it sees them, so that data order is data and not state."""

    def __init__(self, steps: Sequence[Step], order: Sequence[int]) -> None:
        self.steps, self.order = steps, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Step:
        return self.steps[self.order[position]]


def learner_inputs(steps: Sequence[Step]) -> dict[str, Tensor]:
    """Return one batch as the keyword arguments of `Learner.forward`."""
    batch = collate(steps)
    masks = {"context_mask": batch.context_mask, "response_mask": batch.response_mask}
    return {"input_ids": batch.input_ids, **masks, "kinds": batch.kinds}


class Learner(nn.Module):
    """All that training changes: the routed model, the budget's multipliers, and how far routes are decided."""

    settled: Tensor  # () bool: each kind has its route
    fitted: Tensor  # () bool: routers decide
    held: Tensor  # (kinds, blocks) bool: the route each kind is held on between the two

    def __init__(self, routed: RoutedModel, config: TrainConfig) -> None:
        super().__init__()
        self.routed = routed
        self.controller = BudgetController(config.budget)
        self.run = config
        self.register_buffer("settled", torch.tensor(False))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("held", torch.ones(len(KINDS), len(routed.blocks), dtype=torch.bool))
        self.to(routed.device)

    @property
    def routers_decide(self) -> bool:
        """Whether gates come from the routers now, and not from `held` (all open until settled)."""
        return self.run.objective == "paper" or (self.run.objective == "budget" and bool(self.fitted))

    @property
    def lora_rests(self) -> bool:
        """Whether LoRA stays as it is from now on, and with it what the model says with every gate open."""
        return self.run.bypasses_heal_alone and bool(self.settled)

    @property
    def contexts_rest(self) -> bool:
        """Whether tokens that no gate skips say what they said before, and so need no way back through them.

        Recomputing activations would leave no keys and values to go on from.
        """
        return self.lora_rests and self.run.loss_tokens == "response" and not self.run.checkpointing

    def forward(self, input_ids: Tensor, context_mask: Tensor, response_mask: Tensor, kinds: Tensor) -> RoutedOutput:
        """Run the routed model, on the routers' gates or on held ones, for which routers are not asked."""
        wanted = (context_mask | response_mask) if self.run.loss_tokens == "all" else response_mask
        routed = self.routed
        forced = None if self.routers_decide else self._held_routes(input_ids * context_mask, kinds)
        if self.contexts_rest and forced is not None:
            return SharedPrefix(routed, input_ids, context_mask, response_mask).run(forced)[0]
        # Through the residual the budget would also pull on LoRA, which can meet it on training steps by heart.
        detached = self.run.objective == "budget"
        route_pass = routed.begin(context_mask, response_mask, forced=forced, detached=detached)
        return routed.run(input_ids, wanted, route_pass)

    def _held_routes(self, context: Tensor, kinds: Tensor) -> Tensor:
        """Return the gates (batch, blocks) bool that each step is held on: its kind's, some crossed to the other's.

        A step crosses each gate with its own probability u ** (1 / share - 1): on average `settle.crossed`, mostly
        near 0, at times near 1, so that LoRA meets slips of single gates and whole wrong routes. The draws are a hash
        of the context's tokens, so that they are the same on any number of processes.
        """
        share, blocks = self.run.settle.crossed, self.held.shape[1]
        own, other = self.held[kinds], self.held[1 - kinds]
        if not share:
            return own
        places = torch.arange(1, context.shape[1] + 1, device=context.device)
        draws = uniform((context * places).sum(dim=1, keepdim=True), blocks + 1)
        return torch.where(draws[:, 1:] < draws[:, :1] ** (1 / share - 1), other, own)

    def changed(self) -> dict[str, Tensor]:
        """Return every tensor that training changes, by name."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        kept = {name: b for name, b in self.named_buffers() if ".router." in name or not name.startswith("routed.")}
        return trained | kept


class RouteTrainer(Trainer):  # type: ignore[misc]
    """Language-model loss on the response + what holds the skip rates."""

    def __init__(self, learner: Learner, data: Scheduled, args: TrainingArguments, **options: Any) -> None:
        super().__init__(model=learner, args=args, train_dataset=data, data_collator=learner_inputs, **options)
        self.learner = learner
        self.meter = Meter()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate each for LoRA, bypasses, router weights and router biases."""
        config = self.learner.run
        rates = {"lora": config.lora_rate, "bypass": config.bypass_rate}
        rates |= {"weight": config.router_rate, "bias": config.bias_rate}
        named = [(_part(n), p) for n, p in self.learner.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "part": part,
                    "params": [p for q, p in named if q == part],
                    "lr": rate,
                    "weight_decay": 0.0 if part == "bias" else config.weight_decay,
                }
                for part, rate in rates.items()
                if any(q == part for q, _ in named)
            ]
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Cosine with warm-up; where bypasses heal alone LoRA has one of its own before routes are settled."""
        config = self.learner.run
        if not config.bypasses_heal_alone:
            return super().create_scheduler(num_training_steps, optimizer)
        settle_at, _ = config.turning_points
        groups = (optimizer or self.optimizer).param_groups
        spans = [(0, settle_at) if group["part"] == "lora" else (settle_at, config.steps) for group in groups]
        rates: list[Callable[[int], float]] = [
            partial(cosine, start=start, end=end, warmup=config.warmup) for start, end in spans
        ]
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rates)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch forward and back.

        Where bypasses heal alone, LoRA gets no gradient once it rests, and all else none before: neither clipping nor
        the optimiser sees what does not learn, nor does Adam count its updates.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.learner.run.bypasses_heal_alone:
            rests = self.learner.lora_rests
            for name, parameter in self.learner.named_parameters():
                if (_part(name) == "lora") == rests:
                    parameter.grad = None
        return loss

    def _get_learning_rate(self) -> float:
        # For the log. The first part's alone would be 0 all the while that LoRA rests.
        return max(map(float, self.lr_scheduler.get_last_lr()))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of one batch, scaled so that averaging gradients over ranks gives the global batch's."""
        out: RoutedOutput = model(**inputs)
        kinds = inputs["kinds"]
        ranks = self.accelerator.num_processes
        decided = self.learner.routers_decide
        ran = straight_through(out.gates, out.logits) if decided else out.gates.float()
        skipped = 1.0 - ran.mean(dim=1)
        losses = kind_totals(torch.stack([out.nll, out.tokens.float()]), kinds)
        totals = self.accelerator.reduce(torch.cat([losses, rate_totals(skipped, kinds)]), reduction="sum")
        loss = out.nll.sum() * ranks / totals[1].sum() + self._route_loss(out, skipped, kinds, totals[2:], ranks)
        self.meter.add(totals)
        return (loss, out) if return_outputs else loss

    def _route_loss(self, out: RoutedOutput, skipped: Tensor, kinds: Tensor, rates: Tensor, ranks: int) -> Tensor:
        config = self.learner.run
        if not self.learner.routers_decide:
            # Every rank gives every parameter a gradient, also where no gate of its batch is closed.
            return 0.0 * torch.stack([p.sum() for p in self.learner.parameters() if p.requires_grad]).sum()
        if config.objective == "paper":
            return config.gate_weight * torch.sigmoid(out.logits).mean()
        return self.learner.controller.penalty(skipped, kinds, rates, scale=ranks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss and hard skip rate of each kind since the last log.

        Raises:
            LayerRouteError: a loss is not finite.
        """
        figures = self.meter.read()
        if odd := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise self._apart(f"{odd[0]} is {figures[odd[0]]}")
        super().log(logs | figures, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # On every rank, so that all end alike; the last whole checkpoint stays the last.
        if odd := [name for name, tensor in self.learner.changed().items() if not bool(tensor.isfinite().all())]:
            raise self._apart(f"{odd[0]} is not finite")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            tensors = {n: t.detach().cpu().contiguous().clone() for n, t in self.learner.changed().items()}
            with replacing(Path(output_dir or str(self.args.output_dir)) / STATE) as temporary:
                save_file(tensors, temporary)

    def _apart(self, what: str) -> LayerRouteError:
        return LayerRouteError(
            f"{what} at update {self.state.global_step}: training came apart. Start anew with a lower --lora-rate, or "
            "with --dtype float32."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved, own = load_file(Path(resume_from_checkpoint) / STATE), self.learner.changed()
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
            raise LayerRouteError(
                f"{resume_from_checkpoint}: not a checkpoint of this run: its backbone, its options or LayerRoute have "
                "changed since. Undo the change, or start anew with another --output."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


class Meter:
    """Loss and hard skip rate of each kind since the last reading."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, len(KINDS))

    def add(self, totals: Tensor) -> None:
        """Take in one batch of all ranks: the sums by kind of loss, tokens, skip rates and steps, (4, kinds)."""
        self._sums += totals.cpu()

    def read(self) -> dict[str, float]:
        """Return the averages and start again."""
        nll, tokens, skipped, steps = self._sums
        self._sums = torch.zeros(4, len(KINDS))
        found: dict[str, float] = {}
        for index, kind in enumerate(KINDS):
            if steps[index]:
                found[f"{kind}/loss"] = round(float(nll[index] / tokens[index]), 4)
                found[f"{kind}/skip_rate"] = round(float(skipped[index] / steps[index]), 4)
        return found


class Settling(TrainerCallback):  # type: ignore[misc]
    """Settles each kind's route, and later fits the routers, each before the update at which it takes effect.

    Both also give figures, which the trainer's log keeps, and with it checkpoints.
    """

    def __init__(
        self, learner: Learner, settle: Callable[[], tuple[Tensor, Figures]], fit: Callable[[], Figures]
    ) -> None:
        self.learner, self.settle, self.fit = learner, settle, fit
        self.settle_at, self.fit_at = learner.run.turning_points

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do what is due and no checkpoint has brought back."""
        if state.global_step >= self.settle_at and not bool(self.learner.settled):
            routes, figures = self.settle()
            self.learner.held.copy_(routes)
            self.learner.settled.fill_(True)
            state.log_history.append({"step": state.global_step, **figures})
            self._agree()
        if state.global_step >= self.fit_at and not bool(self.learner.fitted):
            state.log_history.append({"step": state.global_step, **self.fit()})
            self.learner.fitted.fill_(True)
            self._agree()
        self.learner.train()

    def _agree(self) -> None:
        """Take over what the first process found: two GPUs may differ in a last bit, and their copies would part."""
        if torch.distributed.is_initialized():
            for tensor in self.learner.changed().values():
                torch.distributed.broadcast(tensor.data, src=0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save before settling and before fitting, and after the update behind each: both can take many minutes."""
        if any(state.global_step in (due, due + 1) for due in (self.settle_at, self.fit_at)):
            control.should_save = True


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each of `seeds` (batch, 1) int64, the same on every machine."""
    bits = (seeds * 1_000_003 + torch.arange(count, device=seeds.device) * 0x9E3779B9) & 0xFFFFFFFF
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return ((bits ^ (bits >> 16)) & 0xFFFFFF).float() / 0x1000000


def cosine(update: int, *, start: int, end: int, warmup: float) -> float:
    """Return the share of its rate that a part learns at: up over `warmup` of its span of updates, then down to 0."""
    if not start <= update < end:
        return 0.0
    done, rise = update - start, round(warmup * (end - start))
    if done < rise:
        return done / rise
    return 0.5 * (1.0 + math.cos(math.pi * (done - rise) / (end - start - rise)))


def spans_of(config: TrainConfig, closing: Sequence[Kind]) -> list[Span]:
    """Return the mix of kinds over a run of `config`; `closing` are the kinds that close blocks.

    While bypasses alone learn, a kind that closes none would teach nothing (but for gates that cross), so the other
    has whole updates.
    """
    if not config.bypasses_heal_alone or config.settle.crossed or len(closing) != 1:
        return [Span(config.steps, config.tool_share)]
    settle_at, fit_at = config.turning_points
    lone = Span(fit_at - settle_at, 1.0 if closing[0] == "tool_call" else 0.0)
    return [Span(settle_at, config.tool_share), lone, Span(config.steps - fit_at, config.tool_share)]


def training_arguments(config: TrainConfig, *, log_every: int, device: str) -> TrainingArguments:
    """Return the Trainer's own options for `config`."""
    use_cpu = device == "cpu"
    arguments = TrainingArguments(
        output_dir=str(config.folder / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lora_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.steps),
        max_grad_norm=config.clip,
        logging_steps=log_every,
        save_steps=config.save_every,
        save_total_limit=2,
        seed=config.seed,
        bf16=config.dtype == "bfloat16",
        use_cpu=use_cpu,
        report_to=[],  # TensorBoard is a callback of its own, so that its files stand beside the checkpoints
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    # One process uses one GPU: the Trainer would put a copy of the model on each, and copies share one tape of gates.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _part(name: str) -> str:
    if ".router." in name:
        return "bias" if name.endswith("bias") else "weight"
    return "bypass" if ".bypass." in name else "lora"
