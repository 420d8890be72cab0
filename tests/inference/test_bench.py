"""The benchmark's document: what it counts and that it is whole."""

import json

import pytest
from inference.asking import ask, prompt_of
from tiny import WINDOW, tiny

from layerroute.inference import Engine, Weights, blocks
from layerroute.inference.bench import bench
from layerroute.inference.measuring import bytes_per_token, even_route, prefill_flops, share_of_stream


def test_the_document_is_whole_and_json(model):
    document = bench(model, [3, 4, 5], prompt_tokens=10, new_tokens=4, repeats=2)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["skipped"] == [2]
    assert document["decode"]["ideal_speedup"] > 1
    for part in ("prefill", "decode"):
        assert document[part]["share_of_ideal"] > 0
        assert document[part]["vs_transformers"] > 0


def test_it_counts_what_a_token_reads():
    weights = Weights.from_model(tiny("llama"))
    block = 4 * (64 * 32 + 32 * 32 + 2 * 48 * 32 + 32 * 48)
    head = 4 * 97 * 32
    assert bytes_per_token(weights, (True,) * 4, 0) == 4 * block + head
    assert bytes_per_token(weights, (True, False, False, False), 10) == block + head + 2 * 16 * 10 * 4
    assert prefill_flops(weights, (True,) * 4, 1) == 2 * (4 * block + head) / 4 + 4 * 2 * 2 * 32
    # Ten tokens: 55 pairs of a query and a key it sees. The last block takes all tokens' keys, and finishes one token.
    whole, last = 2 * block / 4 * 10 + 4 * 32 * 55, 2 * (10 * 64 * 32 + block / 4 - 64 * 32) + 4 * 32 * 10
    assert prefill_flops(weights, (True, False, True, True), 10) == 2 * whole + last + 2 * head / 4
    assert prefill_flops(weights, (True, True, True, False), 10) == 3 * whole + 2 * head / 4


def test_a_block_with_a_window_reads_no_further():
    weights, route = Weights.from_model(tiny("mistral")), (True,) * 4
    assert {block.window for block in weights.blocks} == {WINDOW}
    assert bytes_per_token(weights, route, 99) == bytes_per_token(weights, route, WINDOW)
    assert bytes_per_token(weights, route, 2) < bytes_per_token(weights, route, WINDOW)
    plain = Weights.from_model(tiny("llama"))
    for tokens in (1, WINDOW, WINDOW + 1, 3 * WINDOW):
        fewer = sum(max(0, place - WINDOW) for place in range(1, tokens + 1))
        less = 2 * 2 * 32 * (3 * fewer + max(0, tokens - WINDOW))
        assert prefill_flops(plain, route, tokens) - prefill_flops(weights, route, tokens) == less


def test_the_last_block_finishes_the_last_token_alone(monkeypatch):
    finished, engine = [], Engine(Weights.from_model(tiny("llama")))
    finish = blocks.finish
    monkeypatch.setattr(blocks, "finish", lambda x, *rest: finished.append(len(x)) or finish(x, *rest))
    engine.generate([ask(prompt_of(length), new=1) for length in (7, 5)])
    assert finished == [12, 12, 12, 2]


@pytest.mark.parametrize(("blocks", "skip", "closed"), [(24, 0.25, 6), (30, 0.25, 8), (4, 0.0, 0), (5, 1.0, 5)])
def test_the_route_skips_what_was_asked(blocks, skip, closed):
    route = even_route(blocks, skip)
    assert (len(route), route.count(False)) == (blocks, closed)


def test_each_turn_is_held_against_its_own_stream():
    """A machine that is twice as slow in one turn decodes half as fast there and reads the same share."""
    turns = [{"open": 1.0, "routed": 0.5}, {"open": 2.0, "routed": 1.0}]
    assert share_of_stream(turns, [100.0, 50.0], {"open": 60.0, "routed": 40.0}) == {"open": 0.6, "routed": 0.8}
