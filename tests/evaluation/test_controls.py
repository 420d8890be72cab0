"""Controls skip as much as the routers did, by other choices of blocks."""

from dataclasses import replace

import pytest
import torch

from layerroute.config import AdapterConfig, RouterConfig
from layerroute.errors import ConfigError
from layerroute.evaluation.controls import (
    first_closed,
    guessed_kinds,
    kind_index,
    kind_masks,
    planning_scores,
    random_routes,
    router_inputs,
    run_controls,
    taken_for_calls,
    usual_mask,
)
from layerroute.evaluation.options import EvaluationConfig
from layerroute.evaluation.scoring import score, score_gates

ALL = ("open", "random", "one_mask", "two_masks", "two_masks_classifier")


def gates(*rows):
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def test_one_mask_closes_the_blocks_most_often_closed():
    assert usual_mask(gates("1001", "1011", "0010", "1001")).tolist() == [True, False, False, True]
    assert usual_mask(gates("1111", "1110")).tolist() == [True] * 4  # a rate of 1/8 of 4 blocks rounds to none
    assert usual_mask(gates("0111", "1011")).tolist() == [False, True, True, True]  # a tie


def test_two_masks_are_one_for_each_kind():
    masks = kind_masks(gates("1100", "1110", "1100", "1111"), torch.tensor([0, 1, 0, 1]))
    assert masks.tolist() == [[True, True, False, False], [True] * 4]
    assert kind_masks(gates("1100"), torch.tensor([0]))[1].all()  # no planning: nothing to close


def test_random_routes_close_as_many_blocks_of_each_step(makers):
    routed = makers["routed"](AdapterConfig(router=RouterConfig(always_run=(1,))))
    own = gates("0100", "1101", "1111", "0111").repeat(50, 1)
    drawn = random_routes(own, routed, seed=0)
    for routes in drawn:
        assert torch.equal(routes.sum(dim=1), own.sum(dim=1))
        assert routes[:, 1].all()
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], random_routes(own, routed, seed=0)[0])
    share = drawn[0][1::4].float().mean(dim=0)  # one of the three blocks that may close is closed
    assert torch.allclose(share[[0, 2, 3]], torch.tensor(2 / 3), atol=0.2)


def test_every_control_reaches_the_rates(routed, steps):
    kinds = kind_index(steps)
    own, opened = score(routed, steps, mode="routed"), score(routed, steps, mode="open")
    options = EvaluationConfig(controls=ALL)
    found = run_controls(routed, steps, own, opened, options, calibration=steps)
    assert tuple(found) == ALL
    half_a_block = 0.5 / 4 + 1e-9
    for index, kind in enumerate(("tool_call", "planning")):
        rate = float(own.skipped[kinds == index].mean())
        assert found["open"]["skip_rate"][kind] == 0
        assert found["random"]["skip_rate"][kind] == pytest.approx(rate)
        assert abs(found["two_masks"]["skip_rate"][kind] - rate) <= half_a_block
        assert abs(found["one_mask"]["skip_rate"][kind] - float(own.skipped.mean())) <= half_a_block
        assert found["open"]["perplexity"][kind] == pytest.approx(
            float((opened.nll[kinds == index].sum() / opened.tokens[kinds == index].sum()).exp())
        )
    masks = kind_masks(own.gates, kinds)
    calls = taken_for_calls(own.gates, masks)
    closed = sum(int((~mask).sum()) * count for mask, count in zip(masks, (calls, len(steps) - calls), strict=True))
    guessed = found["two_masks_classifier"]["skip_rate"]
    rates = [guessed[step.kind] for step in steps]
    assert sum(rates) * masks.shape[1] == pytest.approx(closed)


def test_a_guess_that_is_always_right_is_as_good_as_the_kind(routed, steps):
    kinds = kind_index(steps)
    given = torch.tensor([[True, True, False, False], [True] * 4])[kinds]
    opened = score(routed, steps, mode="open")
    own = score_gates(routed, steps, given, [opened])
    options = EvaluationConfig(controls=("two_masks", "two_masks_classifier"))
    found = run_controls(routed, steps, own, opened, options, calibration=steps)
    assert found["two_masks_classifier"] == found["two_masks"]  # here the kind can be read from the tokens


def test_the_classifier_tells_kinds_of_unseen_steps_apart(makers):
    routed = makers["routed"](AdapterConfig(router=RouterConfig(window=16)))  # the whole context is read
    unseen = makers["steps"](40, seed=9)
    scores = planning_scores(routed, unseen, makers["steps"](240, seed=1), 1, 200)
    assert ((scores > 0).long() == kind_index(unseen)).float().mean() >= 0.9


def test_a_step_is_taken_for_a_call_where_its_route_is_nearer_to_that_mask():
    own = gates("0011", "0111", "0111", "1111", "1110", "0001")
    assert taken_for_calls(own, gates("0011", "1111")) == 2  # one of two blocks closed is as near to either
    assert taken_for_calls(own, gates("1111", "1111")) == 0


def test_the_steps_least_like_planning_are_guessed_to_be_calls():
    scores = torch.tensor([-0.5, 2.0, -1.0, 0.5])
    guessed = [guessed_kinds(scores, calls).tolist() for calls in range(5)]
    assert guessed == [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_the_classifier_sees_the_context_alone(routed, steps):
    cut = [replace(step, input_ids=(*step.input_ids[: step.context_length], 5)) for step in steps]
    torch.testing.assert_close(router_inputs(routed, steps, 1, 100), router_inputs(routed, cut, 1, 4096))


def test_the_classifier_reads_what_enters_its_block(routed, steps):
    step = steps[3]
    ids = torch.tensor([step.input_ids])
    context = torch.arange(ids.shape[1])[None] < step.context_length
    with torch.inference_mode():
        route_pass = routed.begin(
            context, None, forced=torch.ones(1, 4, dtype=torch.bool), score=True, keep_pooled=True
        )
        routed.residuals(ids, route_pass)
    torch.testing.assert_close(router_inputs(routed, steps, 2, 100)[3], route_pass.pooled[2][0])


def test_the_classifier_reads_at_the_first_block_that_a_mask_closes():
    assert first_closed(torch.tensor([[True, True, False, True], [True, True, True, False]])) == 2
    assert first_closed(torch.ones(2, 4, dtype=torch.bool)) == 3


def test_a_classifier_needs_training_steps_of_both_kinds(routed, steps):
    own = score(routed, steps, mode="routed")
    options = EvaluationConfig(controls=("two_masks_classifier",))
    for few in ([], [step for step in steps if step.kind == "planning"]):
        with pytest.raises(ConfigError, match="both kinds"):
            run_controls(routed, steps, own, own, options, calibration=few)


def test_random_routes_depend_on_the_seed(routed):
    own = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    assert not torch.equal(random_routes(own, routed, seed=0)[0], random_routes(own, routed, seed=1)[0])


def test_under_scope_continuation_the_classifier_reads_the_first_token_and_nothing_after(makers, steps):
    routed = makers["routed"](AdapterConfig(router=RouterConfig(scope="continuation")))

    def read(place):
        """Return what is read once the response's token at `place` is another one."""
        changed = []
        for step in steps:
            ids, at = list(step.input_ids), step.context_length + place
            ids[at : at + 1] = [5] if at < len(ids) else []
            changed.append(replace(step, input_ids=tuple(ids)))
        return router_inputs(routed, changed, 2, 4096)

    chosen = [step.response_length > 2 for step in steps]
    torch.testing.assert_close(read(1)[chosen], read(2)[chosen])
    assert not torch.allclose(read(0), read(1))
