"""Settling finds the blocks that matter least, and routers that tell the kinds apart."""

import torch
from tiny import tiny

from layerroute.config import KINDS, AdapterConfig, BudgetConfig, LoraConfig, RouterConfig
from layerroute.data.batches import Batch
from layerroute.models.attaching import attach
from layerroute.training.options import SettleConfig
from layerroute.training.settling import absence, fit_routers, ridge, routes_of, settle, spare_blocks


def steps_of(kind, rows, seed):
    """Contexts of the two kinds use different tokens, so that the kind can be read from the context."""
    low, high = ((3, 50), (50, 97))[KINDS.index(kind)]
    ids = torch.randint(low, high, (rows, 24), generator=torch.Generator().manual_seed(seed))
    context = (torch.arange(24) < 16).expand(rows, 24)
    return Batch(ids, context, ~context, torch.full((rows,), KINDS.index(kind)))


def model_with_idle(*idle):
    """A model whose `idle` blocks do nothing, so that skipping them costs exactly nothing."""
    model = tiny("llama")
    for block in idle:
        for projection in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
            torch.nn.init.zeros_(projection.weight)
    return attach(model, AdapterConfig(lora=LoraConfig(dropout=0.0))).eval()


def test_absence_equals_a_full_pass_without_the_block():
    routed, batch = model_with_idle(), steps_of("tool_call", 4, 0)
    base, cost = absence(routed, [batch], {1}, [0, 2, 3])
    for block, loss in {**cost, None: base}.items():
        gates = torch.ones(1, 4, dtype=torch.bool)
        gates[:, [1] if block is None else [1, block]] = False
        with torch.no_grad():
            out = routed(batch.input_ids, batch.context_mask, batch.response_mask, forced=gates)
        assert abs(float(out.nll.sum() / out.tokens.sum()) - loss) < 1e-5


def test_the_idle_blocks_are_spared_first():
    closed, added = spare_blocks(model_with_idle(1, 3), [steps_of("tool_call", 4, 0)], 0.5, 2)
    assert closed == (1, 3)
    assert abs(added) < 1e-5


def test_blocks_that_always_run_are_not_candidates():
    routed = attach(tiny("llama"), AdapterConfig(router=RouterConfig(always_run=(0, 1, 2)))).eval()
    assert spare_blocks(routed, [steps_of("tool_call", 4, 0)], 0.25, 1)[0] == (3,)


def test_settled_routers_give_each_kind_its_blocks_on_unseen_steps():
    routed = model_with_idle(1, 2)
    importance = {kind: [steps_of(kind, 4, 0)] for kind in KINDS}
    settled = settle(routed, importance, BudgetConfig(tool_call=0.5, planning=0.0), SettleConfig())
    assert {kind: found.closed for kind, found in settled.items()} == {"tool_call": (1, 2), "planning": ()}
    fit_routers(routed, [steps_of(kind, 32, 1) for kind in KINDS], routes_of(settled, 4), SettleConfig())
    rates = {}
    for kind in KINDS:
        unseen = steps_of(kind, 32, 2)
        gates = routed(unseen.input_ids, unseen.context_mask, unseen.response_mask).gates
        rates[kind] = 1 - gates.float().mean()
    assert rates["tool_call"] > 0.45
    assert rates["planning"] < 0.1


def test_ridge_separates_classes_of_unequal_size():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    x[:10, 0] += 6
    y = torch.where(torch.arange(60) < 10, 1.0, -1.0)
    weight, bias = ridge(x, y, 0.1)
    assert torch.equal((x @ weight + bias) > 0, y > 0)
