"""A training run, top to bottom: data, model, trainer, adapter."""

import atexit
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from layerroute.config import KINDS, Kind
from layerroute.data.batches import Batch, by_length, collate, schedule
from layerroute.data.sources import content_hash, load_sources, messages_hash
from layerroute.data.steps import Step, cut_steps
from layerroute.errors import DataError, LayerRouteError
from layerroute.files import unwritten, write_json
from layerroute.machine import batch_tokens_for, default_device, dtype_for
from layerroute.models.adapter import save_adapter, start_from
from layerroute.models.attaching import attach
from layerroute.models.loading import Backbone, load_backbone
from layerroute.training.bypassing import drop_bypasses, fit_along, fit_bypasses
from layerroute.training.options import TrainConfig
from layerroute.training.resuming import (
    LOG,
    check_folder,
    check_same_data,
    check_same_options,
    is_finished,
    is_whole,
    newest_checkpoint,
    note,
)
from layerroute.training.settling import blocks_to_close, fit_routers, keep_open, routes_of, settle
from layerroute.training.trainer import (
    Figures,
    Learner,
    RouteTrainer,
    Scheduled,
    Settling,
    spans_of,
    training_arguments,
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run leaves behind."""

    adapter: Path
    finished: bool  # False: interrupted, a checkpoint was saved
    seconds: float


def train(config: TrainConfig, *, resume: bool = False, dry_run: bool = False, say: Say = lambda _: None) -> Run:
    """Train an adapter and save it under `config.output`/adapter.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint, bit for bit as if never stopped.
        dry_run: load everything, take one forward pass, write nothing.
        say: called with lines of progress.

    Raises:
        LayerRouteError: bad options, data or backbone, a full disk, or a run that is already there.
    """
    started, device = time.perf_counter(), _own_device()
    if config.dtype == "auto":
        config = replace(config, dtype=dtype_for(device))
    checkpoint = newest_checkpoint(config.folder / "checkpoints") if resume else None
    check_folder(config, resume=resume, dry_run=dry_run, checkpoint=checkpoint)
    if resume:
        check_same_options(config)
        if is_finished(config.folder):
            say(f"finished already; adapter in {config.folder / 'adapter'}")
            return Run(config.folder / "adapter", True, time.perf_counter() - started)
    _summary_writer()  # what is missing is said before the backbone and the data are loaded
    torch.manual_seed(config.seed)
    say(f"loading backbone {config.model} in {config.dtype}")
    backbone = load_backbone(config.model, dtype=config.dtype, device=device)
    if backbone.spelt:
        say(f"spelt in pieces, as the backbone never learned them: {' '.join(backbone.spelt)}")
    steps, data = load_steps(config, backbone.tokenizer, "train", say)
    data["backbone"], data["processes"] = backbone.fingerprint, int(os.environ.get("WORLD_SIZE", "1"))
    learner = Learner(attach(backbone.model, config.adapter), config)
    if config.start is not None and not resume:
        start_from(config.start, learner.routed, backbone)
    if dry_run:
        _dry_run(learner, steps, backbone, config, say)
        return Run(config.folder / "adapter", False, time.perf_counter() - started)
    if resume:
        check_same_data(config, data)
    else:
        note(config, data)
    if config.checkpointing:
        learner.routed.recompute()
    settler = Settler(learner, steps, backbone, say)
    trainer = make_trainer(learner, steps, backbone, config, device, settler)
    interrupted = Interruption(say)
    trainer.add_callback(interrupted)
    with interrupted:
        result = _fit(trainer, checkpoint, config)
    adapter = config.folder / "adapter"
    if interrupted.stopped:
        say(f"stopped at update {result.global_step} of {config.steps}; go on with --resume")
        return Run(adapter, False, time.perf_counter() - started)
    if trainer.is_world_process_zero():
        settler.finish()
        save_adapter(adapter, learner.routed.eval(), backbone)
        log = _finite(trainer.state.log_history)
        document = {"data": data, "settled": settler.plain(log), "log": log}
        write_json(config.folder / LOG, document | {"seconds": time.perf_counter() - started})
        say(f"adapter saved in {adapter}")
    return Run(adapter, True, time.perf_counter() - started)


def _own_device() -> str:
    """Return the device of this process; of several GPUs one is chosen before anything is loaded there."""
    device = default_device()
    if device == "cuda":
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return device


def _finite(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the log with None where a number is none that JSON can hold (the gradient of one bad batch)."""
    return [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in log]


def make_trainer(
    learner: Learner, steps: Sequence[Step], backbone: Backbone, config: TrainConfig, device: str, settler: "Settler"
) -> RouteTrainer:
    """Return the trainer of a run. Every rank sees its share of the same global order of steps."""
    arguments = training_arguments(config, log_every=max(1, min(10, config.steps // 10)), device=device)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != launched:  # accelerate can silently start one process, or several that do not talk
        raise LayerRouteError(
            f"{launched} processes were launched, but {arguments.world_size} train together. Start them with "
            "torchrun --nproc_per_node=N -m layerroute.cli.app train ..."
        )
    if launched > 1:
        atexit.register(_leave_group)
    size = config.batch_size * config.accumulation * arguments.world_size
    order = schedule(steps, spans_of(config, settler.closing), size=size, seed=config.seed)
    callbacks: list[TrainerCallback] = [Progress()]
    writer = _summary_writer()
    if arguments.process_index == 0:
        callbacks.append(TensorBoardCallback(writer(str(config.folder / "tensorboard"))))
    if config.objective == "budget":
        callbacks.append(Settling(learner, settler.settle, settler.fit))
    trainer = RouteTrainer(learner, Scheduled(steps, order), arguments, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _leave_group() -> None:
    """Leave the process group: its threads abort a process that ends before them, at times, with all its work done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LayerRouteError("training needs more than the core: pip install 'layerroute[train]'.") from error
    return SummaryWriter


def load_steps(config: TrainConfig, tokenizer: Any, split: str, say: Say) -> tuple[list[Step], dict[str, Any]]:
    """Load the steps of `split` from every source, and what there is to say about them.

    Raises:
        DataError: bad rows (unless `skip_bad`), or one kind is missing.
    """
    conversations, _ = load_sources(config.data, split=split, limit=config.limit, skip_bad=config.skip_bad, say=say)
    steps, cut = cut_steps(conversations, tokenizer, max_length=config.max_length)
    counts = {kind: sum(step.kind == kind for step in steps) for kind in KINDS}
    left_out = cut.left_out(config.max_length)
    say(f"{split}: {len(conversations)} conversations, {len(steps)} steps {counts}, {left_out}")
    for kind, count in counts.items():
        if not count:
            raise DataError(
                f"{', '.join(config.data)}: no step of kind {kind!r} within {config.max_length} tokens. "
                "Add data that has some, or raise --max-length."
            )
    report_row = {"split": split, "sources": list(config.data), "conversations": len(conversations), "steps": counts}
    dropped = {"too_long": cut.too_long, "unrendered": cut.unrendered}
    order = sha256("".join(map(messages_hash, conversations)).encode()).hexdigest()[:16]
    return steps, report_row | dropped | {"hash": content_hash(conversations), "order": order}


def calibration(steps: Sequence[Step], kind: Kind, count: int, seed: int) -> list[Step]:
    """Return `count` steps of `kind`, drawn by `seed`."""
    pool = [step for step in steps if step.kind == kind]
    return random.Random(f"{seed}/{kind}").sample(pool, min(count, len(pool)))


def fitting_steps(steps: Sequence[Step], count: int, seed: int, *, mostly_offered: bool = True) -> list[Step]:
    """Return up to `count` steps of each kind, three quarters of them with tools on offer if there are as many.

    Planning without tools is told apart by a few examples; what has to be learned is planning with tools. Where a
    first token decides this is not so (lab notes, 2026-11-28): without `mostly_offered` steps are drawn as they come.
    """
    chosen: list[Step] = []
    for kind in KINDS:
        drawn = calibration(steps, kind, len(steps), seed)
        if not mostly_offered:
            chosen += drawn[:count]
            continue
        offered, bare = ([s for s in drawn if s.tools_offered is offers] for offers in (True, False))
        few = min(len(bare), max(count - len(offered), count // 4))
        chosen += [*offered[: count - few], *bare[:few]]
    return chosen


def batches_of(steps: Sequence[Step], backbone: Backbone, batch_tokens: int) -> list[Batch]:
    """Return `steps` as batches of similar lengths on the backbone's device."""
    return [collate([steps[i] for i in group]).to(backbone.model.device) for group in by_length(steps, batch_tokens)]


class Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar with the loss and the hard skip rate of each kind."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar, on the first process only."""
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="update", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar on."""
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the latest figures."""
        if self._bar is not None and logs:
            short = {"tool_call": "tool", "planning": "plan"}
            parts = [
                f"{short[k]} loss {logs[f'{k}/loss']:.3f} skip {100 * logs[f'{k}/skip_rate']:.1f}%"
                for k in KINDS
                if f"{k}/loss" in logs
            ]
            self._bar.set_postfix_str(", ".join(parts))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C or a termination signal ends the run after this update, with a checkpoint; a second one, at once."""

    def __init__(self, say: Say) -> None:
        self.asked = self.stopped = False  # here; together with all other processes
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._say("stopping after this update and saving a checkpoint (once more to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop if asked to, all processes after the same update whenever the signal reached each."""
        stop = self.asked
        if args.world_size > 1:
            told = torch.tensor(stop, dtype=torch.uint8, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            stop = bool(told)
        if stop:
            self.stopped = True
            control.should_save = control.should_training_stop = True


class Settler:
    """Settles routes and fits routers on training steps of the run."""

    def __init__(self, learner: Learner, steps: Sequence[Step], backbone: Backbone, say: Say) -> None:
        self.learner, self.steps, self.backbone, self.say = learner, steps, backbone, say
        self.batch_tokens = batch_tokens_for(learner.routed.device.type)

    @property
    def closing(self) -> list[Kind]:
        """The kinds that close blocks."""
        run, count = self.learner.run, len(self.learner.routed.blocks)
        return [kind for kind in KINDS if blocks_to_close(kind, run.budget, run.settle, count)]

    def settle(self) -> tuple[torch.Tensor, Figures]:
        """Fit the bypasses, if there are any, and return each kind's route, (kinds, blocks) bool, and what it costs."""
        run, routed = self.learner.run, self.learner.routed
        count, samples = len(routed.blocks), list[Batch]()
        importance = {kind: self._sample(kind, run.settle.steps) for kind in KINDS}
        with routed.precision():
            if routed.config.bypass.rank:
                samples = [batch for kind in self.closing for batch in self._sample(kind, run.settle.bypass)]
                fit_bypasses(routed, samples, self.say)
            found = settle(routed, importance, run.budget, run.settle, self.say)
            routes = routes_of(found, count).to(routed.device)
            if run.bypasses_heal_alone:  # what was added, above, is without this fit
                fit_along(routed, samples, routes, self.say)
        drop_bypasses(routed, [block for settled in found.values() for block in settled.closed])
        return routes, {f"{kind}/added_nats": settled.added for kind, settled in found.items()}

    def _sample(self, kind: Kind, count: int) -> list[Batch]:
        return batches_of(calibration(self.steps, kind, count, self.learner.run.seed), self.backbone, self.batch_tokens)

    def fit(self) -> Figures:
        """Fit the routers to the kinds' routes, and return how well they agree."""
        learner, run = self.learner, self.learner.run
        learner.routed.eval()
        by_context = learner.routed.config.router.reads_context
        steps = fitting_steps(self.steps, run.settle.fit, run.seed, mostly_offered=by_context)
        order = [index for group in by_length(steps, self.batch_tokens) for index in group]
        # By its context, planning without tools on offer is never taken for a tool call: counted, it would hide how
        # often the rest is. By its first token it is, if calls begin alike.
        hard = [not by_context or steps[index].tools_offered for index in order]
        counted = torch.tensor(hard, device=learner.routed.device)
        self.say(f"fitting routers on {len(steps)} training steps")
        with learner.routed.precision():
            batches = batches_of(steps, self.backbone, self.batch_tokens)
            agreement = fit_routers(
                learner.routed, batches, learner.held, run.budget, run.settle, self.say, counted=counted
            )
        self.say(f"{100 * agreement:.1f} % of gates as their kind's where the kinds differ; now routers decide")
        return {"agreement": agreement}

    def finish(self) -> None:
        """Let the routers of blocks that no kind closes be open, where routers were fitted."""
        if self.learner.fitted:
            keep_open(self.learner.routed, self.learner.held, self.learner.run.settle.margin)

    def plain(self, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return what was found, ready for JSON; figures that the `log` of training lacks are None."""
        noted, kinds = {name: value for row in log for name, value in row.items()}, {}
        for kind, route in zip(KINDS, self.learner.held.tolist(), strict=True):
            added = noted.get(f"{kind}/added_nats")
            kinds[kind] = {"closed": [block for block, runs in enumerate(route) if not runs], "added_nats": added}
        return {"kinds": kinds, "agreement": noted.get("agreement")}


def _fit(trainer: RouteTrainer, checkpoint: Path | None, config: TrainConfig) -> Any:
    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if (reason := unwritten(error)) is None:
            raise
        for folder in (config.folder / "checkpoints").glob("checkpoint-*"):
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
        raise LayerRouteError(
            f"{config.folder}: the checkpoint could not be written ({reason}). Earlier checkpoints are whole: "
            "free some space and go on with --resume."
        ) from error


def _dry_run(learner: Learner, steps: Sequence[Step], backbone: Backbone, config: TrainConfig, say: Say) -> None:
    trainable = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    half = config.batch_size // 2 or 1
    sample = [step for kind in KINDS for step in calibration(steps, kind, half, config.seed)]
    batch = batches_of(sample, backbone, batch_tokens=1 << 30)[0]
    with torch.no_grad():
        out = learner(batch.input_ids, batch.context_mask, batch.response_mask, batch.kinds)
    loss = float(out.nll.sum() / out.tokens.sum())
    say(f"dry run: {trainable:,} trainable parameters, first batch {tuple(batch.input_ids.shape)}, loss {loss:.3f}")
    say("nothing was written")
