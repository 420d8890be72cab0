"""A pass that goes on from the shared columns says what a pass over the whole batch says."""

from typing import get_args

import pytest
import torch
from tiny import FAMILIES, tiny

from layerroute.config import AdapterConfig, BypassConfig, LoraConfig, RouterConfig, Scope
from layerroute.models.attaching import attach
from layerroute.models.prefix import SharedPrefix

CONTEXTS, LENGTHS, WIDTH = torch.tensor([[9], [12], [7]]), torch.tensor([[15], [18], [8]]), 18
STARTS = {"step": 0, "response": 7, "continuation": 10}  # the third row's response is one token, which no gate skips


def attached(family="llama", scope="continuation"):
    config = AdapterConfig(router=RouterConfig(scope=scope), lora=LoraConfig(dropout=0.0), bypass=BypassConfig(rank=3))
    routed = attach(tiny(family), config).eval()
    for block in routed.blocks:
        torch.nn.init.normal_(block.bypass.up.weight, std=0.3)
    return routed


@pytest.fixture
def batch():
    place = torch.arange(WIDTH)[None]
    ids = torch.randint(3, 97, (3, WIDTH), generator=torch.Generator().manual_seed(0))
    return ids * (place < LENGTHS), place < CONTEXTS, (place >= CONTEXTS) & (place < LENGTHS)


@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_is_scored_as_by_a_whole_pass(family, scope, batch):
    """Block 0 closed too, and one route after another: none may change what they share."""
    routed = attached(family, scope)
    shared = SharedPrefix(routed, *batch)
    assert shared.start == STARTS[scope]
    closed = ([], [0], [1, 2], [3], [0, 1, 2, 3])
    gates = [torch.tensor([[block not in each for block in range(4)]]) for each in closed]
    gates.append(torch.tensor([[True] * 4, [False, True, True, False], [True, False, True, True]]))
    ids, context, response = batch
    with torch.no_grad():
        for each in gates:
            part, whole = shared.run(each)[0], routed(ids, context, response, forced=each)
            torch.testing.assert_close(part.nll, whole.nll, atol=2e-4, rtol=1e-4)
            assert torch.equal(part.tokens, whole.tokens)
            assert torch.equal(part.gates, whole.gates)


def test_a_pass_may_start_at_a_block_with_what_another_kept(batch):
    shared = SharedPrefix(attached(), *batch)
    gates = torch.tensor([[True, False, True, True]])
    with torch.no_grad():
        _, whole = shared.run(gates, keep_residuals=True)
        fewer = torch.tensor([[True, False, False, True]])
        entered, _ = shared.run(fewer, entry=(2, whole.residuals[2]))
        assert torch.equal(entered.nll, shared.run(fewer)[0].nll)


def test_shared_columns_run_once_and_send_nothing_back(batch):
    routed, widths = attached(), []
    shared = SharedPrefix(routed, *batch)
    assert any(parameter.requires_grad for parameter in routed.parameters())
    assert not any(layer.keys.requires_grad for layer in shared._cache.layers)
    routed.blocks[3].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    with torch.no_grad():
        shared.run(torch.ones(1, 4, dtype=torch.bool))
        shared.run(torch.tensor([[False, True, True, True]]))
    assert widths == [WIDTH - 10] * 2


def test_nothing_is_shared_where_the_rotary_embedding_changes_with_the_length(batch):
    routed = attached()
    routed.base.config.rope_parameters["rope_type"] = "dynamic"
    assert SharedPrefix(routed, *batch).start == 0


def test_responses_that_no_gate_skips_cost_every_route_as_much(batch):
    ids, context, _ = batch
    one_token = (torch.arange(WIDTH)[None] == CONTEXTS) | torch.zeros_like(context)
    shared = SharedPrefix(attached(), ids, context, one_token)
    with torch.no_grad():
        opened, closed = (shared.run(torch.full((1, 4), is_open))[0].nll for is_open in (True, False))
    assert torch.equal(opened, closed)
    assert bool((opened > 0).all())
