"""Conversations that keep their cache while routes change."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference import oracle
from inference.asking import BLOCKS, ask, prompt_of, same

from layerroute.config import RouterConfig, Scope
from layerroute.errors import LayerRouteError
from layerroute.inference import Engine, Request, RouteClasses, Routers, forward
from layerroute.inference.cache import Cache

routes = st.tuples(*[st.booleans()] * BLOCKS)
steps = st.lists(
    st.fixed_dictionaries(
        {
            "route": routes,
            "new": st.integers(1, 7),
            "response": st.integers(0, 6),
            "back": st.one_of(st.just(0), st.integers(0, 12)),
            "cancel": st.booleans(),
        }
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("fill", ["lazy", "eager"])
@pytest.mark.parametrize("scope", get_args(Scope))
@settings(max_examples=40)
@given(steps=steps)
def test_every_order_of_routes_equals_full_recomputation(model, weights, fill, scope, steps):
    engine = Engine(weights, config=RouterConfig(scope=scope))
    session, twin = engine.session(fill), oracle.Twin(model, scope)
    said = []
    for number, step in enumerate(steps):
        if step["back"]:
            session.truncate(max(len(session) - step["back"], 0))
            said = said[: len(session)]
        prompt = said + prompt_of(step["new"], number)
        if step["cancel"]:
            stream = engine.stream(Request(prompt_ids=prompt, max_new_tokens=9, route=step["route"], session=session))
            head = [token for token, _ in zip(stream, range(step["response"]), strict=False)]
            stream.cancel()
            result = stream.result
            assert list(result.token_ids[: len(head)]) == head
            if result.context_route:
                twin.truncate(result.cached_tokens)
                new = len(prompt) - len(twin.ids)
                ran = len(session) - len(prompt)
                twin.ids = prompt + list(result.token_ids[:ran])
                twin.follow(new, ran, result)
            said = list(session.tokens)
            continue
        request = ask(prompt, new=step["response"] + 1, route=step["route"], session=session)
        result = engine.generate([request])[0]
        same(result, twin.expect(request, result))
        assert session.tokens == twin.ids
        assert len(session) == len(twin.ids)
        assert session.nbytes == engine.memory.used == session.cache.promised
        said = prompt + list(result.token_ids)
    session.close()
    assert engine.memory.used == 0


def test_a_prompt_that_differs_rolls_the_session_back(model, engine):
    session, twin = engine.session(), oracle.Twin(model)
    first = ask(prompt_of(10), route=(True, False, True, False), session=session)
    result = engine.generate([first])[0]
    same(result, twin.expect(first, result))
    changed = [*first.prompt_ids[:6], 5, 6, 7, 8]
    second = ask(changed, session=session)
    result = engine.generate([second])[0]
    assert result.cached_tokens == 6
    same(result, twin.expect(second, result))


def test_the_same_prompt_again_runs_only_its_last_token(model, engine):
    session, twin = engine.session(), oracle.Twin(model)
    for route in [(True, True, False, False), (False, True, True, False)]:
        request = ask(prompt_of(10), route=route, session=session)
        result = engine.generate([request])[0]
        same(result, twin.expect(request, result))
    assert result.cached_tokens == 9


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_same_prompt_again_takes_the_same_route_where_routers_read_its_end(weights, pooling):
    routers = Routers(torch.randn(BLOCKS, 32, generator=torch.Generator().manual_seed(1)) * 3, torch.zeros(BLOCKS))
    engine = Engine(weights, routers, RouterConfig(pooling=pooling))
    for number in range(8):
        session = engine.session()
        request = Request(prompt_ids=prompt_of(10, number), max_new_tokens=2, session=session)
        first, again = (engine.generate([request])[0] for _ in range(2))
        if pooling == "last":
            assert (again.cached_tokens, again.route) == (6, first.route)
        else:
            assert again.cached_tokens == 9  # the whole context would have to run again


@pytest.mark.parametrize("scope", get_args(Scope))
def test_routers_pool_the_new_segment_of_a_session(model, weights, scope):
    generator = torch.Generator().manual_seed(3)
    routers = Routers(torch.randn(BLOCKS, 32, generator=generator) * 3, torch.zeros(BLOCKS))
    config = RouterConfig(scope=scope)
    engine = Engine(weights, routers, config)
    session, twin, said = engine.session(), oracle.Twin(model, scope), []
    for number, new in enumerate([9, 3, 25, 1]):
        request = ask(said + prompt_of(new, number), session=session)
        earlier = list(twin.gates[: len(said)])
        result = engine.generate([request])[0]
        read, earlier = request.prompt_ids, earlier[: result.cached_tokens]
        if scope == "continuation":
            earlier += [(True,) * BLOCKS] * (len(read) - len(earlier))
            read = [*read, result.token_ids[0]]
        assert result.route == oracle.decide(model, read, earlier, routers.weight, routers.bias, config)
        same(result, twin.expect(request, result))
        said = list(request.prompt_ids) + list(result.token_ids)


def test_lazy_owes_one_residual_per_run_of_skipped_blocks(engine):
    session = engine.session("lazy")
    engine.generate(
        [Request(prompt_ids=prompt_of(20), max_new_tokens=1, route=(True, False, False, True), session=session)]
    )
    cache = session.cache
    assert cache.keys[1] is None
    assert cache.keys[2] is None
    assert cache.owed[1][0] is cache.owed[2][0]
    assert session.nbytes == 2 * 2 * 2 * 8 * cache.capacity * 4 + 20 * 32 * 4
    engine.generate([Request(prompt_ids=prompt_of(21), max_new_tokens=1, session=session)])
    assert not any(cache.owed)
    assert cache.valid == [21] * BLOCKS


def test_a_bypass_ends_a_run_since_the_next_block_is_entered_by_another_residual(engine):
    session = engine.session("lazy")
    route = (True, False, False, False)
    engine.generate([Request(prompt_ids=prompt_of(20), max_new_tokens=1, route=route, session=session)])
    owed = session.cache.owed
    assert owed[1][0] is owed[2][0]
    assert owed[3][0] is not owed[2][0]


def test_route_classes_run_more_in_the_response_and_stay_exact(model, weights):
    classes = RouteClasses(((True, False, True, True), (True,) * BLOCKS))
    generator = torch.Generator().manual_seed(1)
    routers = Routers(torch.randn(BLOCKS, 32, generator=generator) * 3, torch.zeros(BLOCKS))
    engine = Engine(weights, routers, classes=classes)
    rounded = 0
    for seed in range(8):
        for session in (None, engine.session()):
            request = ask(prompt_of(12, seed), session=session)
            result = engine.generate([request])[0]
            assert result.route in classes.routes
            assert all(wide or not narrow for wide, narrow in zip(result.route, result.context_route, strict=True))
            rounded += result.route != result.context_route
            same(result, oracle.Twin(model).expect(request, result))
            if session is not None:
                session.close()
    assert rounded
    assert engine.memory.used == 0


@pytest.mark.parametrize("fill", ["lazy", "eager"])
def test_a_session_survives_a_pass_that_breaks_off(model, weights, fill, monkeypatch):
    """The broken pass has run blocks 0 and 1, skipped 2 and died in 3."""
    engine, twin = Engine(weights, decoder="torch"), oracle.Twin(model)
    session = engine.session(fill)
    prompt, route = prompt_of(9), (True, True, False, True)
    stream = engine.stream(Request(prompt_ids=prompt, max_new_tokens=9, route=route, session=session))
    tokens = iter(stream)
    said = [next(tokens), next(tokens)]
    run = forward._run

    def dying(weights, index, *rest):
        if index == 3:
            raise KeyboardInterrupt
        return run(weights, index, *rest)

    monkeypatch.setattr(forward, "_run", dying)
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    monkeypatch.undo()
    twin.ids, twin.gates = prompt + said[:1], [route] * 10
    assert session.tokens == twin.ids
    request = ask(prompt + said + prompt_of(4, 1), session=session)
    result = engine.generate([request])[0]
    same(result, twin.expect(request, result))


def test_an_eager_session_survives_a_fill_that_breaks_off(model, weights, monkeypatch):
    engine, twin = Engine(weights), oracle.Twin(model)
    session = engine.session("eager")
    prompt, route = prompt_of(9), (True, False, False, True)
    stream = engine.stream(Request(prompt_ids=prompt, max_new_tokens=3, route=route, session=session))
    said, fill = [], Cache._fill

    def dying(cache, block, start, x):
        if start >= len(prompt):
            raise KeyboardInterrupt
        fill(cache, block, start, x)

    monkeypatch.setattr(Cache, "_fill", dying)
    with pytest.raises(KeyboardInterrupt):
        said.extend(stream)
    monkeypatch.undo()
    twin.ids, twin.gates = list(session.tokens), [route] * 20
    assert len(twin.ids) > len(prompt)
    request = ask([*twin.ids, *prompt_of(4, 1)], route=route, session=session)
    result = engine.generate([request])[0]
    same(result, twin.expect(request, result))


def test_a_stream_that_is_dropped_before_it_began_is_not_run(engine):
    session = engine.session()
    stream = engine.stream(Request(prompt_ids=prompt_of(5), max_new_tokens=4, session=session))
    iter(stream)
    del stream
    engine.generate([ask(prompt_of(3))])
    assert engine.scheduler.idle
    assert not session.tokens
    session.close()
    assert engine.memory.used == 0


def test_a_request_keeps_the_tokens_that_it_was_asked_with(engine):
    session, prompt = engine.session(), prompt_of(5)
    (said,) = engine.generate([Request(prompt_ids=prompt, max_new_tokens=4, session=session)])
    request = Request(prompt_ids=session.tokens, max_new_tokens=4, session=session)
    (again,) = engine.generate([request])
    assert again.prompt_tokens == 5 + 3
    assert again.token_ids[0] == said.token_ids[3]
    stream = engine.stream(Request(prompt_ids=prompt, max_new_tokens=4, draft=2))
    prompt += [9, 500]
    assert tuple(stream) == said.token_ids


def test_a_session_is_left_alone_while_its_response_comes(engine):
    session = engine.session()
    stream = engine.stream(Request(prompt_ids=prompt_of(5), max_new_tokens=4, session=session))
    tokens = iter(stream)
    next(tokens)
    for touch in (lambda: session.truncate(2), session.close):
        with pytest.raises(LayerRouteError, match="end or cancel its stream"):
            touch()
    stream.cancel()
    session.close()
    assert engine.memory.used == 0


@pytest.mark.parametrize("taken", [1, 4])
def test_room_that_a_response_did_not_use_is_given_back(engine, taken):
    session = engine.session()
    request = Request(prompt_ids=prompt_of(5), max_new_tokens=50, route=(True, False, False, True), session=session)
    stream = engine.stream(request)
    for _, _ in zip(range(taken), stream, strict=False):
        pass
    stream.cancel()
    pieces = [piece for block in session.cache.owed for piece in block]
    assert pieces
    assert all(len(piece.residual) == piece.count > 0 for piece in pieces)


def test_a_session_that_was_rolled_back_holds_what_is_left_and_promises_it(engine):
    session = engine.session()
    engine.generate([Request(prompt_ids=prompt_of(100), max_new_tokens=3, session=session)])
    session.truncate(5)
    assert session.tokens == prompt_of(100)[:5]
    assert session.cache.worst(10) >= session.nbytes  # the capacity stays
