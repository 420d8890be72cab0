"""The learner: whose gates a step gets, and who answers for skip rates."""

import pytest
import torch
from tiny import tiny

from layerroute.config import KINDS, AdapterConfig, RouterConfig, build
from layerroute.models.attaching import attach
from layerroute.training.options import TrainConfig
from layerroute.training.trainer import Learner, uniform

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
