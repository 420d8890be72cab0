"""Settling finds the blocks that matter least, and routers that tell the kinds apart."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from tiny import tiny

from layerroute.config import KINDS, AdapterConfig, BudgetConfig, LoraConfig, RouterConfig, Scope, build
from layerroute.data.batches import Batch
from layerroute.data.steps import Step
from layerroute.models.attaching import attach
from layerroute.routing.router import Router
from layerroute.training import settling
from layerroute.training.options import SettleConfig, TrainConfig
from layerroute.training.run import fitting_steps
from layerroute.training.settling import (
    absence,
    blocks_to_close,
    fit_router,
    fit_routers,
    lean,
    routes_of,
    settle,
    spare_blocks,
)

HALF = BudgetConfig(tool_call=0.5, planning=0.0)


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
    # The whole context is read, because few steps have to do.
    return attach(model, AdapterConfig(router=RouterConfig(window=16), lora=LoraConfig(dropout=0.0))).eval()


@pytest.mark.parametrize("scope", get_args(Scope))
def test_absence_costs_what_a_full_pass_without_the_block_does(scope):
    config = AdapterConfig(router=RouterConfig(scope=scope), lora=LoraConfig(dropout=0.0))
    routed, batches = attach(tiny("llama"), config).eval(), [steps_of("tool_call", 4, seed) for seed in (0, 1)]
    base, cost = absence(routed, batches, {1}, [0, 2, 3])
    for block, loss in {**cost, None: base}.items():
        gates = torch.tensor([[at not in (1, block) for at in range(4)]])
        with torch.no_grad():
            outs = [routed(b.input_ids, b.context_mask, b.response_mask, forced=gates) for b in batches]
        assert abs(float(sum(out.nll.sum() for out in outs) / sum(out.tokens.sum() for out in outs)) - loss) < 1e-5


def test_the_idle_blocks_are_spared_first():
    closed, added = spare_blocks(model_with_idle(1, 3), [steps_of("tool_call", 4, 0)], 2, SettleConfig(rounds=2))
    assert closed == (1, 3)
    assert abs(added) < 1e-5


@pytest.mark.parametrize(("wanted", "closed"), [(2, (0, 2)), (3, (0, 1, 2))])
def test_neighbours_close_in_one_round_only_where_nothing_else_is_left(wanted, closed, monkeypatch):
    monkeypatch.setattr(settling, "absence", lambda *_: (0.0, {block: 0.1 * block for block in range(4)}))
    config = SettleConfig(rounds=1, shallow=0.0)
    assert spare_blocks(model_with_idle(), [steps_of("tool_call", 4, 0)], wanted, config)[0] == closed


def test_blocks_that_always_run_are_not_candidates():
    routed = attach(tiny("llama"), AdapterConfig(router=RouterConfig(always_run=(0, 1, 2)))).eval()
    assert spare_blocks(routed, [steps_of("tool_call", 4, 0)], 1, SettleConfig())[0] == (3,)


def test_shallow_blocks_stay_open_unless_the_target_needs_them():
    routed, batches = model_with_idle(0), [steps_of("tool_call", 4, 0)]
    assert 0 in spare_blocks(routed, batches, 1, SettleConfig(shallow=0.0))[0]
    assert 0 not in spare_blocks(routed, batches, 3, SettleConfig(shallow=0.25))[0]
    assert 0 in spare_blocks(routed, batches, 3, SettleConfig(shallow=0.5))[0]


@pytest.mark.parametrize(
    ("kind", "target", "recognised", "closed"),
    [
        ("tool_call", 0.25, 1.0, 8),
        ("tool_call", 0.25, 0.8, 9),
        ("tool_call", 0.8, 0.8, 27),
        ("tool_call", 0.95, 0.8, 28),
        ("planning", 0.03, 0.8, 0),
        ("planning", 0.1, 0.8, 3),
        ("planning", 0.0, 0.8, 0),
    ],
)
def test_tool_calls_reach_their_budget_and_planning_does_not_pass_its_own(kind, target, recognised, closed):
    budget = BudgetConfig(**{kind: target})
    assert blocks_to_close(kind, budget, SettleConfig(recognised=recognised), 30) == closed


def test_settled_routers_give_each_kind_its_blocks_on_unseen_steps():
    routed = model_with_idle(1, 2)
    importance = {kind: [steps_of(kind, 4, 0)] for kind in KINDS}
    settled = settle(routed, importance, HALF, SettleConfig())
    assert {kind: found.closed for kind, found in settled.items()} == {"tool_call": (1, 2), "planning": ()}
    routes = routes_of(settled, 4)
    fit_routers(routed, [steps_of(kind, 32, 1) for kind in KINDS], routes, HALF, SettleConfig(tolerance=0.1))
    rates = {}
    for kind in KINDS:
        unseen = steps_of(kind, 32, 2)
        gates = routed(unseen.input_ids, unseen.context_mask, unseen.response_mask).gates
        rates[kind] = 1 - gates.float().mean()
    assert rates["tool_call"] > 0.45
    assert rates["planning"] < 0.1


def test_routers_are_fitted_on_what_inference_will_show_them(monkeypatch):
    """Every block's pooled contexts are those of a pass in which the gates fitted before it were the route."""
    routed, seen = model_with_idle(), []
    routes = torch.tensor([[True, False, False, True], [True] * 4])
    batches = [steps_of(kind, 8, 1) for kind in KINDS]
    original = settling.fit_router

    def recording(router, pooled, runs, config, share, counted, *, level):
        gates = original(router, pooled, runs, config, share, counted, level=level)
        seen.append((pooled, gates))
        return gates

    monkeypatch.setattr(settling, "fit_router", recording)
    fit_routers(routed, batches, routes, HALF, SettleConfig())
    gates = torch.stack([gate for _, gate in seen], dim=1)
    assert len(gates.unique(dim=0)) > 1
    for batch, taken, rows in zip(batches, gates.split(8), (slice(0, 8), slice(8, 16)), strict=True):
        whole = routed.begin(batch.context_mask, batch.response_mask, forced=taken, score=True, keep_pooled=True)
        with torch.no_grad():
            routed.residuals(batch.input_ids, whole)
        for block in range(4):
            torch.testing.assert_close(seen[block][0][rows], whole.pooled[block])


def test_each_router_is_fitted_to_the_share_that_the_budget_asks_of_its_block(monkeypatch):
    shares = []

    def recording(router, pooled, runs, config, share, counted, *, level):
        shares.append(share)
        return runs

    monkeypatch.setattr(settling, "fit_router", recording)
    routes = torch.tensor([[True, False, False, True], [True, True, False, True]])
    batches = [steps_of(kind, 8, 1) for kind in KINDS]
    fit_routers(model_with_idle(), batches, routes, BudgetConfig(tool_call=0.4, planning=0.1), SettleConfig())
    assert shares[1:3] == pytest.approx([0.8, 0.8])


def test_steps_without_a_kind_to_read_fit_no_better_than_chance():
    """Were a router fitted under the kinds' own routes, the second would read the first one's work and score 100 %."""
    routed = model_with_idle()
    routes = torch.tensor([[True, False, False, False], [True] * 4])
    same = [steps_of("planning", 64, 1), steps_of("planning", 64, 2)]
    batches = [replace(batch, kinds=torch.full((64,), index)) for index, batch in enumerate(same)]
    assert abs(fit_routers(routed, batches, routes, HALF, SettleConfig(tolerance=0.5)) - 0.5) < 0.15


def test_autocast_changes_neither_a_fit_nor_a_gate():
    """Both once ran in bfloat16 under autocast: fits were noise, and training gates differed from inference."""
    fits = []
    pooled, runs = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2 == 0
    for enabled in (False, True):
        router = model_with_idle().routers[1]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            fit_router(router, pooled, runs, SettleConfig())
            fits.append((router.score.weight.clone(), router(pooled)))
    assert torch.equal(fits[0][0], fits[1][0])
    assert torch.equal(fits[0][1], fits[1][1])


def overlapping(rows, seed):
    """Inputs in 16 dimensions of steps that shall run, a quarter of them, and others, two deviations apart in one."""
    runs = torch.arange(rows) < rows // 4
    pooled = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    pooled[:, 0] += 2.0 * runs
    return pooled, runs


@torch.no_grad()
def test_a_fitted_router_keeps_unseen_steps_running():
    """Where the kinds overlap, the tolerance holds on steps the fit has not seen, and in what it says of its own."""
    router = Router(16)
    pooled, runs = overlapping(400, 0)
    gates = fit_router(router, pooled, runs, SettleConfig(tolerance=0.05))
    assert int((~gates[runs]).sum()) in (4, 5)  # of 100
    unseen, runs = overlapping(4000, 1)
    skipped = router(unseen) <= 0
    assert float(skipped[runs].float().mean()) < 0.08
    assert float(skipped[~runs].float().mean()) > 0.45


@torch.no_grad()
@pytest.mark.parametrize("value", [1.0, 0.1, 1 / 3])  # centring leaves nothing, or what rounding leaves
def test_a_router_that_sees_nothing_keeps_every_step_running(value):
    """As at block 0, where the last tokens of every context are the same."""
    router = Router(8)
    pooled = torch.full((40, 8), value)
    gates = fit_router(router, pooled, torch.arange(40) % 2 == 0, SettleConfig())
    assert bool(gates.all())
    assert bool((router(pooled) > 0).all())


@torch.no_grad()
@pytest.mark.parametrize(("shift", "kept"), [(1.5, 0.8), (4.0, 1.0)])
def test_a_router_leans_as_far_as_the_budget_allows(shift, kept):
    """Whether the kinds overlap or not, as many steps as the budget asks for are skipped, on unseen steps too."""
    router, found = Router(16), []
    for rows, seed in ((800, 0), (4000, 1)):
        pooled, runs = overlapping(rows, seed)
        pooled[:, 0] += (shift - 2.0) * runs
        found.append((pooled, runs))
    (pooled, runs), (unseen, later) = found
    gates = fit_router(router, pooled, runs, SettleConfig(tolerance=0.5), 0.75)
    skipped = router(unseen) <= 0
    assert float((~gates[~runs]).float().mean()) == pytest.approx(0.75, abs=0.005)
    assert float(skipped[~later].float().mean()) == pytest.approx(0.75, abs=0.04)
    assert float((~skipped[later]).float().mean()) == pytest.approx(kept, abs=0.1)


@torch.no_grad()
def test_the_tolerance_is_held_whatever_it_leaves_of_the_budget():
    pooled, runs = overlapping(400, 0)
    gates = fit_router(Router(16), pooled, runs, SettleConfig(tolerance=0.05), 0.99)
    assert int((~gates[runs]).sum()) in (4, 5)  # of 100
    assert float((~gates[~runs]).float().mean()) < 0.9


def test_a_budget_is_held_by_the_share_of_steps_that_skip_what_their_kind_closes():
    routes = torch.ones(len(KINDS), 30, dtype=torch.bool)
    routes[0, :8] = False
    shares = settling.shares_to_close(routes, BudgetConfig(tool_call=0.25, planning=0.03))
    assert shares.tolist() == pytest.approx([0.9375, 1.0])


@torch.no_grad()
def test_kinds_that_are_apart_are_parted_between_them_where_every_step_is_to_be_skipped():
    left_out, runs = torch.tensor([-2.0, -1.0, 3.0, 4.0]), torch.tensor([False, False, True, True])
    for share in (1.0, 1.0 - 1e-7):  # a share that rounding keeps from 1 asks for the same
        assert float(lean(left_out, runs, 0.0, share)) == pytest.approx(0.0, abs=1e-5)


def test_easy_steps_do_not_hide_how_often_hard_ones_are_skipped():
    """Four in five of those to keep running are far away; the tolerance is held on the fifth that overlaps."""
    left_out = torch.cat([torch.linspace(-1, 1, 20), torch.full((81,), 9.0)])
    hard = torch.arange(101) < 20
    wrong = {}
    for name, counted in (("all", None), ("hard", hard)):
        rise = lean(left_out, torch.arange(101) < 100, 0.1, counted=counted)
        wrong[name] = float((left_out[:20] + rise <= 0).float().mean())
    assert wrong["hard"] < 0.11 < wrong["all"]


def test_a_tolerance_over_steps_that_are_not_there_is_over_all():
    left_out, runs = torch.linspace(-1, 1, 20), torch.arange(20) < 8
    assert torch.equal(lean(left_out, runs, 0.1, counted=~runs), lean(left_out, runs, 0.1))


@pytest.mark.parametrize(
    ("offered", "bare", "wanted"), [(40, 40, (6, 2)), (40, 1, (7, 1)), (3, 40, (3, 5)), (3, 2, (3, 2))]
)
def test_three_quarters_of_the_fitting_steps_have_tools_on_offer_where_there_are_as_many(offered, bare, wanted):
    steps = [Step((1, 2), 1, "planning", str(index), "x", index < offered) for index in range(offered + bare)]
    steps += [Step((1, 2), 1, "tool_call", "c", "x", True)] * 20
    chosen = fitting_steps(steps, 8, seed=0)
    planning = [step.tools_offered for step in chosen if step.kind == "planning"]
    assert (sum(planning), len(planning) - sum(planning)) == wanted
    assert len(chosen) - len(planning) == 8


def test_where_a_first_token_decides_fitting_steps_are_drawn_as_they_come():
    steps = [Step((1, 2), 1, "planning", str(index), "x", index < 40) for index in range(400)]
    steps += [Step((1, 2), 1, "tool_call", "c", "x", True)] * 20
    shares = [
        sum(step.tools_offered for step in fitting_steps(steps, 100, seed, mostly_offered=False)[20:])
        for seed in range(9)
    ]
    assert 5 < sum(shares) / 9 < 15


@pytest.mark.parametrize("threshold", [0.2, 0.95])
def test_another_threshold_gives_the_same_gates(threshold):
    routes, batches = torch.tensor([[True, False, True, True], [True] * 4]), [steps_of(kind, 32, 1) for kind in KINDS]
    found = []
    for own in (0.5, threshold):
        routed = attach(tiny("llama"), AdapterConfig(router=RouterConfig(threshold=own))).eval()
        inputs = (batches[0].input_ids, batches[0].context_mask, batches[0].response_mask)
        assert routed(*inputs).gates.all()
        fit_routers(routed, batches, routes, HALF, SettleConfig())
        found.append(routed(*inputs).gates)
    assert torch.equal(*found)
    assert not found[0].all()


@pytest.mark.parametrize("scope", get_args(Scope))
def test_only_scope_continuation_tells_by_the_responses_first_token(scope):
    def asked(index, seed):
        """Contexts say nothing of the kind and differ in length; the first token of the response says it."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 97, (32, 24), generator=draw)
        place, length = torch.arange(24)[None], torch.randint(5, 18, (32, 1), generator=draw)
        ids[place == length] = 10 + index
        return Batch(ids, place < length, (place >= length) & (place < length + 5), torch.full((32,), index))

    routed = attach(tiny("llama"), AdapterConfig(router=RouterConfig(scope=scope))).eval()
    routes = torch.tensor([[True, False, False, True], [True] * 4])
    match = fit_routers(routed, [asked(0, 0), asked(1, 1)], routes, HALF, SettleConfig())
    right = []
    for index in (0, 1):
        batch = asked(index, 2 + index)
        gates = routed(batch.input_ids, batch.context_mask, batch.response_mask).gates
        right.append(float((gates == routes[index])[:, 1:3].float().mean()))
    known = scope == "continuation"
    assert (match > 0.9) == (sum(right) / 2 > 0.8) == known, (match, right)


def test_a_router_that_decides_nothing_is_not_fitted():
    routed = attach(tiny("llama"), AdapterConfig(router=RouterConfig(always_run=(2,)))).eval()
    before = [router.score.bias.clone() for router in routed.routers]
    routes = torch.tensor([[True, False, True, True], [True] * 4])
    fit_routers(routed, [steps_of(kind, 8, 1) for kind in KINDS], routes, HALF, SettleConfig())
    changed = [not torch.equal(a, router.score.bias) for a, router in zip(before, routed.routers, strict=True)]
    assert changed == [True, True, False, True]


def test_what_closing_blocks_adds_is_measured_from_all_blocks_open():
    routed, batches = model_with_idle(), [steps_of("tool_call", 4, 0)]
    closed, added = spare_blocks(routed, batches, 2, SettleConfig(rounds=2))
    before, after = (absence(routed, batches, set(blocks), [])[0] for blocks in ((), closed))
    assert added == pytest.approx(after - before)
    assert abs(added) > 1e-3


def test_every_round_closes_its_share(monkeypatch):
    closed_before = []

    def recording(routed, batches, closed, candidates):
        closed_before.append(len(closed))
        return 0.0, {block: float(block) for block in candidates}

    monkeypatch.setattr(settling, "absence", recording)
    spare_blocks(model_with_idle(), [], 3, SettleConfig(rounds=2, shallow=0.0))
    assert closed_before == [0, 2, 3]


def test_routers_are_never_fitted_before_routes_are_settled():
    config = build(TrainConfig, {"steps": 10, "settle.at": 0.5, "settle.free": 0.54})
    assert config.turning_points == (5, 6)
