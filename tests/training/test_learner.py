"""The learner: whose gates a step gets, and who answers for skip rates."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from tiny import tiny
from transformers import Trainer, get_cosine_schedule_with_warmup

from layerroute.config import KINDS, AdapterConfig, RouterConfig, Scope, build
from layerroute.models.attaching import RoutedOutput, attach
from layerroute.routing.budget import kind_totals
from layerroute.training.options import TrainConfig
from layerroute.training.trainer import Learner, Meter, RouteTrainer, spans_of, training_arguments, uniform

BYPASS = {"adapter.bypass.rank": 2}
ALONE = BYPASS | {"settle.heal": "bypasses", "settle.crossed": 0.0}
HELD = torch.tensor([[True, False, False, False], [True, True, True, False]])


def held_routes(crossed, rows=4000):
    """The routes of `rows` steps of each kind, (rows of both kinds, blocks) bool, and the kinds."""
    learner = Learner(attach(tiny("llama")), build(TrainConfig, {"settle.crossed": crossed}))
    learner.held.copy_(HELD)
    kinds = torch.arange(len(KINDS)).repeat_interleave(rows)
    contexts = torch.randint(3, 90, (len(kinds), 24), generator=torch.Generator().manual_seed(0))
    return learner._held_routes(contexts, kinds), kinds


def test_without_crossing_each_kind_is_on_its_own_route():
    routes, kinds = held_routes(0.0)
    assert torch.equal(routes, HELD[kinds])


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_gates_cross_in_the_share_asked_for_and_only_where_the_kinds_differ(share):
    routes, kinds = held_routes(share)
    crossed = routes != HELD[kinds]
    assert not crossed[:, [0, 3]].any()
    for kind in range(len(KINDS)):
        assert crossed[kinds == kind][:, 1:3].float().mean() == pytest.approx(share, abs=0.02)


def test_whole_routes_cross_and_single_gates_do():
    """Gates drawn one by one would both cross in 4 % of the steps; steps drawn whole would never cross one alone."""
    routes, kinds = held_routes(0.2)
    crossed = (routes != HELD[kinds])[:, 1:3].sum(dim=1)
    assert (crossed == 2).float().mean() > 0.08
    assert (crossed == 1).float().mean() > 0.1


def test_a_step_draws_the_same_alone_and_in_any_batch():
    seeds = torch.arange(50)[:, None] * 977
    assert torch.equal(uniform(seeds, 7)[23:24], uniform(seeds[23:24], 7))
    assert uniform(seeds, 7).unique().numel() > 340


@pytest.mark.parametrize(("objective", "reaches_lora"), [("budget", False), ("paper", True)])
def test_the_budget_pulls_on_routers_alone(objective, reaches_lora):
    """Through the residual it would pull on LoRA, which can meet the budget on training steps by heart."""
    learner = Learner(attach(tiny("llama")), build(TrainConfig, {"objective": objective}))
    learner.fitted.fill_(True)
    with torch.no_grad():
        for router in learner.routed.routers:
            router.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    context = (torch.arange(12) < 8)[None]
    out = learner(torch.arange(3, 15)[None], context, ~context, torch.zeros(1, dtype=torch.int64))
    out.logits.sum().backward()
    grads = {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}
    assert all(grads[name].abs().sum() > 0 for name in grads if ".router." in name)
    assert any(grad is not None and grad.abs().sum() > 0 for n, grad in grads.items() if "lora" in n) == reaches_lora


def test_under_scope_response_the_context_runs_every_block_whatever_the_loss_is_taken_on():
    model, kinds = attach(tiny("llama"), AdapterConfig(router=RouterConfig(scope="response"))), torch.tensor([0])
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    context = (torch.arange(12) < 8)[None]
    on_context = []
    for closed in (False, True):
        nll = {}
        for tokens in ("all", "response"):
            learner = Learner(model, build(TrainConfig, {"loss_tokens": tokens, "settle.crossed": 0})).eval()
            learner.held[0, 1:3] = not closed
            nll[tokens] = learner(ids, context, ~context, kinds).nll
        on_context.append(nll["all"] - nll["response"])
    torch.testing.assert_close(*on_context)


def test_while_routes_are_held_the_loss_sends_routers_no_gradient():
    learner = Learner(attach(tiny("llama")), build(TrainConfig, {}))
    learner.held[0, 1:3] = False
    context = (torch.arange(12) < 8)[None]
    learner(torch.arange(3, 15)[None], context, ~context, torch.zeros(1, dtype=torch.int64)).nll.sum().backward()
    grads = [p.grad for name, p in learner.named_parameters() if ".router." in name]
    assert all(grad is None or not grad.any() for grad in grads)


@pytest.mark.parametrize(("tokens", "count"), [("response", 4), ("all", 11)])
def test_the_loss_is_taken_on_the_tokens_asked_for(tokens, count):
    learner = Learner(attach(tiny("llama")), build(TrainConfig, {"loss_tokens": tokens}))
    context = (torch.arange(12) < 8)[None]
    out = learner(torch.arange(3, 15)[None], context, ~context, torch.zeros(1, dtype=torch.int64))
    assert out.tokens.tolist() == [count]  # nothing comes before the first


def test_what_a_step_crosses_depends_on_its_context_alone():
    learner = Learner(attach(tiny("llama")), build(TrainConfig, {"settle.crossed": 0.5}))
    learner.held.copy_(HELD)
    draw = torch.Generator().manual_seed(0)
    context, kinds = torch.randint(3, 90, (64, 8), generator=draw), torch.arange(64) % 2
    found = []
    for response, pads in ((4, 0), (2, 9)):
        ids = torch.cat([context, torch.randint(3, 90, (64, response), generator=draw), torch.full((64, pads), 7)], 1)
        place = torch.arange(ids.shape[1]).expand(64, -1)
        found.append(learner(ids, place < 8, (place >= 8) & (place < 8 + response), kinds).gates)
    assert torch.equal(*found)
    assert not torch.equal(found[0], HELD[kinds])


def test_each_part_learns_at_its_own_rate_and_router_biases_do_not_decay():
    rates = {"lora_rate": 0.1, "bypass_rate": 0.2, "router_rate": 0.3, "bias_rate": 0.4, "weight_decay": 0.5}
    config = build(TrainConfig, rates, {"adapter.bypass.rank": 2})
    learner = Learner(attach(tiny("llama"), config.adapter), config)
    optimizer = RouteTrainer.create_optimizer(SimpleNamespace(learner=learner))
    names = {id(parameter): name for name, parameter in learner.named_parameters() if parameter.requires_grad}
    found = {names.pop(id(p)): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert not names
    parts = {"lora_": (0.1, 0.5), ".bypass.": (0.2, 0.5), "score.weight": (0.3, 0.5), "score.bias": (0.4, 0.0)}
    for part, wanted in parts.items():
        assert {got for name, got in found.items() if part in name} == {wanted}


def resting(**options):
    """A learner whose LoRA rests, its tool calls closing blocks 1 to 3."""
    config = build(TrainConfig, BYPASS, {"settle.heal": "bypasses", **options})
    learner = Learner(attach(tiny("llama"), config.adapter), config)
    learner.held.copy_(torch.tensor([[True, False, False, False], [True, True, True, True]]))
    learner.settled.fill_(True)
    return learner


def test_lora_rests_from_the_settling_on_where_bypasses_heal_alone():
    learner = resting()
    assert learner.lora_rests
    assert learner.contexts_rest
    assert not resting(loss_tokens="all").contexts_rest
    learner.settled.fill_(False)
    assert not learner.lora_rests
    assert not learner.contexts_rest
    for other in ({"settle.heal": "all"}, {"objective": "paper"}):
        assert not resting(**other).lora_rests


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("scope", get_args(Scope))
def test_a_resting_lora_lets_contexts_rest_and_bypasses_learn_the_same(scope, rounded):
    """Recomputing activations asks for whole passes: the same loss, and the same gradient of every bypass."""
    found = []
    for checkpointing in (False, True):
        learner = resting(**{"settle.crossed": 0.0, "adapter.router.scope": scope, "checkpointing": checkpointing})
        for block in learner.routed.blocks:
            torch.nn.init.normal_(block.bypass.up.weight, generator=torch.Generator().manual_seed(1))
        ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
        context = torch.arange(12) < torch.tensor([[8], [5], [9], [7]])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounded):
            out = learner(ids, context, ~context, torch.tensor([0, 0, 1, 0]))
        assert learner.contexts_rest != checkpointing
        out.nll.sum().backward()
        grads = {n: p.grad for n, p in learner.named_parameters() if ".bypass." in n and p.grad is not None}
        found.append((out.nll, out.gates, out.tokens, {name: grad for name, grad in grads.items() if grad.any()}))
    apart, whole = found
    tolerance = 0.1 if rounded else 1e-4
    torch.testing.assert_close(apart, whole, atol=tolerance, rtol=tolerance)
    assert len(apart[3]) == 6  # the halves of three bypasses


@pytest.mark.parametrize(("heal", "rests"), [("bypasses", True), ("bypasses", False), ("all", True)])
def test_where_bypasses_heal_alone_what_does_not_learn_gets_no_gradient(monkeypatch, heal, rests):
    """A gradient would count in clipping, and one of zeros among Adam's updates."""
    trainer = object.__new__(RouteTrainer)
    trainer.learner = resting(**{"settle.heal": heal})
    trainer.learner.settled.fill_(rests)

    def backward(*_):
        for parameter in trainer.learner.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(Trainer, "training_step", backward)
    trainer.training_step(None, {})
    learning = {name: p.grad is not None for name, p in trainer.learner.named_parameters() if p.requires_grad}
    assert learning == {name: heal == "all" or (".lora_" in name) != rests for name in learning}


def test_each_part_has_a_cosine_over_the_updates_in_which_it_learns():
    config = build(TrainConfig, {"steps": 40, "warmup": 0.1, "settle.at": 0.5, "settle.heal": "bypasses"}, BYPASS)
    learner = Learner(attach(tiny("llama"), config.adapter), config)
    trainer = SimpleNamespace(learner=learner)
    trainer.optimizer = RouteTrainer.create_optimizer(trainer)
    scheduler, rates = RouteTrainer.create_scheduler(trainer, 40), []
    for _ in range(40):
        rates.append([group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        scheduler.step()
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    alone, wanted = get_cosine_schedule_with_warmup(plain, 2, 20), []  # what LoRA alone gets in a run of 20 updates
    for _ in range(20):
        wanted.append(plain.param_groups[0]["lr"])
        plain.step()
        alone.step()
    lora, *others = zip(*rates, strict=True)
    assert lora == pytest.approx([*wanted, *[0.0] * 20])
    for part in others:
        assert part == pytest.approx([*[0.0] * 20, *wanted])


def test_the_papers_penalty_is_the_weighted_mean_of_soft_gates():
    learner = Learner(attach(tiny("llama")), build(TrainConfig, {"objective": "paper", "gate_weight": 0.5}))
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]])
    out = RoutedOutput(torch.zeros(2), torch.ones(2), logits > 0, logits)
    loss = RouteTrainer._route_loss(SimpleNamespace(learner=learner), out, None, None, None, 1)
    assert float(loss) == pytest.approx(0.5 * float(logits.sigmoid().mean()))


def test_the_trainer_gets_the_options_of_the_run(tmp_path):
    given = {"steps": 40, "warmup": 0.25, "clip": 0.3, "batch_size": 3, "accumulation": 5, "save_every": 9, "seed": 7}
    config = build(TrainConfig, given, {"dtype": "float32", "output": str(tmp_path)})
    found = training_arguments(config, log_every=4, device="cpu")
    assert (found.max_steps, found.warmup_steps, found.max_grad_norm) == (40, 10, 0.3)
    assert (found.lr_scheduler_type, found.bf16, found.seed, found.save_steps) == ("cosine", False, 7, 9)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (3, 5)


def test_what_training_keeps_of_a_run_lies_where_its_model_does():
    config = build(TrainConfig, {})
    learner = Learner(attach(tiny("llama").to("meta"), config.adapter), config)
    assert {tensor.device.type for tensor in learner.changed().values()} == {"meta"}


def test_the_meter_reads_loss_a_token_and_skip_rate_a_step_and_starts_again():
    meter, kinds = Meter(), torch.tensor([0, 0, 1])
    for skipped in ([0.5, 0.0, 0.0], [0.5, 1.0, 0.5]):
        steps = torch.tensor([[6.0, 2.0, 3.0], [3.0, 5.0, 2.0], skipped, [1.0, 1.0, 1.0]])
        meter.add(kind_totals(steps, kinds))
    assert meter.read() == {
        "tool_call/loss": 1.0, "tool_call/skip_rate": 0.5, "planning/loss": 1.5, "planning/skip_rate": 0.25,
    }  # fmt: skip
    assert meter.read() == {}


@pytest.mark.parametrize(
    ("options", "closing", "shares"),
    [
        ({}, ["tool_call"], [(20, 0.5)]),
        (BYPASS, ["tool_call"], [(20, 0.5)]),
        (BYPASS | {"settle.heal": "bypasses"}, ["tool_call"], [(20, 0.5)]),  # planning learns from the gates that cross
        (ALONE, ["tool_call"], [(6, 0.5), (10, 1.0), (4, 0.5)]),
        (ALONE, ["planning"], [(6, 0.5), (10, 0.0), (4, 0.5)]),
        (ALONE, ["tool_call", "planning"], [(20, 0.5)]),
    ],
)
def test_while_bypasses_alone_learn_a_kind_that_closes_none_steps_aside(options, closing, shares):
    assert spans_of(build(TrainConfig, {"steps": 20, **options}), closing) == shares
