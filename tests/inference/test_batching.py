"""Many rows at once: the same as alone, within the budget, gone when cancelled."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.asking import BLOCKS, ask, asked, distributions, prompt_of, same

from layerroute.config import RouterConfig, Scope
from layerroute.errors import LayerRouteError
from layerroute.inference import Engine, OverBudget, Request, RouteClasses, batching
from layerroute.inference.routers import Gates

routes = st.tuples(*[st.booleans()] * BLOCKS)
rows = st.lists(
    st.tuples(routes, st.integers(1, 25), st.integers(1, 8), st.booleans()),
    min_size=2,
    max_size=7,
)


@settings(max_examples=30)
@given(rows=rows, max_rows=st.integers(1, 5))
def test_a_batch_equals_its_rows_alone(weights, rows, max_rows):
    requests = asked(rows)
    together = Engine(weights, max_rows=max_rows).generate(requests)
    for request, result in zip(requests, together, strict=True):
        alone = Engine(weights).generate([request])[0]
        assert result.token_ids == alone.token_ids
        assert result.route == alone.route
        same(result, distributions(alone))


def test_rows_join_and_leave_while_others_run(weights):
    engine = Engine(weights, max_rows=3)
    scheduler = engine.scheduler
    first = scheduler.submit(Request(prompt_ids=prompt_of(4), max_new_tokens=12))
    scheduler.step()
    scheduler.step()
    second = scheduler.submit(Request(prompt_ids=prompt_of(9, 1), max_new_tokens=2))
    while not scheduler.idle:
        scheduler.step()
    for row in (first, second):
        assert tuple(row.token_ids) == Engine(weights).generate([row.request])[0].token_ids
    assert engine.memory.used == 0


def test_cancelling_frees_the_memory_at_once(weights):
    engine = Engine(weights, max_rows=2)
    rows = [engine.scheduler.submit(Request(prompt_ids=prompt_of(5, n), max_new_tokens=9)) for n in range(3)]
    engine.scheduler.step()
    before = engine.memory.used
    engine.scheduler.cancel(rows[0])
    assert engine.memory.used == before // 2
    engine.scheduler.cancel(rows[2])  # still waiting
    engine.scheduler.cancel(rows[1])
    assert engine.memory.used == 0
    assert engine.scheduler.idle
    assert [row.result().finish_reason for row in rows] == ["cancelled"] * 3


def test_leaving_a_stream_early_frees_its_memory(engine):
    for _ in engine.stream(Request(prompt_ids=prompt_of(5), max_new_tokens=9)):
        break
    # The generator is closed when it is dropped.
    assert engine.memory.used == 0


def test_a_request_larger_than_the_budget_is_refused(weights):
    engine = Engine(weights, memory_bytes=40_000)
    with pytest.raises(OverBudget, match="whole memory budget"):
        engine.generate([Request(prompt_ids=prompt_of(100), max_new_tokens=20)])
    assert len(engine.generate([Request(prompt_ids=prompt_of(10), max_new_tokens=20)])[0].token_ids) == 20


def test_requests_wait_for_memory_and_never_exceed_it(weights):
    engine = Engine(weights, memory_bytes=40_000)
    requests = [Request(prompt_ids=prompt_of(10, n), max_new_tokens=20) for n in range(5)]
    results = engine.generate(requests)
    assert [len(result.token_ids) for result in results] == [20] * 5
    assert engine.memory.peak <= 40_000
    assert engine.memory.used == 0


def test_idle_sessions_that_hold_the_budget_are_named(weights):
    engine = Engine(weights, memory_bytes=44_000)
    session = engine.session()
    engine.generate([Request(prompt_ids=prompt_of(10), max_new_tokens=5, session=session)])
    with pytest.raises(OverBudget, match="close a session"):
        engine.generate([Request(prompt_ids=prompt_of(10), max_new_tokens=5)])
    session.close()
    assert engine.generate([Request(prompt_ids=prompt_of(10), max_new_tokens=5)])[0].token_ids


def test_where_one_request_is_refused_the_others_end_at_once(weights):
    engine = Engine(weights, memory_bytes=80_000)
    session = engine.session()
    engine.generate([Request(prompt_ids=prompt_of(10), max_new_tokens=5, session=session)])
    steps, step = [], engine.scheduler.step
    engine.scheduler.step = lambda: steps.append(step())
    large, small = (Request(prompt_ids=prompt_of(n), max_new_tokens=20) for n in (80, 10))
    with pytest.raises(OverBudget, match="close a session"):
        engine.generate([large, small, small])
    assert len(steps) == 1
    assert engine.scheduler.idle
    assert engine.memory.used == session.nbytes


def test_sessions_that_nobody_holds_give_their_memory_back(weights):
    engine = Engine(weights, memory_bytes=100_000)
    for number in range(20):
        engine.generate([Request(prompt_ids=prompt_of(10, number), max_new_tokens=5, session=engine.session())])
    assert engine.memory.used == 0


@pytest.mark.parametrize(
    ("scope", "when"),
    [(scope, when) for scope in get_args(Scope) for when in ("prefill", "decode", "draw")]
    + [("continuation", "decide")],
)
def test_a_pass_that_breaks_off_ends_all_that_it_ran_with_an_error(weights, monkeypatch, scope, when):
    """Whoever steps gets what was raised; the others are told, and are neither left waiting nor given wrong tokens."""
    engine = Engine(weights, config=RouterConfig(scope=scope))
    mine, other = (engine.stream(Request(prompt_ids=prompt_of(6, n), max_new_tokens=6)) for n in range(2))
    later = engine.stream(Request(prompt_ids=prompt_of(6, 2), max_new_tokens=6))
    session = engine.session()
    third = engine.stream(Request(prompt_ids=prompt_of(6, 3), max_new_tokens=6, session=session))
    tokens = iter(mine)
    if when in ("decode", "draw"):
        next(tokens)
    place = {"decode": type(engine.scheduler.decoder), "decide": Gates}.get(when, batching)
    name = {"prefill": "prefill", "decode": "decode", "draw": "_ending", "decide": "of_tokens"}[when]
    real = getattr(place, name)

    def dying(*given):
        found = real(*given)
        if when == "draw" and given[0] is not other._row:
            return found
        raise RuntimeError("no more")

    monkeypatch.setattr(place, name, dying)
    with pytest.raises(RuntimeError, match="no more"):
        list(tokens)
    monkeypatch.undo()
    for stream in (other, later, third):
        with pytest.raises(LayerRouteError, match=r"broke off \(RuntimeError\('no more'\)\)"):
            list(stream)
    assert engine.scheduler.idle
    ran = {"prefill": 0, "decide": 6}.get(
        when, 8 if scope == "continuation" else 7
    )  # a step draws two tokens, or three
    assert len(session) == len(session.tokens) == ran
    session.close()
    assert engine.memory.used == 0
    request = Request(prompt_ids=prompt_of(6), max_new_tokens=6)
    assert engine.generate([request])[0].token_ids == Engine(weights).generate([request])[0].token_ids


def test_a_session_of_another_engine_is_refused(weights):
    session = Engine(weights).session()
    with pytest.raises(LayerRouteError, match="another engine"):
        Engine(weights).generate([Request(prompt_ids=prompt_of(5), max_new_tokens=4, session=session)])


def test_an_unfinished_response_has_no_result(engine):
    stream = engine.stream(Request(prompt_ids=prompt_of(5), max_new_tokens=4))
    with pytest.raises(LayerRouteError, match="has not ended"):
        _ = stream.result


def test_two_steps_of_one_session_run_one_after_the_other(engine):
    session = engine.session()
    first, second = engine.generate(
        [ask(prompt_of(6), session=session, new=3), ask([*prompt_of(6), 5, 6, 7, 8], session=session, new=3)]
    )
    assert first.cached_tokens == 0
    assert second.cached_tokens == 6


def test_classes_round_only_towards_running_more():
    seen = [(True, False, False, True)] * 5 + [(True, True, False, True)] * 3 + [(False, True, True, True)]
    classes = RouteClasses.learn(seen, 3)
    assert len(classes.routes) <= 3
    assert (True,) * BLOCKS in classes.routes
    for route in seen:
        rounded = classes.round(route)
        assert rounded in classes.routes
        assert all(have or not want for have, want in zip(rounded, route, strict=True))
    assert classes.round((True, False, False, False)) == (True, False, False, True)
    assert RouteClasses.learn(seen, 1).routes == ((True,) * BLOCKS,)
    with pytest.raises(LayerRouteError, match="at least one route"):
        RouteClasses.learn([], 2)


def test_rows_of_one_class_decode_together(weights):
    cheap, dear = (True, False, False, True), (True,) * BLOCKS
    engine = Engine(weights, max_rows=2, classes=RouteClasses((cheap, dear)))
    order = [cheap, dear, cheap, dear]
    rows = [
        engine.scheduler.submit(Request(prompt_ids=prompt_of(5, n), max_new_tokens=6, route=route))
        for n, route in enumerate(order)
    ]
    engine.scheduler.step()
    assert [len(row.token_ids) for row in rows] == [2, 1, 2, 1]
    while not engine.scheduler.idle:
        engine.scheduler.step()
    assert all(len(row.token_ids) == 6 for row in rows)


def test_a_row_of_a_rare_class_is_passed_over_only_so_often(weights):
    cheap, dear = (True, False, False, True), (True,) * BLOCKS
    engine = Engine(weights, max_rows=2, classes=RouteClasses((cheap, dear)))
    rows = [
        engine.scheduler.submit(Request(prompt_ids=prompt_of(5, n), max_new_tokens=3 + n % 2, route=route))
        for n, route in enumerate([cheap, cheap, dear, *[cheap] * 40])
    ]
    while len(rows[2].token_ids) < 2:
        engine.scheduler.step()
    assert sum(row.finish_reason is None for row in rows) > 20


def test_a_large_request_is_not_overtaken_by_small_ones(weights):
    engine = Engine(weights, memory_bytes=120_000)
    first, second, large, small = (
        engine.scheduler.submit(Request(prompt_ids=prompt_of(10, n), max_new_tokens=new))
        for n, new in enumerate([9, 9, 70, 3])
    )
    engine.scheduler.step()
    assert first.token_ids
    assert second.token_ids
    assert not large.token_ids
    assert not small.token_ids
    while not engine.scheduler.idle:
        engine.scheduler.step()
    assert len(large.token_ids) == 70


def test_one_prefill_runs_no_more_than_its_tokens_but_a_longer_context_alone(weights, monkeypatch):
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 12)
    engine = Engine(weights)
    rows = [engine.scheduler.submit(Request(prompt_ids=prompt_of(n, n), max_new_tokens=9)) for n in (6, 6, 20, 3)]
    started = []
    for _ in range(3):
        engine.scheduler.step()
        started.append(sum(bool(row.token_ids) for row in rows))
    assert started == [2, 3, 4]


def test_no_more_rows_wait_prefilled_than_decode(weights):
    cheap, dear = (True, False, False, True), (True,) * BLOCKS
    engine = Engine(weights, max_rows=2, classes=RouteClasses((cheap, dear)))
    rows = [engine.scheduler.submit(Request(prompt_ids=prompt_of(5, n), max_new_tokens=6)) for n in range(9)]
    while not engine.scheduler.idle:
        engine.scheduler.step()
        assert sum(bool(row.token_ids) and row.finish_reason is None for row in rows) <= 4


def test_a_forced_route_is_not_rounded_to_a_class(weights):
    engine, route = Engine(weights, classes=RouteClasses(((True,) * BLOCKS,))), (True, False, False, True)
    assert engine.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=3, route=route)])[0].route == route


def test_classes_weigh_routes_by_how_often_they_are_seen():
    def learn(k, **counts):
        seen = [tuple(mark == "1" for mark in route[1:]) for route, count in counts.items() for _ in range(count)]
        return {"".join("01"[gate] for gate in route) for route in RouteClasses.learn(seen, k).routes}

    assert learn(3, r1100=10, r1000=1, r0001=2) == {"1100", "0001", "1111"}
    # What is merged counts as all that it stands for.
    assert learn(3, r100000=1, r110000=9, r111000=3, r111100=1) == {"110000", "111100", "111111"}
