"""The full benchmark's parts on a tiny model: what they count, and that each document is whole."""

import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference.asking import BLOCKS, prompt_of
from transformers import GenerationConfig

from layerroute.config import RouterConfig
from layerroute.inference import Engine, fullbench, measuring, peers
from layerroute.inference.drafting import Lookup, replay
from layerroute.inference.fullbench import (
    RATES,
    Bench,
    Example,
    time_classes,
    time_drafts,
    time_peers,
    time_rows,
    time_skip_rates,
)
from layerroute.inference.measuring import bytes_per_pass, bytes_per_token, timed
from layerroute.inference.routers import Routers

OPEN = (True,) * BLOCKS


@pytest.fixture
def bench(weights):
    examples = {
        kind: [Example(tuple(prompt_of(9 + n, n + seed)), tuple(prompt_of(5, n))) for n in range(3)]
        for seed, kind in enumerate(("tool_call", "planning"))
    }
    said = []
    return Bench(engine=Engine(weights), examples=examples, skip=0.5, new_tokens=4, repeats=2, say=said.append)


def whole(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_rows_are_timed_by_kind_and_batch(bench):
    cells = time_rows(bench, (1, 4))
    whole(cells)
    assert [(cell["kind"], cell["rows"]) for cell in cells] == [
        (kind, rows) for kind in ("tool_call", "planning") for rows in (1, 4)
    ]
    for cell in cells:
        assert cell["skip_rate"] == 0.5
        assert cell["decode"]["ideal_speedup"] > 1
        # Four rows share the weights but not the keys.
        alone = bytes_per_token(bench.engine.weights, OPEN, cell["context_tokens"] + 2)
        assert (cell["decode"]["bytes_per_token"]["open"] < alone) == (cell["rows"] > 1)


def test_a_pass_reads_a_block_once_if_any_row_runs_it(weights):
    head, half = (False,) * BLOCKS, (True, True, False, False)
    block, bypass = weights.blocks[0].nbytes, weights.blocks[2].bypass.nbytes
    nothing = bytes_per_pass(weights, [head], 0)
    assert nothing == weights.head.nbytes + 2 * bypass
    assert bytes_per_pass(weights, [half, head, half], 0) == nothing + 2 * block
    assert bytes_per_pass(weights, [(True,) * BLOCKS], 0) == weights.head.nbytes + BLOCKS * block
    assert bytes_per_pass(weights, [half, half], 1) - bytes_per_pass(weights, [half], 1) == 2 * 2 * 16 * 4
    assert bytes_per_pass(weights, [half, tuple(not gate for gate in half)], 0) == nothing + BLOCKS * block


def test_skip_rates_say_their_share_of_the_ideal(bench):
    points = time_skip_rates(bench)
    whole(points)
    assert [point["asked"] for point in points] == list(RATES)
    assert points[0]["decode"]["ideal_speedup"] == points[0]["decode"]["speedup"] == 1
    assert points[-1]["skip_rate"] == 0.5
    for point in points:
        for part in (point["prefill"], point["decode"]):
            assert part["share_of_ideal"] == pytest.approx(part["speedup"] / part["ideal_speedup"])


@pytest.mark.parametrize("scope", ["response", "continuation"])
def test_nothing_is_expected_of_prefill_where_the_context_runs_every_block(bench, weights, scope):
    config = RouterConfig(scope=scope)
    bench = replace(bench, engine=Engine(weights, Routers.open(BLOCKS, weights.shape.hidden), config))
    for point in (*time_skip_rates(bench), *time_rows(bench, (1,))):
        assert point["prefill"]["ideal_speedup"] == 1
        assert point["decode"]["ideal_speedup"] > (1 if point["skip_rate"] else 0)


def test_under_scope_continuation_the_first_pass_is_expected_to_run_every_block(bench, weights):
    points = []
    for scope in ("response", "continuation"):
        engine = Engine(weights, Routers.open(BLOCKS, weights.shape.hidden), RouterConfig(scope=scope))
        points.append(time_skip_rates(replace(bench, engine=engine))[-1]["decode"]["ideal_speedup"])
    passes = bench.new_tokens - 1
    assert passes / points[1] == pytest.approx(1 + (passes - 1) / points[0])


def test_classes_run_no_less_than_exact_routes(bench):
    part = time_classes(bench, 3)
    whole(part)
    assert part["steps"] == 6
    assert part["open"]["skip_rate"] == 0
    assert part["exact_routes"] >= 2
    assert 1 < part["route_classes"] <= 3
    allowed = [part[name]["ideal_speedup_by_flops"] for name in ("open", "classes", "exact")]
    assert allowed[0] == 1 < allowed[1] <= allowed[2] < 1 / (1 - part["exact"]["skip_rate"])  # the head is not skipped
    assert 0 < part["classes"]["skip_rate"] <= part["exact"]["skip_rate"] == pytest.approx(0.25)


def test_drafts_are_counted_and_equal(bench):
    part = time_drafts(bench, 4, frozenset())
    whole(part)
    for cell in part["kinds"].values():
        assert cell["equal"] == cell["steps"] == 3
        assert cell["kept_tokens"] <= cell["drafted_tokens"]


@given(context=st.lists(st.integers(0, 3), max_size=12), response=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_a_replay_without_a_draft_takes_a_pass_a_token(context, response):
    assert replay(context, response, 0) == len(response) - 1
    assert replay(context, response, 5) <= len(response) - 1


def test_a_replay_counts_passes():
    # After 1 nothing is known; after 1 2 the rest is guessed, and 9 comes with the same pass.
    assert replay([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 9], 8) == 2
    assert not Lookup().guess(3)


def test_peers_that_are_not_here_say_so(bench, model):
    calls = []

    def peer(contexts, count):
        calls.append((len(contexts), count))

    def one_row(contexts, count):
        if len(contexts) > 1:
            raise peers.Missing("one row only")

    names = {"fast": peer, "lone": one_row, "gone": "not installed"}
    cells = time_peers(bench, names, (1, 2))
    whole(cells)
    assert calls == [(1, 1), (1, 4)] * 2 + [(2, 1), (2, 4)] * 2
    assert [cell["absent"] for cell in cells] == [
        {"gone": "not installed"},
        {"gone": "not installed", "lone": "one row only"},
    ]
    assert "lone" in cells[0]
    found = peers.available(model, None, None, None)
    assert callable(found.pop("transformers"))
    for name, reason in found.items():
        assert isinstance(reason, str), name
        assert "install" in reason
    on_gpu = peers.available(SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16), None, None, None)
    assert {name for name, reason in on_gpu.items() if "hide the GPU" in str(reason)} == {
        "llama.cpp",
        "onnxruntime-genai",
    }


def test_vllm_holds_what_transformers_does(monkeypatch, tmp_path):
    made = []
    fake = ModuleType("vllm")
    fake.__spec__ = ModuleSpec("vllm", None)
    fake.LLM = lambda folder, **options: made.append((folder, options["dtype"]))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for dtype in (torch.float32, torch.bfloat16):
        peers.available(SimpleNamespace(device=torch.device("cpu"), dtype=dtype), None, None, tmp_path)
    assert made == [(str(tmp_path), "float32"), (str(tmp_path), "bfloat16")]


def test_the_baseline_generates_what_the_engine_does(bench, model):
    context = bench.contexts("planning", 1)
    theirs = peers.transformers(model)(context, 4)[0][-4:]
    ((ours,),) = [timed(bench.engine, bench.ask(context, [OPEN]))[2]]
    assert list(ours.token_ids) == theirs


def test_the_baseline_neither_stops_nor_minds_what_a_checkpoint_wishes(bench, model, monkeypatch):
    context = bench.contexts("planning", 1)
    plain = peers.transformers(model)(context, 6)
    own = GenerationConfig(eos_token_id=plain[0][-5], repetition_penalty=9.0, do_sample=True)
    monkeypatch.setattr(model, "generation_config", own)
    assert peers.transformers(model)(context, 6) == plain
    assert model.generation_config is own


def test_rows_that_are_not_read_together_are_not_timed_together(bench, monkeypatch):
    monkeypatch.setattr(fullbench, "PREFILL_TOKENS", 20)
    assert [len(context) for context in bench.contexts("planning", 4)] == [5] * 4
    assert [len(context) for context in bench.contexts("planning", 1)] == [9]


@pytest.mark.parametrize("new_tokens", [2, 3, 8])
def test_graphs_are_recorded_before_the_first_timing(bench, monkeypatch, new_tokens):
    """A graph is recorded once `EAGER` tokens have run without: so many must have been decoded before."""
    monkeypatch.setattr(type(bench.engine), "decoder", measuring.GraphDecoder.name)
    decoded = []
    monkeypatch.setattr(bench.engine, "generate", lambda asked: decoded.append(asked[0].max_new_tokens - 1))
    few = replace(bench, new_tokens=new_tokens)
    measuring.record_graphs(bench.engine, [few.ask([[5, 6]], [OPEN])])
    assert sum(decoded) > measuring.EAGER
