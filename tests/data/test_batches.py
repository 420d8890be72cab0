"""Batches: masks, padding, and an order with the same mix of kinds everywhere."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerroute.config import KINDS, Kind
from layerroute.data.batches import WINDOW, Span, by_length, collate, schedule
from layerroute.data.steps import Step


def step(context: int, response: int, kind: Kind = "planning") -> Step:
    return Step(tuple(range(context + response)), context, kind, "c", "s", False)


steps_of = st.lists(
    st.builds(step, st.integers(1, 9), st.integers(1, 9), st.sampled_from(KINDS)), min_size=1, max_size=12
)


@given(steps_of)
def test_masks_tell_context_response_and_pads_apart(steps: list[Step]) -> None:
    batch = collate(steps)
    assert len(batch) == len(steps)
    assert batch.input_ids.dtype == batch.kinds.dtype == torch.int64
    assert batch.context_mask.dtype == batch.response_mask.dtype == torch.bool
    assert batch.input_ids.shape[1] == max(len(s.input_ids) for s in steps)
    assert not (batch.context_mask & batch.response_mask).any()
    for row, one in enumerate(steps):
        length = len(one.input_ids)
        assert tuple(batch.input_ids[row, :length].tolist()) == one.input_ids
        assert (batch.input_ids[row, length:] == 0).all()
        assert batch.context_mask[row].nonzero().flatten().tolist() == list(range(one.context_length))
        assert batch.response_mask[row].nonzero().flatten().tolist() == list(range(one.context_length, length))
        assert KINDS[batch.kinds[row]] == one.kind


def test_a_batch_moves_whole() -> None:
    moved = collate([step(2, 1)]).to("meta")
    parts = (moved.input_ids, moved.context_mask, moved.response_mask, moved.kinds)
    assert {part.device.type for part in parts} == {"meta"}


@given(steps_of, st.integers(1, 60))
def test_by_length_keeps_every_step_once_and_the_tokens_bounded(steps: list[Step], tokens: int) -> None:
    groups = by_length(steps, tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(steps)))
    lengths = [[len(steps[index].input_ids) for index in group] for group in groups]
    assert all(len(group) == 1 or max(group) * len(group) <= tokens for group in lengths)
    assert [length for group in lengths for length in group] == sorted(len(s.input_ids) for s in steps)


def mixed(tools: int, planning: int) -> list[Step]:
    return [step(1 + i % 7, 1 + i % 3, "tool_call" if i < tools else "planning") for i in range(tools + planning)]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.floats(0, 1), st.integers(0, 3))
def test_schedule_mixes_exactly(tools: int, planning: int, updates: int, size: int, share: float, seed: int) -> None:
    steps = mixed(tools, planning)
    order = schedule(steps, [Span(updates, share)], size=size, seed=seed)
    assert order == schedule(steps, [Span(updates, share)], size=size, seed=seed)
    assert len(order) == updates * size
    counts = [
        sum(steps[i].kind == "tool_call" for i in order[start : start + size]) for start in range(0, len(order), size)
    ]
    for end in range(1, updates + 1):
        assert abs(sum(counts[:end]) - end * size * share) <= 0.5 + 1e-6
    assert max(counts) - min(counts) <= 1


def test_schedule_uses_every_step_before_any_again() -> None:
    steps = mixed(6, 10)
    order = schedule(steps, [Span(20, 0.5)], size=4, seed=1)
    used = Counter(order)
    for kind in KINDS:
        seen = [used[i] for i, s in enumerate(steps) if s.kind == kind]
        assert max(seen) - min(seen) <= 1


def test_schedule_depends_on_the_seed() -> None:
    steps = mixed(20, 20)
    orders = {tuple(schedule(steps, [Span(10, 0.5)], size=4, seed=seed)) for seed in range(4)}
    assert len(orders) == 4


def test_what_follows_a_span_changes_nothing_in_it_and_each_has_its_own_mix() -> None:
    steps = mixed(9, 12)
    alone = schedule(steps, [Span(WINDOW + 3, 0.5)], size=5, seed=0)  # half a step is owed in the end
    order = schedule(steps, [Span(WINDOW + 3, 0.5), Span(1, 0.1), Span(0, 0.5), Span(5, 1.0)], size=5, seed=0)
    assert order[: len(alone)] == alone
    rest = [steps[i].kind == "tool_call" for i in order[len(alone) :]]
    assert rest == [False] * 5 + [True] * 25


def test_schedule_without_one_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="tool_call"):
        schedule(mixed(0, 3), [Span(1, 0.5)], size=2, seed=0)


def test_a_batch_may_be_as_large_as_was_asked() -> None:
    assert by_length([step(1, 1)] * 4, 8) == [[0, 1, 2, 3]]


def test_what_is_seen_first_is_drawn_and_not_the_order_of_the_steps() -> None:
    steps = [step(4, 2, kind) for kind in KINDS for _ in range(100)]
    first = {frozenset(schedule(steps, [Span(WINDOW, 0.5)], size=2, seed=seed)) for seed in range(4)}
    assert len(first) == 4


def test_updates_of_short_steps_and_of_long_ones_come_in_any_order() -> None:
    steps = [step(n + 1, 1, kind) for kind in KINDS for n in range(WINDOW)]
    order = schedule(steps, [Span(WINDOW, 0.5)], size=2, seed=0)
    lengths = [len(steps[index].input_ids) for index in order[::2]]
    assert sorted(lengths) == list(range(2, WINDOW + 2))
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
