"""Bypasses are fitted to what blocks do, before any block is chosen."""

from dataclasses import astuple
from typing import get_args

import pytest
import torch
from tiny import tiny

from layerroute.config import AdapterConfig, BypassConfig, LoraConfig, RouterConfig, Scope
from layerroute.data.batches import Batch
from layerroute.errors import ConfigError
from layerroute.models.attaching import attach
from layerroute.training.bypassing import drop_bypasses, fit_along, fit_bypasses, moments
from layerroute.training.settling import absence

HIDDEN = 32
KIND = torch.arange(2).repeat_interleave(40)


def silent(_line):
    """Say nothing."""


def steps(rows, seed=0):
    ids = torch.randint(3, 97, (rows, 24), generator=torch.Generator().manual_seed(seed))
    context = (torch.arange(24) < 16).expand(rows, 24)
    return Batch(ids, context, ~context, torch.zeros(rows, dtype=torch.int64))


def linear_inside(rank):
    """A model whose block 1 is linear in its normed input, of rank 3: attention does nothing, and nor does its MLP."""
    model = tiny("llama")
    low = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(1))
    high = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    routed = attach(model, AdapterConfig(bypass=BypassConfig(rank=rank))).eval()
    block = routed.blocks[1].block
    block.register_forward_hook(lambda _, args, out: args[0] + block.input_layernorm(args[0]) @ low @ high / 8)
    return routed


def lost(routed, batch, closed):
    """Return how far the last residuals move when blocks are closed, mean square."""
    gates = torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        whole = routed.residuals(batch.input_ids, routed.begin(batch.context_mask, None, forced=gates))
        gates[0, closed] = False
        some = routed.residuals(batch.input_ids, routed.begin(batch.context_mask, None, forced=gates))
    return float((whole - some).square().mean())


def test_a_linear_block_is_found_exactly_by_a_bypass_as_wide():
    seen, unseen = steps(40), steps(8, seed=1)
    losses = []
    for rank in (0, 1, 2, 3):
        routed = linear_inside(rank)
        if rank:
            fit_bypasses(routed, [seen], lambda _: None)
        losses.append(lost(routed, unseen, [1]))
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 1e-3 * losses[0]
    assert losses[2] > 1e-2 * losses[0]


def moved_a_little(bypass):
    """Eight times, move one of a map's matrices a little, and move it back."""
    for seed in range(4):
        for matrix in (bypass.down.weight, bypass.up.weight):
            kept = matrix.detach().clone()
            noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed))
            matrix.add_(0.02 * kept.norm() / noise.norm() * noise)
            yield
            matrix.copy_(kept)


@torch.no_grad()
def test_no_map_of_its_rank_has_less_error_on_what_it_was_fitted_on():
    routed, batch = attach(tiny("llama"), AdapterConfig(bypass=BypassConfig(rank=4))).eval(), steps(40)
    fit_bypasses(routed, [batch], lambda _: None)
    run = routed.begin(batch.context_mask, None, forced=torch.ones(1, 4, dtype=torch.bool), keep_residuals=True)
    routed.residuals(batch.input_ids, run)

    def error(block):
        before, after = run.residuals[block], run.residuals[block + 1]
        bypass = routed.blocks[block].bypass
        off = after - bypass(before, routed.blocks[block].normed(before))
        return float((off.square() / before.square().mean(dim=2, keepdim=True)).mean())

    for block in (0, 1, 2):
        least = error(block)
        assert all(error(block) > least for _ in moved_a_little(routed.blocks[block].bypass))


def test_sums_are_not_rounded_where_the_model_computes_in_bfloat16():
    routed = attach(tiny("llama").bfloat16(), AdapterConfig(bypass=BypassConfig(rank=4))).eval()
    with routed.precision():
        for square, _ in moments(routed, [steps(40)]):
            assert float((square - square.T).abs().max()) < 1e-6 * float(square.diagonal().mean())


@pytest.mark.parametrize("scope", get_args(Scope))
def test_blocks_are_judged_with_the_bypasses_just_fitted(scope):
    config = AdapterConfig(bypass=BypassConfig(rank=8), router=RouterConfig(scope=scope))
    routed = attach(tiny("llama").bfloat16(), config).eval()
    batch = steps(40)
    with routed.precision():
        idle = absence(routed, [batch], {1, 2}, [])
        fit_bypasses(routed, [batch], lambda _: None)
        fitted = absence(routed, [batch], {1, 2}, [])
    with routed.precision():
        assert fitted == absence(routed, [batch], {1, 2}, [])
    assert fitted != idle


@pytest.mark.parametrize("scope", get_args(Scope))
def test_a_block_that_every_step_runs_leaves_its_bypass_alone(scope):
    config = AdapterConfig(bypass=BypassConfig(rank=4), router=RouterConfig(scope=scope))
    routed = attach(tiny("llama"), config).eval()
    called = []
    for index, block in enumerate(routed.blocks):
        block.bypass.register_forward_hook(lambda *_, index=index: called.append(index))
    absence(routed, [steps(4)], {2}, [])
    assert called == [2]


@pytest.mark.parametrize("scope", ["response", "continuation"])
def test_bypasses_are_fitted_on_what_the_scope_skips(scope):
    config = AdapterConfig(bypass=BypassConfig(rank=4), router=RouterConfig(scope=scope))
    found = []
    for kept in (slice(None), slice(15, None)):  # the same responses; a causal model reads other contexts differently
        routed = attach(tiny("llama"), config)
        batch = steps(8)
        context = batch.context_mask.clone()
        context[:, : kept.start or 0] = False
        fit_bypasses(routed, [Batch(batch.input_ids, context, batch.response_mask, batch.kinds)], lambda _: None)
        found.append(routed.blocks[1].bypass.up.weight @ routed.blocks[1].bypass.down.weight)
    assert torch.equal(*found)


def bypassed(scope="step"):
    """A model with bypasses of rank 4, fitted one by one on `steps(40)`."""
    config = AdapterConfig(bypass=BypassConfig(rank=4), router=RouterConfig(scope=scope))
    routed = attach(tiny("llama"), config).eval()
    fit_bypasses(routed, [steps(40)], silent)
    return routed


CALLS_SKIP = torch.tensor([[True, False, False, True], [True, True, True, True]])


@pytest.mark.parametrize("scope", get_args(Scope))
def test_along_the_route_the_first_closed_block_gets_the_map_it_had_and_the_next_another(scope):
    routed = bypassed(scope)
    maps = [(b.bypass.up.weight @ b.bypass.down.weight).detach().clone() for b in routed.blocks]
    fit_along(routed, [steps(40)], CALLS_SKIP, silent)
    after = [(b.bypass.up.weight @ b.bypass.down.weight).detach() for b in routed.blocks]
    assert torch.allclose(after[1], maps[1], atol=1e-5)
    assert not torch.allclose(after[2], maps[2], atol=1e-3)
    assert all(torch.equal(after[block], maps[block]) for block in (0, 3))


@torch.no_grad()
@pytest.mark.parametrize("scope", get_args(Scope))
def test_along_the_route_no_map_brings_tokens_nearer_to_where_all_blocks_bring_them(scope):
    routed, batch = bypassed(scope), steps(40)

    def off():
        runs = []
        for gates in (torch.ones(1, 4, dtype=torch.bool), CALLS_SKIP[:1]):
            run = routed.begin(batch.context_mask, batch.response_mask, forced=gates, keep_residuals=True)
            routed.residuals(batch.input_ids, run)
            runs.append(run)
        skipped = torch.ones_like(batch.context_mask) if runs[0].skippable is None else runs[0].skippable
        whole, some = (run.residuals[3][skipped] for run in runs)
        return float(((whole - some).square() / runs[1].residuals[2][skipped].square().mean(1, keepdim=True)).mean())

    one_by_one = off()
    fit_along(routed, [batch], CALLS_SKIP, silent)
    assert (least := off()) < one_by_one
    assert all(off() > least for _ in moved_a_little(routed.blocks[2].bypass))


def test_along_the_route_only_steps_that_skip_a_block_count_for_its_map():
    found = []
    for mixed in (False, True):
        routed, calls, plans = bypassed(), steps(40), steps(40, seed=1)
        batch = Batch(*(torch.cat(pair) for pair in zip(astuple(calls)[:3], astuple(plans)[:3], strict=True)), KIND)
        fit_along(routed, [batch if mixed else calls], CALLS_SKIP, silent)
        found.append([block.bypass.up.weight @ block.bypass.down.weight for block in routed.blocks])
    for alone, together in zip(*found, strict=True):
        assert torch.allclose(alone, together, atol=1e-5)


def test_without_steps_bypasses_stay_as_they_are():
    routed = attach(tiny("llama"), AdapterConfig(bypass=BypassConfig(rank=4)))
    fit_bypasses(routed, [], lambda _: None)
    assert all(block.bypass.is_idle for block in routed.blocks)


def test_blocks_that_no_kind_closes_lose_their_bypass():
    routed = attach(tiny("llama"), AdapterConfig(bypass=BypassConfig(rank=4)))
    fit_bypasses(routed, [steps(8)], lambda _: None)
    assert [block.bypass.is_idle for block in routed.blocks] == [False, False, False, True]
    drop_bypasses(routed, [2])
    assert [block.bypass.is_idle for block in routed.blocks] == [True, True, False, True]


def test_pads_are_not_fitted_on():
    found = []
    for more in (0, 9):
        routed = attach(tiny("llama"), AdapterConfig(bypass=BypassConfig(rank=4)))
        batch = steps(8)
        pads = torch.zeros(8, more, dtype=torch.bool)
        ids = torch.cat([batch.input_ids, torch.full((8, more), 50)], 1)
        masks = (torch.cat([mask, pads], 1) for mask in (batch.context_mask, batch.response_mask))
        fit_bypasses(routed, [Batch(ids, *masks, batch.kinds)], lambda _: None)
        bypass = routed.blocks[1].bypass
        found.append(bypass.up.weight @ bypass.down.weight)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_bypass_wider_than_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"bypass.rank: 33.*at most 32"):
        attach(tiny("llama"), AdapterConfig(bypass=BypassConfig(rank=33)))


def test_dropout_is_off_while_bypasses_are_fitted():
    found = []
    for training in (False, True):
        config = AdapterConfig(bypass=BypassConfig(rank=4), lora=LoraConfig(dropout=0.5))
        routed = attach(tiny("llama"), config).train(training)
        torch.manual_seed(1)
        for name, parameter in routed.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        fit_bypasses(routed, [steps(8)], lambda _: None)
        found.append(routed.blocks[1].bypass.up.weight @ routed.blocks[1].bypass.down.weight)
    assert torch.equal(*found)


def test_the_two_halves_of_each_direction_are_equally_long():
    routed = attach(tiny("llama"), AdapterConfig(bypass=BypassConfig(rank=4))).eval()
    fit_bypasses(routed, [steps(40)], lambda _: None)
    for block in routed.blocks[:-1]:
        torch.testing.assert_close(block.bypass.down.weight.norm(dim=1), block.bypass.up.weight.norm(dim=0))
