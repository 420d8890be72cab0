"""A token that leaves its route unsure is run again by every block; the route goes on after it."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from inference import oracle
from inference.asking import BLOCKS, ask, asked, distributions, prompt_of, same
from inference.test_native import VOCAB as WIDE_VOCAB
from inference.test_native import weights_of

from layerroute.config import RouterConfig, Scope
from layerroute.errors import LayerRouteError
from layerroute.inference import Engine, Request, RouteClasses, Sampling, native

routes = st.tuples(*[st.booleans()] * BLOCKS)
OPEN = (True,) * BLOCKS
steps = st.lists(
    st.fixed_dictionaries({"route": routes, "new": st.integers(1, 5), "response": st.integers(1, 6)}),
    min_size=1,
    max_size=4,
)
sureness = st.sampled_from([0.0, 0.05, 0.06, 0.07, 1.0])


class Twin(oracle.Twin):
    """Opens the tokens after which no next one has the probability `fallback`, and counts them."""

    def __init__(self, model, scope, fallback):
        super().__init__(model, scope)
        self.fallback, self.again, self.nearest = fallback, 0, 1.0

    def follow(self, new, ran, result):
        first = len(self.ids) - ran
        super().follow(new, ran, result)
        for at in range(first + min(self.opening, ran), first + ran):
            if all(self.gates[at]):
                continue
            likeliest = float(oracle.scores(self.model, self.ids[: at + 1], self.gates[: at + 1])[-1].exp().max())
            self.nearest = min(self.nearest, abs(likeliest - self.fallback))
            if likeliest < self.fallback:
                self.gates[at], self.again = OPEN, self.again + 1


@pytest.mark.parametrize("fill", ["lazy", "eager", None])
@pytest.mark.parametrize("scope", get_args(Scope))
@settings(max_examples=25)
@given(steps=steps, fallback=sureness)
def test_every_token_equals_full_recomputation(model, weights, fill, scope, steps, fallback):
    """Over the steps of a session, and for steps that each have a cache of their own (None)."""
    engine = Engine(weights, config=RouterConfig(scope=scope), fallback=fallback)
    session, twin, said = engine.session(fill) if fill else None, Twin(model, scope, fallback), []
    for number, step in enumerate(steps):
        if session is None:
            twin.truncate(0)
        prompt, before = said + prompt_of(step["new"], number), twin.again
        request = ask(prompt, new=step["response"], route=step["route"], session=session)
        (result,) = engine.generate([request])
        expected = twin.expect(request, result)
        assume(twin.nearest > 1e-4)  # else either is right
        same(result, expected)
        assert result.fallback_tokens == twin.again - before
        assert result.route == step["route"] or len(result.token_ids) == 1
        said = prompt + list(result.token_ids)
        if session is not None:
            assert session.tokens == twin.ids
            assert session.nbytes == engine.memory.used == session.cache.promised
    if session is not None:
        session.close()
    assert engine.memory.used == 0


@pytest.mark.parametrize("scope", ["response", "continuation"])
def test_one_that_is_never_sure_is_the_model_with_open_gates(weights, scope):
    """Its contexts ran every block, so nothing of the closed ones is left."""
    unsure, plain = (Engine(weights, config=RouterConfig(scope=scope), fallback=f) for f in (1.0, 0.0))
    prompt, route = prompt_of(9), (True, False, True, False)
    (result,) = unsure.generate([ask(prompt, 8, route=route)])
    (opened,) = plain.generate([ask(prompt, 8, route=OPEN)])
    same(result, distributions(opened))
    assert result.fallback_tokens == (7 if scope == "response" else 6)
    assert result.skip_rate == pytest.approx(0.5 - result.fallback_tokens / 7)
    assert opened.skip_rate == 0.0
    assert opened.fallback_tokens == 0


rows = st.lists(st.tuples(routes, st.integers(1, 9), st.integers(1, 8), st.booleans()), min_size=2, max_size=5)


@settings(max_examples=25)
@given(rows=rows, fallback=sureness, classed=st.booleans())
def test_a_batch_equals_its_rows_alone(weights, rows, fallback, classed):
    classes = RouteClasses([OPEN]) if classed else None
    engine = Engine(weights, fallback=fallback, classes=classes)
    together, before = engine.generate(asked(rows)), engine.memory.used
    for request, result in zip(asked(rows), together, strict=True):
        (alone,) = engine.generate([request])
        same(result, distributions(alone))
        assert (result.token_ids, result.fallback_tokens) == (alone.token_ids, alone.fallback_tokens)
    assert before == engine.memory.used == 0


@settings(max_examples=25)
@given(rows=rows, spare=st.integers(2, 4), fallback=st.sampled_from([0.05, 0.06, 0.07]))
@example(rows=[((True, False, False, False), 1, 8, False)] * 2, spare=2, fallback=0.06)
def test_what_a_fallback_fills_was_promised(weights, rows, spare, fallback):
    """A closed block's keys need no room until a token falls back, when others may have taken it."""
    requests = [replace(request, sampling=Sampling()) for request in asked(rows)]
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    whole = Engine(weights, fallback=1.0).session().cache.worst(longest)
    engine = Engine(weights, fallback=fallback, memory_bytes=whole + spare * whole // 4)
    engine.generate(requests)
    assert engine.memory.peak <= engine.memory.limit
    assert engine.memory.used == 0


@pytest.mark.parametrize("fill", ["lazy", "eager", None])
def test_the_native_decoder_does_as_the_torch_one(fill):
    weights = weights_of("llama", torch.float32)
    try:
        native.compiled()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    answers = []
    for decoder in ("native", "torch"):
        engine = Engine(weights, decoder=decoder, fallback=0.045)
        assert engine.decoder == decoder
        session, said, results = engine.session(fill) if fill else None, [], []
        for number in range(3):
            prompt = said + prompt_of(4, number)
            route = tuple((block + number) % 3 != 1 for block in range(weights.shape.blocks))
            sampling = Sampling(logprobs=WIDE_VOCAB, temperature=0.8, seed=number)
            request = Request(prompt_ids=prompt, max_new_tokens=9, route=route, session=session, sampling=sampling)
            results += engine.generate([request])
            said = prompt + list(results[-1].token_ids)
        answers.append(results)
    own, others = answers
    assert [r.token_ids for r in own] == [r.token_ids for r in others]
    assert [r.fallback_tokens for r in own] == [r.fallback_tokens for r in others]
    assert 0 < sum(r.fallback_tokens for r in own) < 24
    for mine, theirs in zip(own, others, strict=True):
        for entry, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert dict(entry.top) == pytest.approx(dict(other.top), abs=2e-4)


@pytest.mark.parametrize("fallback", [-0.1, 1.5, float("nan")])
def test_a_fallback_is_a_probability(weights, fallback):
    with pytest.raises(LayerRouteError, match=r"fallback: .* is not allowed; give a probability"):
        Engine(weights, fallback=fallback)


def test_drafts_are_refused(weights):
    engine = Engine(weights, fallback=0.5)
    with pytest.raises(LayerRouteError, match="draft: not with fallback"):
        engine.generate([Request(prompt_ids=prompt_of(3), max_new_tokens=4, draft=2)])
    assert engine.scheduler.idle
