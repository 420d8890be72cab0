"""Drafting changes how many passes a step takes, and nothing else."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.asking import BLOCKS, VOCAB, distributions, prompt_of, same
from inference.test_native import VOCAB as WIDE_VOCAB
from inference.test_native import weights_of

from layerroute.config import RouterConfig, Scope
from layerroute.errors import LayerRouteError
from layerroute.inference import Engine, Request, Sampling, native
from layerroute.inference.drafting import GRAMS, Lookup, guesses
from layerroute.inference.native import ROWS
from layerroute.inference.requests import Row

routes = st.tuples(*[st.booleans()] * BLOCKS)


@given(tokens=st.lists(st.integers(0, 3), max_size=30), most=st.integers(0, 9), cut=st.integers(0, 30))
def test_the_guess_is_what_followed_the_last_n_gram(tokens, most, cut):
    lookup = Lookup()
    lookup.extend(tokens[:cut])
    lookup.extend(tokens[cut:])
    wanted = []
    for size in GRAMS:
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[len(tokens) - size :]]
        if ends and not wanted:
            repeated = tokens + (tokens[ends[-1] :] * most)
            wanted = repeated[ends[-1] : ends[-1] + most]
    assert lookup.guess(most) == wanted


def foretell(patch, tokens, wrong=10**6):
    """Make look-ups guess what will come, wrong at every `wrong`-th position."""

    def guess(self, most):
        ahead = [*tokens, *[5] * most][len(self) : len(self) + most]
        return [(token + 1) % VOCAB if (len(self) + n) % wrong == 0 else token for n, token in enumerate(ahead)]

    patch.setattr(Lookup, "guess", guess)


class Counting:
    """A decoder that counts its passes and notes the last position it was asked to run."""

    def __init__(self, inner):
        self.inner, self.passes, self.furthest, self.name = inner, 0, 0, inner.name

    def plan(self, rows):
        return self.inner.plan(rows)

    def decode(self, plan, ids, entered=None):
        self.passes += 1
        self.furthest = max(place.cache.length for place in plan.rows)
        return self.inner.decode(plan, ids, entered)


def counting_engine(weights, scope):
    engine = Engine(weights, config=RouterConfig(scope=scope))
    engine.scheduler.decoder = Counting(engine.scheduler.decoder)
    return engine


@pytest.fixture(scope="module")
def counting(weights):
    return counting_engine(weights, "step")


@pytest.fixture(scope="module", params=get_args(Scope))
def counting_of_scope(weights, request):
    return counting_engine(weights, request.param)


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logprobs": st.sampled_from([None, VOCAB]),
    }
)


@settings(max_examples=30)
@given(
    route=routes,
    length=st.integers(1, 9),
    new=st.integers(1, 14),
    draft=st.integers(1, 9),
    wrong=st.integers(2, 20),
    stop=st.integers(0, 20),
    sampling=samplings,
)
def test_tokens_and_scores_are_those_without_a_draft(
    counting_of_scope, route, length, new, draft, wrong, stop, sampling
):
    """Drawn tokens too, seed for seed: the distribution is exact because every draw is the same draw."""
    counting = counting_of_scope
    prompt = prompt_of(length)
    shared = {"prompt_ids": prompt, "max_new_tokens": new, "route": route, "sampling": Sampling(seed=1, **sampling)}
    full = counting.generate([Request(**shared)])[0].token_ids
    shared["stop_ids"] = frozenset(full[stop : stop + 1])
    plain = counting.generate([Request(**shared)])[0]
    with pytest.MonkeyPatch.context() as patch:
        foretell(patch, [*prompt, *full], wrong)
        before = counting.scheduler.decoder.passes
        drafted = counting.generate([Request(**shared, draft=draft)])[0]
    assert drafted.token_ids == plain.token_ids
    assert drafted.finish_reason == plain.finish_reason
    assert counting.scheduler.decoder.passes - before == len(plain.token_ids) - 1 - drafted.kept_tokens
    if len(plain.token_ids) > 1:
        # What is run beyond this has no room in the cache, nor in what skipped blocks owe.
        assert counting.scheduler.decoder.furthest <= length + new - 2
    assert (plain.drafted_tokens, plain.kept_tokens) == (0, 0)
    assert drafted.kept_tokens <= drafted.drafted_tokens
    if sampling["logprobs"]:
        same(drafted, distributions(plain), 1e-5)
    assert counting.memory.used == 0


def test_a_draft_that_holds_saves_passes(counting, monkeypatch):
    request = Request(prompt_ids=prompt_of(5), max_new_tokens=13)
    full = counting.generate([request])[0].token_ids
    foretell(monkeypatch, [*request.prompt_ids, *full])
    before = counting.scheduler.decoder.passes
    result = counting.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=13, draft=3)])[0]
    assert result.token_ids == full
    # One token from the prefill, then four a pass.
    assert counting.scheduler.decoder.passes - before == 3
    assert (result.drafted_tokens, result.kept_tokens) == (9, 9)


def test_a_text_that_repeats_is_guessed_from_itself(counting):
    """No help from outside: a greedy tiny model runs into a loop, which the look-up finds."""
    before = counting.scheduler.decoder.passes
    result = counting.generate([Request(prompt_ids=prompt_of(6), max_new_tokens=100, draft=5)])[0]
    assert result.token_ids == counting.generate([Request(prompt_ids=prompt_of(6), max_new_tokens=100)])[0].token_ids
    assert result.kept_tokens > 20
    assert counting.scheduler.decoder.passes - before < 199


steps = st.lists(
    st.fixed_dictionaries(
        {
            "route": routes,
            "new": st.integers(1, 5),
            "response": st.integers(1, 8),
            "draft": st.integers(0, 6),
            "wrong": st.integers(2, 9),
            "back": st.one_of(st.just(0), st.integers(0, 9)),
            "cancel": st.booleans(),
        }
    ),
    min_size=2,
    max_size=5,
)


@pytest.mark.parametrize("fill", ["lazy", "eager"])
@settings(max_examples=30)
@given(steps=steps)
def test_a_session_with_drafts_equals_one_without(weights, fill, steps):
    """Through routes, roll-backs and cancels; sessions without drafts are proven against the twin elsewhere."""
    engine, other = Engine(weights), Engine(weights)
    fast, slow = engine.session(fill), other.session(fill)
    for number, step in enumerate(steps):
        kept = max(len(fast) - step["back"], 0)
        fast.truncate(kept)
        slow.truncate(kept)
        prompt = [*fast.tokens, *prompt_of(step["new"], number)]
        shared = {
            "prompt_ids": prompt,
            "max_new_tokens": step["response"],
            "route": step["route"],
            "sampling": Sampling(logprobs=VOCAB),
        }
        expected = other.generate([Request(**shared, session=slow)])[0]
        with pytest.MonkeyPatch.context() as patch:
            foretell(patch, [*prompt, *expected.token_ids], step["wrong"])
            stream = engine.stream(Request(**shared, session=fast, draft=step["draft"]))
            for _ in stream:
                if step["cancel"]:
                    break
            stream.cancel()
        result = stream.result
        count = len(result.token_ids)
        assert result.token_ids == expected.token_ids[:count]
        torch.testing.assert_close(distributions(result), distributions(expected)[:count], rtol=0, atol=2e-4)
        assert len(fast) == len(prompt) + count - 1
        slow.truncate(len(fast))
        assert fast.tokens == slow.tokens
        assert fast.cache.valid == slow.cache.valid
        assert fast.nbytes == engine.memory.used == fast.cache.promised
    fast.close()
    assert engine.memory.used == 0


@settings(max_examples=10)
@given(drafts=st.lists(st.integers(0, 80), min_size=2, max_size=6), hot=st.booleans())
def test_rows_with_and_without_drafts_run_together(weights, drafts, hot):
    def request(number, draft):
        route = tuple((number >> block) % 2 == 0 for block in range(BLOCKS))
        return Request(
            prompt_ids=prompt_of(3 + number, number) * 2,
            max_new_tokens=8 + number,
            route=route,
            draft=draft,
            sampling=Sampling(temperature=0.4 * hot, seed=number),
        )

    together = Engine(weights).generate([request(number, draft) for number, draft in enumerate(drafts)])
    for number, result in enumerate(together):
        alone = Engine(weights).generate([request(number, 0)])[0]
        assert result.token_ids == alone.token_ids


def test_a_draft_needs_no_more_memory(weights):
    limit = Engine(weights).session().cache.worst(64)
    request = Request(prompt_ids=[5, 6, 7] * 4, max_new_tokens=52, draft=30)
    engine = Engine(weights, memory_bytes=limit)
    session = engine.session()
    result = engine.generate([Request(prompt_ids=[5, 6, 7] * 4, max_new_tokens=52, draft=30, session=session)])[0]
    assert result.drafted_tokens
    assert engine.memory.peak <= limit
    assert result.token_ids == Engine(weights).generate([request])[0].token_ids


def test_a_negative_draft_is_refused(engine):
    with pytest.raises(LayerRouteError, match="draft: -1"):
        engine.generate([Request(prompt_ids=[5], max_new_tokens=2, draft=-1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_compiled_decoder_drafts_bit_for_bit(family, dtype, monkeypatch):
    try:
        native.compiled()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    weights = weights_of(family, dtype)
    route, prompt = (True, False, True, False, True), prompt_of(9)
    fast, slow = Engine(weights, decoder="native"), Engine(weights, decoder="native")
    drafting, plain = fast.session(), slow.session()
    for turn in range(3):
        shared = {"max_new_tokens": 30, "sampling": Sampling(logprobs=WIDE_VOCAB)}
        result = slow.generate([Request(prompt_ids=prompt, route=route, session=plain, **shared)])[0]
        foretell(monkeypatch, [*prompt, *result.token_ids], 7)
        again = fast.generate([Request(prompt_ids=prompt, route=route, session=drafting, draft=6, **shared)])[0]
        assert again.logprobs == result.logprobs
        assert again.kept_tokens > 10
        assert drafting.tokens == plain.tokens
        route, prompt = tuple(not gate for gate in route), [*prompt, *result.token_ids, *prompt_of(4, turn)]


def repeating(draft=20):
    row = Row(Request(prompt_ids=[3, 4, 5] * 5, max_new_tokens=50, draft=draft), None)
    row.token_ids = [3, 4]
    return row


def test_rows_and_their_guesses_are_no_more_than_a_decoder_takes():
    for count in (1, 2, 5, ROWS):
        rows = [repeating(draft) for draft in (20, 0, 20, 20, 20) * ROWS][:count]
        found = guesses(rows)
        assert count + sum(map(len, found)) <= ROWS
        assert any(found) == (count < ROWS - 1)
