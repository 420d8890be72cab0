"""Figures and their intervals."""

import math

import pytest
import torch

from layerroute.evaluation.metrics import (
    Bootstrap,
    accuracy,
    differential,
    histogram,
    interval,
    length_matched,
    mean,
    number,
    perplexity,
    relative_perplexity,
    run_rate,
)


def sample(count=200, seed=0):
    """Tool calls skip about 30 %, planning about 10 %; two steps a conversation."""
    random = torch.Generator().manual_seed(seed)
    kinds = torch.arange(count) % 2
    skipped = torch.rand(count, generator=random) * torch.where(kinds == 0, 0.6, 0.2)
    names = [f"c{index // 2}" for index in range(count)]
    return skipped, kinds, Bootstrap.over(names, 500, seed=1)


def test_perplexity_weighs_tokens_not_steps():
    assert perplexity(torch.tensor([2.0, 6.0]), torch.tensor([1, 3])) == pytest.approx(math.exp(2.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_can_not_hold_is_none(value):
    assert number(value) is None


def test_figures_of_nothing_are_none():
    empty = torch.zeros(0)
    assert perplexity(empty, empty.long()) is None
    assert mean(empty) is None
    assert run_rate(torch.zeros(0, 2, dtype=torch.bool)) == [None, None]
    assert histogram(empty, 4) == [0, 0, 0, 0]


def test_the_differential_is_the_difference_of_means_in_points():
    skipped, kinds, bootstrap = sample()
    gap = differential(skipped, kinds, bootstrap)
    wanted = 100 * (skipped[kinds == 0].mean() - skipped[kinds == 1].mean())
    assert gap.value == pytest.approx(float(wanted), rel=1e-5)
    assert gap.low < gap.value < gap.high
    assert gap.high - gap.low < 10


def test_the_interval_is_the_same_again_and_another_with_another_seed():
    skipped, kinds, bootstrap = sample()
    names = [f"c{index // 2}" for index in range(200)]
    same, other = Bootstrap.over(names, 500, seed=1), Bootstrap.over(names, 500, seed=2)
    assert differential(skipped, kinds, bootstrap) == differential(skipped, kinds, same)
    assert differential(skipped, kinds, bootstrap) != differential(skipped, kinds, other)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    covered = 0
    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        kinds = torch.arange(120) % 2
        skipped = torch.rand(120, generator=random) * torch.where(kinds == 0, 0.6, 0.2)
        gap = differential(skipped, kinds, Bootstrap.over([str(i) for i in range(120)], 200, seed))
        covered += gap.low <= 20.0 <= gap.high
    assert 52 <= covered <= 60


def test_whole_conversations_are_drawn():
    """Two steps of one conversation move together: in every draw both are in it equally often."""
    bootstrap = Bootstrap.over(["a", "a", "b", "b", "c", "c"], 200, seed=0)
    sums = bootstrap.sums(torch.eye(6))
    assert torch.equal(sums[:, 0::2], sums[:, 1::2])
    assert torch.equal(sums[0], torch.ones(6, dtype=torch.float64))
    assert sums.sum(dim=1).eq(6).all()
    assert len(torch.unique(sums[:, 0])) > 2


def test_steps_that_repeat_within_a_conversation_do_not_narrow_the_interval():
    skipped, kinds, _ = sample(40)
    once = Bootstrap.over([str(index // 2) for index in range(40)], 1000, seed=0)
    copied = Bootstrap.over([str(index // 2) for index in range(40) for _ in range(5)], 1000, seed=0)
    a = differential(skipped, kinds, once)
    b = differential(skipped.repeat_interleave(5), kinds.repeat_interleave(5), copied)
    assert b.high - b.low == pytest.approx(a.high - a.low, rel=1e-9)


def test_one_conversation_gives_no_interval():
    gap = differential(torch.tensor([0.5, 0.0]), torch.tensor([0, 1]), Bootstrap.over(["a", "a"], 100, seed=0))
    assert (gap.value, gap.low, gap.high) == (50.0, None, None)


def test_a_missing_kind_gives_no_differential():
    gap = differential(torch.rand(4), torch.zeros(4, dtype=torch.long), Bootstrap.over(list("abcd"), 50, seed=0))
    assert (gap.value, gap.low, gap.high) == (None, None, None)


def test_draws_without_a_kind_are_left_out():
    found = interval(torch.tensor([1.0, math.nan, 0.0, 2.0], dtype=torch.float64))
    assert (found.value, found.low, found.high) == (1.0, pytest.approx(0.05), pytest.approx(1.95))


def test_length_matching_removes_what_length_alone_explains():
    """Tool calls are longer and longer steps skip more; within one length the kinds do the same."""
    lengths = torch.tensor([16] * 30 + [64] * 10 + [16] * 10 + [64] * 30)
    kinds = torch.tensor([1] * 40 + [0] * 40)
    skipped = torch.where(lengths == 64, 0.4, 0.1)
    bootstrap = Bootstrap.over([str(index) for index in range(80)], 200, seed=0)
    offered = torch.ones(80, dtype=torch.bool)
    assert differential(skipped, kinds, bootstrap).value == pytest.approx(15.0)
    matched = length_matched(skipped, kinds, lengths, offered, bootstrap)
    assert matched.points.value == pytest.approx(0.0, abs=1e-6)
    assert matched.points.low == pytest.approx(0.0, abs=1e-6)
    assert matched.points.high == pytest.approx(0.0, abs=1e-6)
    assert matched.steps == 80


def test_bins_weigh_as_much_as_their_rarer_kind():
    lengths = torch.tensor([16, 16, 16, 64, 64, 64, 64, 500])
    kinds = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0])
    skipped = torch.tensor([0.5, 0.1, 0.3, 0.6, 0.4, 0.0, 0.0, 0.9])
    bootstrap = Bootstrap.over([str(index) for index in range(8)], 50, seed=0)
    matched = length_matched(skipped, kinds, lengths, torch.ones(8, dtype=torch.bool), bootstrap)
    assert matched.points.value == pytest.approx(100 * (1 * 0.3 + 2 * 0.5) / 3)
    assert matched.steps == 7  # the bin of 500 holds tool calls alone


def test_without_a_shared_length_there_is_no_matched_differential():
    lengths, kinds = torch.tensor([10, 100]), torch.tensor([0, 1])
    bootstrap = Bootstrap.over(["a", "b"], 20, seed=0)
    assert length_matched(torch.rand(2), kinds, lengths, torch.ones(2, dtype=torch.bool), bootstrap) is None


def test_only_steps_with_tools_on_offer_count_where_both_kinds_have_them():
    lengths = torch.full((4,), 32)
    kinds = torch.tensor([0, 1, 1, 0])
    skipped = torch.tensor([0.5, 0.2, 0.0, 0.9])
    bootstrap = Bootstrap.over(list("abcd"), 20, seed=0)
    both = length_matched(skipped, kinds, lengths, torch.tensor([True, True, False, False]), bootstrap)
    assert (both.points.value, both.steps, both.tools_offered) == (pytest.approx(30.0), 2, True)
    only_tools = length_matched(skipped, kinds, lengths, torch.tensor([True, False, False, True]), bootstrap)
    assert (only_tools.points.value, only_tools.steps, only_tools.tools_offered) == (pytest.approx(60.0), 4, False)


def test_relative_perplexity_is_paired():
    """A constant loss per token on top of very different steps gives an interval of no width."""
    reference, tokens = torch.tensor([5.0, 100.0, 0.5, 30.0]), torch.tensor([3, 10, 1, 12])
    bootstrap = Bootstrap.over(list("abcd"), 100, seed=0)
    change = relative_perplexity(reference + 0.1 * tokens, reference, tokens, bootstrap)
    for value in (change.value, change.low, change.high):
        assert value == pytest.approx(math.expm1(0.1), rel=1e-5)


def test_relative_perplexity_is_the_ratio_of_perplexities():
    nll, reference, tokens = torch.tensor([4.0, 9.0]), torch.tensor([3.0, 8.5]), torch.tensor([2, 5])
    change = relative_perplexity(nll, reference, tokens, Bootstrap.over(["a", "b"], 20, seed=0))
    assert change.value == pytest.approx(perplexity(nll, tokens) / perplexity(reference, tokens) - 1)


def test_run_rate_and_histogram():
    assert run_rate(torch.tensor([[True, False], [True, True]])) == [1.0, 0.5]
    assert histogram(torch.tensor([[0.0, 0.24], [0.5, 1.0]]), 4) == [2, 0, 1, 1]


def test_accuracy_is_paired_by_question():
    bootstrap = Bootstrap.over([str(n) for n in range(40)], 400, 0)
    right = torch.arange(40) % 2 == 0
    assert accuracy(right, bootstrap).value == 0.5
    twin = accuracy(right, bootstrap, right)
    assert (twin.value, twin.low, twin.high) == (0.0, 0.0, 0.0)
    worse = accuracy(right & (torch.arange(40) % 4 == 0), bootstrap, right)
    assert worse.value == -0.25
    assert worse.low < -0.25 < worse.high < 0


def test_lengths_far_apart_are_not_matched():
    lengths, kinds = torch.tensor([33, 60]), torch.tensor([0, 1])  # of one octave
    bootstrap = Bootstrap.over(["a", "b"], 20, seed=0)
    assert length_matched(torch.rand(2), kinds, lengths, torch.ones(2, dtype=torch.bool), bootstrap) is None
