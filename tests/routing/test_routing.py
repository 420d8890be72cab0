"""Routers, routes, the blend and the budget: pure torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerroute.config import KINDS, BudgetConfig, RouterConfig
from layerroute.errors import ConfigError
from layerroute.routing.budget import BudgetController, rate_totals
from layerroute.routing.route import Route
from layerroute.routing.routed import RoutePass, Tape, blend, straight_through
from layerroute.routing.router import Pool, Router, initial_bias, read_and_skipped, threshold_logit


def mask_of(lengths, width=12):
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["last", "mean"]),
    st.integers(1, 14),
)
def test_the_pool_is_the_mean_of_the_tokens_the_config_names(lengths, skip_first, pooling, window):
    config = RouterConfig(pooling=pooling, window=window, skip_first=skip_first, normalise=False)
    hidden = torch.randn(len(lengths), 12, 3, generator=torch.Generator().manual_seed(0))
    got = Pool.over(mask_of(lengths), config)(hidden)
    for row, length in enumerate(lengths):
        tokens = hidden[row, :length]
        if skip_first and length > 1:
            tokens = tokens[1:]
        if pooling == "last":
            tokens = tokens[-window:]
        torch.testing.assert_close(got[row], tokens.mean(dim=0))


def test_normalised_pools_ignore_the_size_of_a_token():
    hidden = torch.randn(1, 12, 8)
    louder = hidden * torch.rand(1, 12, 1).add(1).mul(100)
    pool = Pool.over(mask_of([12]), RouterConfig())
    torch.testing.assert_close(pool(hidden), pool(louder), rtol=1e-3, atol=1e-4)


def test_a_step_without_a_token_to_read_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        Pool.over(mask_of([3, 0]), RouterConfig())


def test_folding_keeps_every_score():
    router = Router(6)
    for tensor in (router.score.weight, router.score.bias, router.shift, router.scale):
        torch.nn.init.normal_(tensor)
    pooled = torch.randn(5, 6)
    weight, bias = router.folded()
    torch.testing.assert_close(router(pooled), pooled @ weight + bias)


def test_papers_biases():
    config = RouterConfig(init="paper")
    assert [b for b in range(24) if initial_bias(b, config) == -1.0] == list(range(8, 17))
    assert initial_bias(12, RouterConfig()) == 1.0


def test_threshold_is_a_probability():
    assert threshold_logit(RouterConfig(threshold=0.5)) == 0.0
    assert torch.sigmoid(torch.tensor(threshold_logit(RouterConfig(threshold=0.8)))).item() == pytest.approx(0.8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blend_selects_exactly_and_its_gradient_is_the_papers(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, ran = (torch.randn(2, 3, 4, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    logit = torch.tensor([0.3, -0.2], requires_grad=True)
    gate = logit.detach() > 0
    upstream = torch.randn(2, 3, 4, generator=generator).to(dtype)
    out = blend(hidden, ran, gate, logit, None)
    assert torch.equal(out[0], ran[0])
    assert torch.equal(out[1], hidden[1])
    out.backward(upstream)
    g = straight_through(gate, logit2 := logit.detach().clone().requires_grad_())[:, None, None]
    plain = g * ran.detach().float() + (1 - g) * hidden.detach().float()
    (plain * upstream.float()).sum().backward()
    torch.testing.assert_close(logit.grad, logit2.grad, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    assert torch.equal(ran.grad[0], upstream[0])
    assert ran.grad[1].abs().sum() == 0
    assert torch.equal(hidden.grad[1], upstream[1])


@pytest.mark.parametrize(
    ("scope", "read", "skipped"),
    [("step", "110000", None), ("response", "110000", "001110"), ("continuation", "001000", "000110")],
)
def test_what_routers_read_and_what_gates_skip(scope, read, skipped):
    place = torch.arange(6)[None]
    found = read_and_skipped(place < 2, (place >= 2) & (place < 5), scope)  # the last token is a pad
    assert ["".join("01"[int(flag)] for flag in mask[0]) for mask in found if mask is not None] == [
        text for text in (read, skipped) if text
    ]


def test_one_token_has_no_mean():
    with pytest.raises(ConfigError, match=r"router\.pooling"):
        RouterConfig(scope="continuation", pooling="mean")


def test_scopes_that_read_a_response_ask_for_it():
    with pytest.raises(ValueError, match="continuation"):
        read_and_skipped(torch.ones(1, 3, dtype=torch.bool), None, "continuation")


def test_scope_response_blends_only_the_response():
    hidden, ran = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    response = torch.tensor([[False, False, True, True]])
    out = blend(hidden, ran, torch.tensor([False]), torch.zeros(1), response)
    assert out[0, :, 0].tolist() == [1, 1, 0, 0]


def test_straight_through_is_exactly_hard():
    values = straight_through(torch.tensor([True, False]), torch.tensor([5.3, -0.7]))
    assert values.tolist() == [1.0, 0.0]


def test_the_multiplier_pulls_until_the_hard_rate_meets_the_budget():
    """A biased coin per kind: gradient steps on its logit must bring the hard rate to the target, from both sides."""
    config = BudgetConfig(tool_call=0.5, planning=0.25, multiplier_rate=0.5, quadratic=5.0)
    controller = BudgetController(config)
    spread = torch.linspace(-1, 1, 32).repeat(2)
    kinds = torch.arange(2).repeat_interleave(32)
    level = torch.tensor([3.0, -3.0], requires_grad=True)  # one starts all open, one all closed
    optimiser = torch.optim.SGD([level], lr=0.5)
    for _ in range(300):
        logits = level[kinds] + spread
        skipped = 1 - straight_through(logits.detach() > 0, logits)
        optimiser.zero_grad()
        controller.penalty(skipped, kinds, rate_totals(skipped, kinds)).backward()
        optimiser.step()
    rates = [float(((level[k] + spread[:32]) <= 0).float().mean()) for k in range(2)]
    assert rates[0] == pytest.approx(0.5, abs=0.08)
    assert rates[1] == pytest.approx(0.25, abs=0.08)


def test_a_kind_that_is_absent_leaves_its_multiplier_alone():
    controller = BudgetController(BudgetConfig())
    skipped, kinds = torch.zeros(4), torch.full((4,), KINDS.index("planning"))
    controller.penalty(skipped, kinds, rate_totals(skipped, kinds))
    assert controller.multiplier[0] == 0
    assert controller.multiplier[1] < 0


def test_routes():
    route = Route.skipping([1, 3], 4)
    assert route.skipped == (1, 3)
    assert route.skip_rate == 0.5
    assert Route.open(4).skip_rate == 0
    assert str(route) == "█·█·"
    with pytest.raises(ValueError, match="block 4"):
        Route.skipping([4], 4)


def test_with_scope_response_a_gate_learns_from_the_response_alone():
    draw = torch.Generator().manual_seed(0)
    passed, ran, upstream = (torch.randn(1, 4, 2, generator=draw) for _ in range(3))
    response, found = torch.tensor([[False, False, True, True]]), []
    for more in (0.0, 5.0):
        logit, other = torch.zeros(1, requires_grad=True), ran.clone()
        other[:, :2] += more
        blend(passed, other, torch.tensor([True]), logit, response).backward(upstream)
        found.append(logit.grad)
    assert torch.equal(*found)
    assert found[0] != 0


def test_the_multiplier_moves_by_its_rate_and_ranks_share_the_gradient():
    config = BudgetConfig(tool_call=0.25, multiplier_rate=0.1, quadratic=4.0)
    controller, kinds = BudgetController(config), torch.zeros(4, dtype=torch.int64)
    skipped = torch.full((4,), 0.75, requires_grad=True)
    loss = controller.penalty(skipped, kinds, rate_totals(skipped, kinds), scale=2.0)
    loss.backward()
    assert float(controller.multiplier[0]) == pytest.approx(0.1 * 0.5)
    torch.testing.assert_close(skipped.grad, torch.full((4,), 2.0 * 4.0 * 0.5 / 4))


def test_a_gate_whose_score_is_the_threshold_is_closed():
    router = Router(4)
    router.reset(bias=threshold_logit(RouterConfig(threshold=0.3)))
    route_pass = RoutePass(Pool.over(torch.ones(1, 3, dtype=torch.bool), RouterConfig()))
    hidden = torch.randn(1, 3, 4)
    assert not route_pass.decide(0, router, threshold_logit(RouterConfig(threshold=0.3)), hidden)
    router.reset(bias=threshold_logit(RouterConfig(threshold=0.31)))
    assert route_pass.decide(0, router, threshold_logit(RouterConfig(threshold=0.3)), hidden)


def test_after_a_pass_that_breaks_off_another_may_begin():
    tape = Tape()
    with pytest.raises(ZeroDivisionError), tape.playing(RoutePass(None)):
        raise ZeroDivisionError
    with tape.playing(RoutePass(None)):
        assert tape.current is not None
