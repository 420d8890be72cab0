"""Sampling: pure functions of one row's scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference.asking import VOCAB, prompt_of
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layerroute.errors import LayerRouteError
from layerroute.inference import Request, Sampling
from layerroute.inference.sampling import draw, keep_min_p, keep_top_k, keep_top_p, logprobs, penalise

scores_of = st.integers(0, 10_000).map(lambda seed: torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 3)


@given(scores=scores_of, k=st.integers(1, 50), p=st.floats(0.05, 0.99), low=st.floats(0.01, 0.9))
def test_cuts_equal_those_of_transformers(scores, k, p, low):
    row, ids = scores[None], torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(k)(ids, row)[0])
    assert torch.equal(keep_min_p(scores, low), MinPLogitsWarper(low)(ids, row)[0])
    kept, theirs = keep_top_p(scores, p).isfinite(), TopPLogitsWarper(p)(ids, row)[0].isfinite()
    assert int((kept ^ theirs).sum()) <= 1  # they sum from the other end: rounding may move the border by one
    assert kept.any()


@given(scores=scores_of, penalty=st.floats(0.5, 2.0))
def test_the_penalty_equals_that_of_transformers(scores, penalty):
    seen = [3, 5, 3, 9]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), scores[None].clone())[0]
    torch.testing.assert_close(penalise(scores, seen, penalty), theirs)


@given(scores=scores_of)
def test_a_cold_or_cut_draw_is_greedy(scores):
    best = int(scores.argmax())
    generator = torch.Generator().manual_seed(1)
    for sampling in (Sampling(), Sampling(temperature=1, top_k=1), Sampling(temperature=1, top_p=1e-6)):
        assert draw(scores, sampling, [], generator)[0] == best


def test_a_temperature_near_0_is_greedy():
    scores = torch.tensor([3.0, 30.0, -2.0])
    for temperature in (1e-30, 1e-44, 1e-310):
        assert draw(scores, Sampling(temperature=temperature), [], None)[0] == 1


def test_draws_follow_the_distribution():
    scores = torch.tensor([0.0, 1.0, 2.0, -9.0])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=2.0)
    drawn = torch.tensor([draw(scores, sampling, [], generator)[0] for _ in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(share, torch.softmax(scores / 2, -1), atol=0.03, rtol=0)


def test_logprobs_are_of_the_models_own_distribution():
    scores = torch.tensor([0.0, 1.0, 2.0])
    entry = draw(scores, Sampling(temperature=0.1, logprobs=2), [], torch.Generator())[1]
    assert entry == logprobs(scores, entry.token, 2)
    assert [token for token, _ in entry.top] == [2, 1]
    assert entry.logprob == pytest.approx(float(torch.log_softmax(scores, -1)[entry.token]))


def test_a_seed_repeats_and_another_differs(engine):
    def tokens(seed):
        sampling = Sampling(temperature=1.5, seed=seed)
        return engine.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=12, sampling=sampling)])[0].token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": math.inf},
        {"logprobs": -1},
        {"seed": 2**64},
    ],
)
def test_impossible_options_are_refused(bad):
    with pytest.raises(LayerRouteError, match=next(iter(bad))):
        Sampling(**bad)


def test_the_penalty_counts_the_tokens_of_the_prompt(engine):
    prompt = list(range(3, VOCAB - 10))
    (result,) = engine.generate(
        [Request(prompt_ids=prompt, max_new_tokens=1, sampling=Sampling(repetition_penalty=100.0))]
    )
    assert engine.generate([Request(prompt_ids=prompt, max_new_tokens=1)])[0].token_ids[0] in prompt
    assert result.token_ids[0] not in prompt


def test_the_engine_reports_scores_before_the_penalty(engine):
    shared = {"prompt_ids": prompt_of(8), "max_new_tokens": 1}
    tops = [
        engine.generate([Request(**shared, sampling=Sampling(logprobs=VOCAB, repetition_penalty=penalty))])[0].logprobs
        for penalty in (1.0, 5.0)
    ]
    assert tops[0][0].top == tops[1][0].top
