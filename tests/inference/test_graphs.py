"""The graph decoder against the torch one. Without a GPU torch plays its kernels, through the same addresses."""

import ctypes
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.asking import BLOCKS, ask, asked, distributions, openings, prompt_of, same
from inference.oracle import Twin
from tiny import bypasses, tiny

from layerroute.config import RouterConfig
from layerroute.errors import ModelError
from layerroute.inference import Engine, Request, RouteClasses, Weights, graphs
from layerroute.inference.blocks import attend
from layerroute.inference.graphs import GraphDecoder
from layerroute.inference.routers import Routers

CUDA = torch.cuda.is_available()
routes = st.tuples(*[st.booleans()] * BLOCKS)


class Played:
    """The kernels in torch: they too see addresses and nothing else of the caches."""

    def __init__(self, weights):
        self.shape, self.dtype = weights.shape, weights.dtype

    def cache(self, address, capacity):
        sizes = (self.shape.kv_heads, capacity, self.shape.head_dim)
        count = sizes[0] * sizes[1] * sizes[2]
        memory = (ctypes.c_char * (count * self.dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=self.dtype).view(sizes)

    def of(self, where, n):
        row = int(where.rows[n])
        room, at = int(where.capacity[row]), int(where.positions[row])
        return self.cache(int(where.keys[row]), room), self.cache(int(where.values[row]), room), at

    def store(self, keys, values, where):
        for n in range(len(where.rows)):
            k, v, at = self.of(where, n)
            k[:, at], v[:, at] = keys[n], values[n]

    def attend(self, q, where, block, shape):
        out = []
        for n in range(len(where.rows)):
            k, v, at = self.of(where, n)
            out.append(attend(q[n : n + 1], k[:, : at + 1], v[:, : at + 1], block, shape))
        return torch.cat(out)


def engine_of(weights, **options):
    """An engine that decodes by graphs: recorded ones on a GPU, played ones elsewhere."""
    if CUDA:
        return Engine(weights, decoder="graphs", **options)
    engine = Engine(weights, decoder="torch", **options)
    engine.scheduler.decoder = GraphDecoder(weights, Played(weights))
    return engine


def weights_of(model):
    """Two neighbouring blocks have a bypass."""
    pairs = bypasses(model.config.hidden_size, 1, 2).items()
    model.bypasses = {block: (down.cuda(), up.cuda()) if CUDA else (down, up) for block, (down, up) in pairs}
    return Weights.from_model(model.cuda() if CUDA else model, bypasses=model.bypasses)


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral", "qwen3"])
def anyone(request):
    return weights_of(tiny(request.param))


@pytest.fixture(scope="module")
def weights():
    return weights_of(tiny("llama"))


@settings(max_examples=15)
@given(
    rows=st.lists(st.tuples(routes, st.integers(1, 25), st.integers(1, 8), st.booleans()), min_size=1, max_size=6),
    max_rows=st.integers(1, 5),
)
def test_it_follows_the_torch_decoder_in_any_company(anyone, rows, max_rows):
    requests = asked(rows)
    engine = engine_of(anyone, max_rows=max_rows)
    for request, result in zip(requests, engine.generate(requests), strict=True):
        alone = Engine(anyone, decoder="torch").generate([request])[0]
        assert result.token_ids == alone.token_ids
        same(result, distributions(alone))
    assert engine.memory.used == 0


@pytest.mark.parametrize("max_rows", [2, 5])
def test_it_tells_what_enters_each_block_as_the_torch_decoder_does(anyone, max_rows):
    prompts = [prompt_of(4 + 3 * n, n) for n in range(5)]
    options = {"config": RouterConfig(scope="continuation"), "max_rows": max_rows}
    engine = engine_of(anyone, **options)
    slow = openings(Engine(anyone, decoder="torch", **options), prompts)
    for _ in range(2 * graphs.EAGER):  # a recorded graph tells the same
        found = openings(engine, prompts)
        torch.testing.assert_close(found, slow, rtol=0, atol=2e-4)


@pytest.mark.parametrize("fill", ["lazy", "eager"])
@settings(max_examples=15)
@given(steps=st.lists(st.tuples(routes, st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=5))
def test_sessions_keep_what_skipped_blocks_are_owed(fill, steps):
    model = tiny("llama")
    twin = Twin(model)
    model.bypasses = bypasses(model.config.hidden_size, 1, 2)
    engine = engine_of(weights_of(tiny("llama")))
    session, ids = engine.session(fill), []
    for number, (route, new, count) in enumerate(steps):
        ids = [*ids, *prompt_of(new, number)]
        request = ask(ids, count, route=route, session=session)
        result = engine.generate([request])[0]
        same(result, twin.expect(request, result))
        ids += result.token_ids
    session.close()
    assert engine.memory.used == 0


def test_drafts_change_no_token(weights):
    prompt = prompt_of(6) * 3
    plain, drafted = (
        engine_of(weights).generate([Request(prompt_ids=prompt, max_new_tokens=20, draft=size)])[0] for size in (0, 4)
    )
    assert drafted.drafted_tokens
    assert plain.token_ids == drafted.token_ids


def test_graphs_belong_to_routes_and_not_to_rows(weights, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    engine = engine_of(weights, max_rows=2)
    kept = engine.scheduler.decoder._recorded
    one, two = (True,) * BLOCKS, (False,) + (True,) * (BLOCKS - 1)
    for order in ([one, two], [two, one]):
        engine.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=6, route=route) for route in order])
        assert [signature.routes for signature in kept] == [(two, one)]
    for route in (one, two):
        engine.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=6, route=route)])
    assert [signature.routes for signature in kept] == [(one,), (two,)], "the least recently used went first"
    assert all((recorded.graph is not None) == CUDA for recorded in kept.values())


def test_closed_caches_are_let_go(weights):
    engine = engine_of(weights)
    row = engine.scheduler.submit(Request(prompt_ids=prompt_of(5), max_new_tokens=8))
    engine.scheduler.step()
    keys = weakref.ref(row.cache.keys[0])
    while not engine.scheduler.idle:
        engine.scheduler.step()
    assert keys() is None


@pytest.mark.skipif(CUDA, reason="this machine records graphs")
def test_where_no_graph_can_be_recorded_it_goes_on_without_and_says_so(weights, monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    engine = engine_of(weights)
    engine.scheduler.decoder.records = True
    request = Request(prompt_ids=prompt_of(5), max_new_tokens=8)
    with pytest.warns(UserWarning, match="decoding goes on without"):
        result = engine.generate([request])[0]
    assert streams == ["before"]
    assert "goes on without" in engine.decoder_note
    assert result.token_ids == Engine(weights, decoder="torch").generate([request])[0].token_ids


def test_rows_rounded_to_a_class_share_its_graph(weights):
    closed = {0, 1}
    bias = torch.tensor([-1.0 if block in closed else 1.0 for block in range(BLOCKS)])
    routers = Routers(torch.zeros(BLOCKS, weights.shape.hidden), bias)
    rounded = tuple(block != 0 for block in range(BLOCKS))
    engine = engine_of(weights, max_rows=1, routers=routers, classes=RouteClasses(((True,) * BLOCKS, rounded)))
    plain = Engine(weights, routers, decoder="torch", classes=engine.scheduler.classes)
    requests = [ask(prompt_of(5 + n, n), 5) for n in range(3)]
    for got, wanted in zip(engine.generate(requests), plain.generate(requests), strict=True):
        assert got.route == rounded
        same(got, distributions(wanted))
    assert [signature.routes for signature in engine.scheduler.decoder._recorded] == [(rounded,)]


@pytest.mark.skipif(CUDA, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(weights):
    with pytest.raises(ModelError, match="graphs run on cuda"):
        Engine(weights, decoder="graphs")
    assert Engine(weights).decoder != "graphs"


@pytest.mark.skipif(not CUDA, reason="no GPU of CUDA's")
def test_a_gpu_takes_graphs_unasked(weights):
    assert Engine(weights).decoder == "graphs"
