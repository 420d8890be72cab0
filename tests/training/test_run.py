"""A training run: resumable bit for bit, the same on two processes, and never half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import save_tiny_backbone
from transformers import TrainerControl

from layerroute.config import KINDS, build, to_dict
from layerroute.errors import ConfigError, DataError, LayerRouteError
from layerroute.models.adapter import load_adapter, save_measured
from layerroute.models.attaching import RoutedModel
from layerroute.training import run
from layerroute.training.options import PRESETS, TrainConfig
from layerroute.training.resuming import newest_checkpoint
from layerroute.training.run import Interruption, Settler, fitting_steps, train
from layerroute.training.trainer import STATE, Meter, cosine

WORDS = ["red", "blue", "green", "tall", "short", "fast", "slow", "old", "new", "big"]


def write_transcripts(path, count=24):
    rows = []
    for index in range(count):
        word = WORDS[index % len(WORDS)]
        call = {"name": "paint", "arguments": {"colour": word, "coats": index}}
        messages = [
            {"role": "user", "content": f"Paint it {word} {index}."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": f"It is {word} now, all {index} coats."},
        ]
        rows.append({"messages": messages, "tools": [{"name": "paint"}], "split": "train"})
    for index in range(count):
        greeting = [{"role": "user", "content": f"Hi {index}"}, {"role": "assistant", "content": "Hello."}]
        rows.append({"messages": greeting, "split": "train"})  # planning without tools on offer: a short context
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path):
    write_transcripts(tmp_path / "log.jsonl")
    return build(
        TrainConfig,
        PRESETS["budget"],
        {
            "model": save_tiny_backbone(tmp_path / "backbone"),
            "data": [str(tmp_path / "log.jsonl")],
            "output": str(tmp_path / "run"),
            "steps": 6,
            "batch_size": 2,
            "max_length": 700,
            "save_every": 2,
            "dtype": "float32",
            "adapter.lora.dropout": 0.1,  # so that the random state matters to a resumed run
            "settle.at": 0.3,
            "settle.free": 0.5,
            "settle.steps": 3,
            "settle.fit": 6,
            "settle.bypass": 4,
            "adapter.bypass.rank": 4,
            "budget.tool_call": 0.25,
        },
    )


def silent(_line):
    """Say nothing."""


def states(config, update):
    return load_file(config.folder / "checkpoints" / f"checkpoint-{update}" / STATE)


def begin(config):
    """Leave a run as one that was killed right before its end."""
    train(config, say=silent)
    (config.folder / "train.json").unlink()


def healing(config):
    """Return the run with bypasses healing alone, on what follows contexts that run every block."""
    router = replace(config.adapter.router, scope="continuation")
    settle = replace(config.settle, heal="bypasses", crossed=0.0)
    return replace(config, adapter=replace(config.adapter, router=router), settle=settle)


@pytest.mark.parametrize("heal", ["all", "bypasses"])
def test_killed_and_resumed_equals_never_killed(config, tmp_path, monkeypatch, heal):
    config = healing(config) if heal == "bypasses" else config
    train(config, say=silent)
    other = replace(config, output=str(tmp_path / "killed"))

    class Killed(Exception):
        pass

    with monkeypatch.context() as patch:
        patch.setattr("layerroute.training.trainer.RouteTrainer._maybe_log_save_evaluate", _dying(5, Killed))
        with pytest.raises(Killed):
            train(other, say=silent)
    assert newest_checkpoint(other.folder / "checkpoints").name == "checkpoint-4"
    train(other, resume=True, say=silent)
    straight, resumed = states(config, 6), states(other, 6)
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name
    assert bool(straight["fitted"])
    assert straight["controller.multiplier"].abs().sum() > 0
    found = [json.loads((run.folder / "train.json").read_text())["settled"] for run in (config, other)]
    assert found[0] == found[1]
    assert None not in (found[0]["agreement"], found[0]["kinds"]["tool_call"]["added_nats"])


@pytest.mark.parametrize(("work", "left"), [("settle", 2), ("fit", 3)])
def test_stopped_at_once_while_routes_are_decided_no_update_is_lost(config, tmp_path, monkeypatch, work, left):
    whole = replace(config, save_every=6)
    train(whole, say=silent)
    stopped = replace(whole, output=str(tmp_path / "stopped"))

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Settler, work, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, say=silent)
    assert newest_checkpoint(stopped.folder / "checkpoints").name == f"checkpoint-{left}"
    train(stopped, resume=True, say=silent)
    straight, resumed = states(whole, 6), states(stopped, 6)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_a_run_whose_loss_is_no_number_stops_and_says_what_to_do(config, monkeypatch):
    monkeypatch.setattr(Meter, "read", lambda _: {"planning/loss": float("nan"), "planning/skip_rate": 0.0})
    with pytest.raises(LayerRouteError, match=r"planning/loss is nan at update 1.*lower --lora-rate"):
        train(config, say=silent)
    assert newest_checkpoint(config.folder / "checkpoints") is None


def test_no_checkpoint_is_written_of_weights_that_came_apart(config, monkeypatch):
    step = torch.optim.AdamW.step
    done = []

    def odd(self, *args, **kwargs):
        done.append(step(self, *args, **kwargs))
        if len(done) == 4:
            self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", odd)
    monkeypatch.setattr(Meter, "read", lambda _: {})  # the loss would say so at the next log, which may be later
    with pytest.raises(LayerRouteError, match=r"lora_\w+.default.weight is not finite at update 4.*lower --lora-rate"):
        train(config, say=silent)
    assert newest_checkpoint(config.folder / "checkpoints").name == "checkpoint-3"


@pytest.mark.parametrize("scope", ["step", "continuation"])
def test_the_tolerance_is_held_on_steps_with_tools_on_offer_where_routers_read_the_context(config, monkeypatch, scope):
    router = replace(config.adapter.router, scope=scope, pooling="last")
    config = replace(config, adapter=replace(config.adapter, router=router))
    found = {}

    def recording(routed, batches, routes, budget, settle, say, *, counted):
        found["contexts"] = torch.cat([batch.context_mask.sum(dim=1) for batch in batches])
        found["counted"] = counted
        return 1.0

    def drawing(*given, mostly_offered):
        found["mostly offered"] = mostly_offered
        return fitting_steps(*given, mostly_offered=mostly_offered)

    monkeypatch.setattr("layerroute.training.run.fit_routers", recording)
    monkeypatch.setattr("layerroute.training.run.fitting_steps", drawing)
    train(config, say=silent)
    assert found["mostly offered"] is (scope == "step")
    bare = found["contexts"] < found["contexts"].max() / 2
    assert torch.equal(found["counted"], torch.ones_like(bare) if scope == "continuation" else ~bare)
    assert 0 < bare.sum() < len(bare) / 2


def test_a_checkpoint_of_another_version_is_refused_with_a_remedy(config):
    begin(config)
    state = states(config, 6)
    del state["held"]
    save_file(state, config.folder / "checkpoints" / "checkpoint-6" / STATE)
    with pytest.raises(LayerRouteError, match=r"checkpoint-6: not a checkpoint of this run.*--output"):
        train(config, resume=True, say=silent)


def test_a_run_goes_on_only_with_the_options_it_was_begun_with(config):
    begin(config)
    with pytest.raises(ConfigError, match=r"seed: 0 then, 1 now.*--config .*config.yaml --resume"):
        train(replace(config, seed=1), resume=True, say=silent)
    path = config.folder / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("bypass_rate:")]
    path.write_text("\n".join(lines))  # as a version without that option wrote it
    assert train(config, resume=True, say=silent).finished


def test_a_run_goes_on_only_with_the_conversations_it_was_begun_with(config):
    begin(config)
    write_transcripts(Path(config.data[0]), count=20)
    with pytest.raises(DataError, match=r"conversations of .*have changed"):
        train(config, resume=True, say=silent)


@pytest.mark.parametrize(
    ("noted", "says"),
    [
        ({"processes": 2}, "begun by 2 processes, not 1"),
        ({"backbone": "0"}, "weights of"),
        ({"order": "0"}, "order of"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was_begun_as(config, noted, says):
    begin(config)
    path = config.folder / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | noted))
    with pytest.raises((ConfigError, DataError), match=says):
        train(config, resume=True, say=silent)


def _dying(update, error):
    from layerroute.training.trainer import RouteTrainer

    original = RouteTrainer._maybe_log_save_evaluate

    def wrapped(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.state.global_step == update:
            raise error

    return wrapped


def test_a_damaged_note_of_how_a_run_was_begun_is_named(config):
    begin(config)
    (config.folder / "data.json").write_text('{"hash": ')
    with pytest.raises(LayerRouteError, match=r"data.json: damaged .*another --output"):
        train(config, resume=True, say=silent)


def test_a_termination_signal_saves_and_the_run_goes_on(config, monkeypatch):
    from layerroute.training.run import Progress

    def interrupt(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", interrupt)
        assert not train(config, say=silent).finished
    assert newest_checkpoint(config.folder / "checkpoints").name == "checkpoint-3"
    assert train(config, resume=True, say=silent).finished
    load_adapter(config.folder / "adapter", dtype="float32")


@pytest.mark.parametrize("left", [None, '{"epoch": 1'])
def test_a_half_written_checkpoint_is_passed_over(config, left):
    train(config, say=silent)
    newest = newest_checkpoint(config.folder / "checkpoints")
    (newest / "trainer_state.json").unlink()
    if left is not None:
        (newest / "trainer_state.json").write_text(left)
    assert newest_checkpoint(config.folder / "checkpoints").name == "checkpoint-4"


RUST = "Error while serializing: I/O error: No space left on device (os error 28)"  # and what safetensors says
TORCH_WRITER = "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"  # what torch says of a full disk


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError(TORCH_WRITER), SafetensorError(RUST)]
)
def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(config, monkeypatch, failure):
    from layerroute.training import trainer

    original = trainer.save_file

    def full(tensors, path, *args, **kwargs):
        if (config.folder / "checkpoints" / "checkpoint-2" / STATE).exists():
            raise failure
        original(tensors, path, *args, **kwargs)

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(LayerRouteError, match="could not be written"):
        train(config, say=silent)
    assert [path.name for path in (config.folder / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_training_goes_on_from_the_lora_it_is_given(config, tmp_path):
    """With learning rates of 0 nothing but the start can be in what is saved."""
    still = {"lora_rate": 0.0, "weight_decay": 0.0}
    train(config, say=silent)
    later = replace(config, **still, output=str(tmp_path / "later"), start=str(config.folder / "adapter"), seed=5)
    train(later, say=silent)
    first, second = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (config, later))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("at", [0.0, 0.4])
def test_where_bypasses_heal_alone_lora_ends_as_it_was_settled_on(config, tmp_path, monkeypatch, at):
    """In one run, and beginning with a LoRA that was trained before."""
    train(config, say=silent)
    found = {}

    def settle(self):
        routes, figures = original(self)
        tensors = self.learner.changed().items()
        found.update({name: t.detach().clone() for name, t in tensors if ".lora_" in name or ".bypass." in name})
        return routes, figures

    def fit_along(routed, batches, routes, say):
        along.append((sum(len(batch) for batch in batches), routes.logical_not().sum().item()))

    original, along = Settler.settle, []
    monkeypatch.setattr(Settler, "settle", settle)
    monkeypatch.setattr(run, "fit_along", fit_along)
    later = replace(config, output=str(tmp_path / "later"), start=str(config.folder / "adapter"), seed=5)
    later = healing(later)
    later = replace(later, settle=replace(later.settle, at=at, free=0.7))
    train(later, say=silent)
    assert along == [(config.settle.bypass, 1)]
    log = json.loads((later.folder / "train.json").read_text())["log"]
    assert all(row["learning_rate"] > 0 for row in log if "learning_rate" in row)  # not that of what rests
    calls_alone = [row["step"] for row in log if "tool_call/loss" in row and "planning/loss" not in row]
    assert calls_alone == [update + 1 for update in range(*later.turning_points)]  # calls alone close blocks here
    ended = states(later, 6)
    learned = {name for name, tensor in found.items() if not torch.equal(tensor, ended[name])}
    assert learned
    assert all(".bypass." in name for name in learned)
    start = load_file(config.folder / "adapter" / "adapter_model.safetensors")
    end = load_file(later.folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items()) == (at == 0.0)


def test_a_run_whose_lora_rests_has_lora_only_in_itself(config, tmp_path):
    later = healing(config)
    later = replace(later, settle=replace(later.settle, at=0.5, free=0.7))
    alone = replace(later, objective="open", steps=later.turning_points[0], output=str(tmp_path / "alone"))
    for each in (later, alone):
        train(each, say=silent)
    lora, only = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (later, alone))
    assert lora.keys() == only.keys()
    assert all(torch.equal(tensor, only[name]) for name, tensor in lora.items())


def test_where_all_heals_it_learns_on_one_cosine_and_bypasses_are_fitted_once(config, monkeypatch):
    monkeypatch.delattr(run, "fit_along")
    train(config, say=silent)
    log = json.loads((config.folder / "train.json").read_text())["log"]
    rates = [row["learning_rate"] for row in log if "learning_rate" in row]
    assert rates == pytest.approx([config.lora_rate * cosine(u, start=0, end=6, warmup=0.05) for u in range(6)])


def test_a_dry_run_writes_nothing(config):
    said = []
    train(config, dry_run=True, say=said.append)
    assert not config.folder.exists()
    assert any("trainable parameters" in line for line in said)


def test_a_run_is_not_overwritten_nor_resumed_from_nothing(config):
    with pytest.raises(ConfigError, match="no checkpoint"):
        train(config, resume=True, say=silent)
    train(config, say=silent)
    with pytest.raises(ConfigError, match="--resume"):
        train(config, say=silent)
    shutil.rmtree(config.folder / "checkpoints")  # which takes the most room
    with pytest.raises(ConfigError, match="--resume"):
        train(config, say=silent)


def test_a_finished_run_that_is_resumed_stays_as_it_is(config):
    train(config, say=silent)
    save_measured(config.folder / "adapter", {"kinds": {}, "note": 1})
    left = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}
    assert train(config, resume=True, say=silent).finished
    assert {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()} == left
    with pytest.raises(ConfigError, match="other options"):
        train(replace(config, steps=7), resume=True, say=silent)
    shutil.rmtree(config.folder / "adapter")
    assert train(config, resume=True, say=silent).finished
    load_adapter(config.folder / "adapter", dtype="float32")


def test_a_kind_without_steps_is_an_error(config, tmp_path):
    only = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "split": "train",
    }
    (tmp_path / "only.jsonl").write_text(json.dumps(only) + "\n")
    with pytest.raises(DataError, match="tool_call"):
        train(replace(config, data=(str(tmp_path / "only.jsonl"),)), say=silent)


def test_seeds_change_the_run_and_repeat_it(config, tmp_path):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = replace(config, output=str(tmp_path / name), seed=seed, steps=3)
        train(run, say=silent)
        runs[name] = states(run, 3)
    same = [torch.equal(runs["a"][n], runs["b"][n]) for n in runs["a"]]
    other = [torch.equal(runs["a"][n], runs["c"][n]) for n in runs["a"]]
    assert all(same)
    assert not all(other)


def test_processes_that_do_not_train_together_are_noticed(config, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(LayerRouteError, match="torchrun"):
        train(config, say=silent)


def test_the_paper_preset_trains(config, tmp_path):
    paper = build(TrainConfig, PRESETS["paper"], {"model": config.model, "data": config.data, "steps": 2})
    paper = replace(paper, output=str(tmp_path / "paper"), dtype="float32", max_length=700)
    assert train(paper, say=silent).finished
    rates = json.loads((paper.folder / "train.json").read_text())["log"]
    assert rates[-1]["step"] == 2


WORKER = """
import sys, torch, torch.distributed as dist
from layerroute.config import build, read_yaml
from layerroute.training.options import TrainConfig
from layerroute.training.run import train
from pathlib import Path
torch.set_num_threads(1)
config = build(TrainConfig, read_yaml(Path(sys.argv[1])))
train(config, say=lambda line: None)
assert dist.is_initialized() and dist.get_world_size() == 2, "this was meant to be two processes"
"""


def launch(config, folder, worker):
    """Train on two processes that each run `worker`."""
    (folder / "two.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "worker.py").write_text(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(folder / "worker.py"), str(folder / "two.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_stop_after_the_same_update_whenever_the_signal_reaches_each(config, tmp_path):
    torn = """
from layerroute.training.run import Progress
def interrupt(self, args, state, control, **_):
    if state.global_step == 3 and args.process_index == 1:
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
Progress.on_step_end = interrupt
"""
    launch(config, tmp_path, torn + WORKER)
    assert newest_checkpoint(config.folder / "checkpoints").name == "checkpoint-3"
    assert not (config.folder / "adapter").exists()


APART = """
import os
from layerroute.training.run import Settler
settle, fit = Settler.settle, Settler.fit
def other_settle(self):
    routes, figures = settle(self)
    return routes ^ (os.environ["RANK"] == "1"), figures
def other_fit(self):
    figures = fit(self)
    if os.environ["RANK"] == "1":
        self.learner.routed.routers[-1].score.bias.data += 9.0
    return figures
Settler.settle, Settler.fit = other_settle, other_fit
"""


@pytest.mark.parametrize(("before", "heal", "parts"), [("", "all", 1), (APART, "all", 1), ("", "bypasses", 2)])
def test_two_processes_train_the_adapter_of_one(config, tmp_path, before, heal, parts):
    """Also where the second one would settle and fit otherwise, and where bypasses heal alone."""
    config = healing(config) if heal == "bypasses" else config
    one = replace(config, output=str(tmp_path / "one"), batch_size=4 // parts, accumulation=parts)
    lora = replace(one.adapter.lora, dropout=0.0)  # each process draws its own dropout
    one = replace(one, adapter=replace(one.adapter, lora=lora))
    two = replace(one, output=str(tmp_path / "two"), batch_size=2 // parts)
    train(one, say=silent)
    launch(two, tmp_path, before + WORKER)
    single, double = states(one, 6), states(two, 6)
    logs = [json.loads((run.folder / "train.json").read_text())["log"] for run in (one, two)]
    for row, other in zip(*logs, strict=True):
        assert all(
            other[key] == pytest.approx(row[key], rel=1e-3) for key in row if key.endswith(("loss", "skip_rate"))
        )
    assert single.keys() == double.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(double[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_newest_checkpoint_is_the_one_of_most_updates(tmp_path):
    for update in (8, 10, 9):
        folder = tmp_path / f"checkpoint-{update}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        (folder / STATE).touch()
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"


def test_an_adapter_keeps_bypasses_of_blocks_that_a_kind_closes_alone(config):
    train(config, say=silent)
    routed, _ = load_adapter(config.folder / "adapter", dtype="float32")
    settled = json.loads((config.folder / "train.json").read_text())["settled"]["kinds"]
    assert routed.bypasses.keys() <= {block for kind in settled.values() for block in kind["closed"]}


def test_blocks_that_no_kind_closes_run_whatever_their_router_sees(config):
    train(replace(config, router_rate=1.0), say=silent)
    saved = load_file(config.folder / "adapter" / "routers.safetensors")
    settled = json.loads((config.folder / "train.json").read_text())["settled"]["kinds"]
    closed = {block for kind in settled.values() for block in kind["closed"]}
    assert closed
    for block, (weight, bias) in enumerate(zip(saved["weight"], saved["bias"], strict=True)):
        assert bool(weight.any()) == (block in closed)
        assert bias > 0 or block in closed


def test_bypasses_are_fitted_on_the_kinds_that_close_blocks(config, monkeypatch):
    found = []

    def recording(routed, batches, say):
        found.extend(kind for batch in batches for kind in batch.kinds.tolist())

    monkeypatch.setattr("layerroute.training.run.fit_bypasses", recording)
    train(config, say=silent)
    assert found == [KINDS.index("tool_call")] * config.settle.bypass


def test_training_keeps_to_the_limit(config):
    said = []
    train(replace(config, limit=30), dry_run=True, say=said.append)
    assert any(line.startswith("train: 30 conversations") for line in said)


def test_activations_are_computed_again_where_that_is_asked(config, monkeypatch):
    asked = []
    monkeypatch.setattr(RoutedModel, "recompute", lambda routed: asked.append(True))
    for checkpointing in (False, True):
        output = str(config.folder / str(checkpointing))
        train(replace(config, checkpointing=checkpointing, output=output, steps=3), say=silent)
        assert bool(asked) == checkpointing


def test_a_second_signal_ends_the_run_at_once_and_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(silent) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("others", "stops"), [(0, False), (1, True)])
def test_processes_stop_by_what_they_agreed_on(monkeypatch, others, stops):
    """A signal while they agree is for the next update; one after another's is still this process's first."""
    arguments, control = SimpleNamespace(world_size=2, device="cpu"), TrainerControl()

    def agreeing(told, _):
        told.fill_(max(int(told), others))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.all_reduce", agreeing)
    with Interruption(silent) as interruption:
        interruption.on_step_end(arguments, None, control)
        assert control.should_training_stop == interruption.stopped == stops
        monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
        interruption.on_step_end(arguments, None, control)
        assert interruption.stopped


def test_a_resumed_run_needs_its_start_no_more(config, tmp_path):
    train(config, say=silent)
    later = replace(config, output=str(tmp_path / "later"), start=str(config.folder / "adapter"))
    train(later, say=silent)
    (config.folder / "adapter").rename(tmp_path / "gone")
    assert train(later, resume=True, say=silent).finished
