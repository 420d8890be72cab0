"""A thousand steps of one session: memory stays where it was, and nothing drifts."""

import random

import pytest
from inference import oracle
from inference.asking import BLOCKS, VOCAB, ask, distributions

from layerroute.inference import Request


@pytest.mark.parametrize("fill", ["lazy", "eager"])
def test_a_thousand_steps_hold_their_memory_and_do_not_drift(model, engine, fill):
    draw = random.Random(0)
    session, gates, cancels, highest = engine.session(fill), [], 0, [0, 0]
    for number in range(1000):
        if len(session) > 80 or (len(session) and draw.random() < 0.2):
            session.truncate(draw.randrange(len(session)))
        del gates[len(session) :]
        route = tuple(draw.random() < 0.5 for _ in range(BLOCKS))
        new = [draw.randrange(3, VOCAB) for _ in range(1 + draw.randrange(6))]
        request = Request(
            prompt_ids=[*session.tokens, *new], max_new_tokens=4, route=route, session=session, draft=number % 3
        )
        stream = engine.stream(request)
        for _ in stream:
            if draw.random() < 0.15:
                cancels += 1
                break
        stream.cancel()
        gates += [route] * (len(session) - len(gates))
        half = number // 500
        highest[half] = max(highest[half], engine.memory.used)
        assert engine.memory.used == session.nbytes == session.cache.promised
    assert cancels > 100
    # The first half met the worst there is: the second holds no more.
    assert highest[1] <= highest[0] * 1.05
    last = ask([*session.tokens, 5], new=1, route=(True,) * BLOCKS, session=session)
    (result,) = engine.generate([last])
    fresh = oracle.scores(model, last.prompt_ids, [*gates, last.route])[-1]
    assert (distributions(result)[0] - fresh).abs().max() < 2e-4
    session.close()
    assert engine.memory.used == 0
